"""Data files that cannot be read, and rows that cannot be used."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from bad_input.case import GOOD_ROWS, SOURCE, Case, World

USER, SAYS = {"role": "user", "content": "what?"}, {"role": "assistant", "content": "a film"}
OTHER = {"role": "assistant", "content": "a story"}
GOOD = GOOD_ROWS["ppo"]


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, **options)
    return buffer.getvalue()


def twice_named() -> bytes:
    buffer, column = io.BytesIO(), pyarrow.array(["the sea"])
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([column, column], names=["prompt", "prompt"]), buffer)
    return buffer.getvalue()


def not_utf8() -> bytes:
    """A Parquet file whose text column holds bytes that are no text."""
    whole = parquet([{"prompt": "ABCDEFGH"}], compression="none", use_dictionary=False, write_statistics=False)
    return whole.replace(b"ABCDEFGH", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8")


def no_rows() -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), buffer)
    return buffer.getvalue()


WHOLE = parquet([{"prompt": f"the sea {n}"} for n in range(200)])

# Name, file name, its bytes, and what must be said beside the file's name; read as prompts of the joint stage.
FILES = [
    ("no bytes", "p.jsonl", b"", "has no rows"),
    ("blank lines", "p.jsonl", b"\n \n\n", "has no rows"),
    ("no bytes", "p.json", b"", "is not JSON", "column 1"),
    ("no bytes", "p.csv", b"", "has no rows"),
    ("no bytes", "p.parquet", b"", "not a readable Parquet file", "written and copied whole"),
    ("a header only", "p.csv", b"prompt\n", "has no rows"),
    ("no rows", "p.parquet", no_rows(), "has no rows"),
    ("an empty list", "p.json", b"[]", "has no rows"),
    ("UTF-16", "p.jsonl", GOOD.decode().encode("utf-16"), "not UTF-8", "UTF-16: save it as UTF-8"),
    ("UTF-16 without a mark", "p.jsonl", GOOD.decode().encode("utf-16-le"), "line 1", "is not JSON"),
    ("UTF-32", "p.json", b"[1]".decode().encode("utf-32"), "UTF-32: save it as UTF-8"),
    ("Latin-1", "p.jsonl", GOOD + '{"prompt": "café"}\n'.encode("latin-1"), "line 3", "byte 15 is e9", "save the file"),
    ("Latin-1", "p.csv", "prompt\ncafé\n".encode("latin-1"), "line 2", "byte 3 is e9"),
    ("Latin-1", "p.json", '[{"prompt": "é"}]'.encode("latin-1"), "line 1", "is e9"),
    ("UTF-16", "p.csv", "prompt\nthe sea\n".encode("utf-16"), "UTF-16"),
    ("gzip", "p.jsonl", gzip.compress(GOOD), "gzip: decompress it"),
    ("gzip", "p.csv", gzip.compress(b"prompt\nthe sea\n"), "gzip: decompress it"),
    ("gzip", "p.parquet", gzip.compress(WHOLE), "not a readable Parquet file"),
    ("Parquet by another name", "p.jsonl", WHOLE, "Parquet: let its name end in .parquet"),
    ("JSONL by another name", "p.parquet", GOOD, "not a readable Parquet file"),
    ("JSONL by another name", "p.json", GOOD, "is not JSON: Extra data", "line 2", "end in .jsonl"),
    ("a list by another name", "p.jsonl", b'[\n{"prompt": "a"}\n]\n', "line 1", "is not JSON", "end in .json"),
    ("a list in a line", "p.jsonl", b'[{"prompt": "a"}]\n', "line 1", "must be an object", "end in .json"),
    ("CSV by another name", "p.jsonl", b"prompt\nthe sea\n", "line 1", "is not JSON", "near 'prompt'"),
    ("an object", "p.json", b'{"prompt": "a"}', "must hold a list", "dict", "end in .jsonl"),
    ("a list of texts", "p.json", b'["the sea"]', "item 1", "must be an object", "'the sea'"),
    ("cut off", "p.jsonl", GOOD + b'{"prompt": "the', "line 3", "is not JSON: Unterminated string"),
    ("cut off", "p.json", b'[{"prompt": "a"}', "is not JSON", "column 17"),
    ("a comma too many", "p.json", b'[{"prompt": "a"},]', "is not JSON", "near"),
    ("single quotes", "p.jsonl", b"{'prompt': 'a'}\n", "line 1", "is not JSON", "double quotes"),
    ("a bare word", "p.jsonl", b'{"prompt": None}\n', "line 1", "is not JSON", "column 12"),
    ("two objects in a line", "p.jsonl", b'{"prompt": "a"}{"prompt": "b"}\n', "line 1", "Extra data"),
    ("a number for a row", "p.jsonl", b"7\n", "line 1", "must be an object", "int (7)"),
    ("null for a row", "p.jsonl", GOOD + b"null\n", "line 3", "must be an object", "is null"),
    ("a raw zero byte", "p.jsonl", b'{"prompt": "a\x00"}\n', "line 1", "Invalid control character"),
    ("a raw line break in a text", "p.jsonl", b'{"prompt": "a\nb"}\n', "line 1", "is not JSON"),
    (
        "nested deep",
        "p.jsonl",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        "line 1",
        "nested too deeply",
    ),
    ("nested deep", "p.json", b"[" * 100_000, "nested too deeply"),
    ("a number of 5,000 digits", "p.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n", "line 1", "4300 digits"),
    ("a field twice", "p.jsonl", b'{"prompt": "a", "prompt": "b"}\n', "line 1", "'prompt' stands twice", "keep one"),
    ("a column twice", "p.csv", b"prompt,n,prompt\na,1,b\n", "line 1", "two columns are named 'prompt'"),
    ("a column twice", "p.parquet", twice_named(), "two columns are named 'prompt'", "rename or remove"),
    ("too few fields", "p.csv", b"prompt,n\na,1\nb\n", "line 3", "as many fields as the header", "'prompt', 'n'"),
    ("too many fields", "p.csv", b"prompt\nthe sea, the film\n", "line 2", "as many fields", "quote a field"),
    ("a quote left open", "p.csv", b'prompt\n"the sea\n', "is not CSV"),
    ("a quote within", "p.csv", b'prompt\n"the "sea" x"\n', "is not CSV"),
    ("semicolons", "p.csv", b"prompt;n\nthe sea;1\n", "line 2", "needs 'prompt'", "'prompt;n'"),
    ("no header", "p.csv", b"the sea\na film\n", "line 2", "needs 'prompt'", "'the sea'"),
    ("an empty field", "p.csv", b'prompt,n\n"",1\n', "line 2", "'prompt' is empty"),
    ("cut in half", "p.parquet", WHOLE[: len(WHOLE) // 2], "not a readable Parquet file"),
    ("the last byte missing", "p.parquet", WHOLE[:-1], "not a readable Parquet file", "copied whole"),
    ("the first bytes only", "p.parquet", b"PAR1", "not a readable Parquet file"),
    ("text that is none", "p.parquet", not_utf8(), "p.parquet"),
    ("a text in tar", "p.txt", GOOD, "give a file that ends in .jsonl, .json, .csv, .parquet"),
    ("no suffix", "prompts", GOOD, "give a file that ends in"),
    ("zipped", "p.jsonl.gz", gzip.compress(GOOD), "give a file that ends in"),
    ("wrong columns", "p.jsonl", jsonl({"question": "a"}), "line 1", "needs 'prompt'", "'question'", "data.columns"),
    ("a capital", "p.jsonl", jsonl({"Prompt": "a"}), "line 1", "needs 'prompt'", "'Prompt'"),
    ("wrong columns", "p.parquet", parquet([{"text": "a"}]), "row 1", "needs 'prompt'", "'text'"),
    ("no columns", "p.jsonl", b"{}\n", "line 1", "needs 'prompt'", "none"),
    ("null", "p.jsonl", GOOD + jsonl({"prompt": None}), "line 3", "'prompt' is null", "text or a conversation"),
    ("null", "p.parquet", parquet([{"prompt": "a"}, {"prompt": None}]), "row 2", "'prompt' is null"),
    ("a number", "p.jsonl", jsonl({"prompt": 7}), "line 1", "'prompt' is int (7)", "text or a conversation"),
    ("a number", "p.parquet", parquet([{"prompt": 1.5}]), "row 1", "'prompt' is float (1.5)"),
    ("true", "p.jsonl", jsonl({"prompt": True}), "line 1", "'prompt' is bool (True)"),
    ("NaN", "p.jsonl", b'{"prompt": NaN}\n', "line 1", "'prompt' is float (nan)"),
    ("Infinity", "p.jsonl", b'{"prompt": -Infinity}\n', "line 1", "'prompt' is float (-inf)"),
    ("bytes", "p.parquet", parquet([{"prompt": b"a"}]), "row 1", "'prompt' is bytes"),
    ("an object for text", "p.jsonl", jsonl({"prompt": {"text": "a"}}), "line 1", "'prompt' is dict"),
    ("a list of texts for turns", "p.jsonl", jsonl({"prompt": ["a", "b"]}), "line 1", "turn 0", "a role and a content"),
    ("empty", "p.jsonl", jsonl({"prompt": ""}), "line 1", "'prompt' is empty"),
    ("white space", "p.jsonl", jsonl({"prompt": " \n\t "}), "line 1", "'prompt' is empty"),
    ("white space of another kind", "p.jsonl", jsonl({"prompt": "\u2003\u00a0"}), "line 1", "'prompt' is empty"),
    ("no turns", "p.jsonl", jsonl({"prompt": []}), "line 1", "empty conversation"),
    ("a wrong role", "p.jsonl", jsonl({"prompt": [{"role": "robot", "content": "x"}]}), "'robot'", "user, assistant"),
    ("human and gpt", "p.jsonl", jsonl({"prompt": [{"role": "human", "content": "x"}]}), "'human'", "allowed are"),
    ("from and value", "p.jsonl", jsonl({"prompt": [{"from": "human", "value": "x"}]}), "turn 0", "role and a content"),
    ("no content", "p.jsonl", jsonl({"prompt": [USER, {"role": "user"}]}), "turn 1", "a role and a content"),
    ("content null", "p.jsonl", jsonl({"prompt": [{"role": "user", "content": None}]}), "turn 0", "null, not text"),
    (
        "content in parts",
        "p.jsonl",
        jsonl({"prompt": [{"role": "user", "content": [{"text": "x"}]}]}),
        "list",
        "not text",
    ),
    ("a role of numbers", "p.jsonl", jsonl({"prompt": [{"role": 1, "content": "x"}]}), "the role 1", "allowed are"),
    ("a role of lists", "p.jsonl", jsonl({"prompt": [{"role": ["user"], "content": "x"}]}), "turn 0", "allowed are"),
    ("null for a turn", "p.jsonl", jsonl({"prompt": [USER, None]}), "turn 1", "is null"),
    ("answered already", "p.jsonl", jsonl({"prompt": [USER, SAYS]}), "line 1", "nothing to answer"),
    ("half a character", "p.jsonl", b'{"prompt": "a \\ud83d"}\n', "line 1", "half a character", "'\\ud83d'"),
    (
        "half a character in a turn",
        "p.jsonl",
        b'{"prompt": [{"role": "user", "content": "\\udc00"}]}\n',
        "content of turn 0",
    ),
    ("a gigantic row", "p.jsonl", GOOD + jsonl({"prompt": "the sea " * 250_000}), "line 3", "data.max_prompt_tokens"),
    ("a gigantic field", "p.csv", b"prompt\n" + b"the sea " * 250_000, "line 2", 'set data.too_long = "drop"'),
]

# Name, stage, the row, and what must be said beside the place.
ROWS = [
    ("no columns that are known", "sft", {"instruction": "a"}, "needs 'text' or 'messages'", "'instruction'"),
    ("a completion alone", "sft", {"completion": "a"}, "needs 'text'", "'completion'"),
    ("a prompt alone", "sft", {"prompt": "a"}, "needs 'text'", "'completion'"),
    ("text null", "sft", {"text": None}, "'text' is null"),
    ("text empty", "sft", {"text": ""}, "'text' is empty"),
    ("text of numbers", "sft", {"text": 5}, "'text' is int (5)"),
    ("text as turns", "sft", {"text": [USER, SAYS]}, "name the column 'messages'"),
    ("completion null", "sft", {"prompt": "a", "completion": None}, "'completion' is null"),
    ("completion white", "sft", {"prompt": "a", "completion": "\n"}, "'completion' is empty"),
    ("prompt empty", "sft", {"prompt": "", "completion": "a"}, "'prompt' is empty"),
    ("completion by the user", "sft", {"prompt": "a", "completion": [USER]}, "one turn of the assistant", "user"),
    ("completion of two turns", "sft", {"prompt": "a", "completion": [SAYS, SAYS]}, "one turn of the assistant"),
    ("completion of nothing", "sft", {"prompt": "a", "completion": [{"role": "assistant", "content": ""}]}, "is empty"),
    ("messages as text", "sft", {"messages": "hello"}, "must be a conversation in which the assistant speaks"),
    ("messages without an answer", "sft", {"messages": [USER]}, "in which the assistant speaks"),
    ("messages empty", "sft", {"messages": []}, "empty conversation"),
    ("messages null", "sft", {"messages": None}, "'messages' is null"),
    ("a role with a space", "sft", {"messages": [USER, {"role": "assistant ", "content": "x"}]}, "'assistant '"),
    (
        "a gigantic text",
        "sft",
        {"text": "the sea " * 250_000},
        "data.max_tokens is 1024",
        "raise it, or set data.too_long",
    ),
    ("half a character", "sft", {"prompt": "a", "completion": "\ud800"}, "'completion' holds half a character"),
    ("no rejected", "reward", {"prompt": "a", "chosen": "b"}, "needs 'chosen' and 'rejected'"),
    ("no chosen", "reward", {"prompt": "a", "rejected": "b"}, "needs 'chosen' and 'rejected'"),
    ("other names", "reward", {"prompt": "a", "winner": "b", "loser": "c"}, "'winner'", "data.columns can rename"),
    ("identical", "reward", {"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same", 'data.bad_rows = "drop"'),
    ("identical turns", "reward", {"chosen": [USER, SAYS], "rejected": [USER, SAYS]}, "are the same"),
    ("chosen empty", "reward", {"prompt": "a", "chosen": "", "rejected": "b"}, "'chosen' is empty"),
    ("rejected white", "reward", {"prompt": "a", "chosen": "b", "rejected": "  "}, "'rejected' is empty"),
    ("chosen null", "reward", {"prompt": "a", "chosen": None, "rejected": "b"}, "'chosen' is null"),
    ("scores for answers", "reward", {"prompt": "a", "chosen": 0.9, "rejected": 0.1}, "'chosen' is float (0.9)"),
    ("a list of answers", "reward", {"prompt": "a", "chosen": ["b"], "rejected": ["c"]}, "turn 0 of 'chosen'"),
    ("no prompt", "reward", {"chosen": "a", "rejected": "b"}, "'prompt' is missing or null"),
    ("prompt null", "reward", {"prompt": None, "chosen": "a", "rejected": "b"}, "'prompt' is missing or null"),
    ("prompt empty", "reward", {"prompt": " ", "chosen": "a", "rejected": "b"}, "'prompt' is empty"),
    ("nothing in common", "reward", {"chosen": [SAYS], "rejected": [OTHER]}, "no common prompt"),
    (
        "answers by the user",
        "reward",
        {"prompt": [USER], "chosen": [USER], "rejected": [SAYS]},
        "one turn",
        "is nothing",
    ),
    (
        "two answers in one",
        "reward",
        {"prompt": "a", "chosen": [SAYS, SAYS], "rejected": [OTHER]},
        "assistant, assistant",
    ),
    (
        "an empty turn",
        "reward",
        {"prompt": [USER], "chosen": [{"role": "assistant", "content": " "}], "rejected": "b"},
        "an answer is empty",
    ),
    ("a wrong role", "reward", {"chosen": [USER, {"role": "bot", "content": "x"}], "rejected": [USER, SAYS]}, "'bot'"),
    (
        "a gigantic answer",
        "reward",
        {"prompt": "a", "chosen": "sea " * 250_000, "rejected": "b"},
        "data.max_tokens is 1024",
    ),
]

# Name, stage, rows, settings, and what must be said.
SETTINGS = [
    (
        "a column that is not there",
        "ppo",
        [{"a": "x"}],
        ["--data.columns.prompt=q"],
        "data.columns names 'q'",
        "only 'a'",
    ),
    (
        "all too long",
        "ppo",
        [{"prompt": "the sea " * 9}] * 2,
        ["--data.max_prompt_tokens=2", "--data.too_long=drop"],
        "no row is left",
        "longer than data.max_prompt_tokens = 2",
        "raise it",
    ),
    (
        "all too long",
        "sft",
        [{"text": "the sea " * 9}] * 2,
        ["--data.max_tokens=2", "--data.too_long=drop"],
        "no row is left",
        "data.max_tokens = 2",
    ),
    (
        "all bad",
        "reward",
        [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 2,
        ["--data.bad_rows=drop"],
        "no row is left",
        "line 1",
        "are the same",
    ),
    (
        "nothing left to learn",
        "sft",
        [{"prompt": "the sea " * 9, "completion": "a"}] * 2,
        ["--data.max_tokens=3", "--data.too_long=truncate"],
        "line 1",
        "nothing left to learn",
        "raise it",
    ),
    (
        "nothing left that differs",
        "reward",
        [{"prompt": "p", "chosen": "good " + "the " * 9, "rejected": "bad " + "the " * 9}],
        ["--data.max_tokens=4", "--data.too_long=truncate"],
        "line 1",
        "the same tokens",
    ),
    (
        "bad rows are dropped, long ones not",
        "sft",
        [{"text": "the sea " * 9}],
        ["--data.max_tokens=5", "--data.bad_rows=drop"],
        "line 1",
        "raise it, or set data.too_long",
    ),
    (
        "one row cannot be held out",
        "sft",
        [{"text": "the sea"}],
        [],
        "data.train",
        "cannot be split",
        "data.eval_fraction = 0",
    ),
    (
        "one prompt cannot be held out",
        "reward",
        [{"prompt": "the sea", "chosen": " was good", "rejected": f" was {c}"} for c in "cde"],
        [],
        "rows of one prompt",
        "set data.eval",
    ),
    (
        "longer than the model reads",
        "sft",
        [{"text": "the sea " * 200}] * 2,
        ["--data.max_tokens=9999"],
        "sequences have up to",
        "model reads 256",
        "lower data.max_tokens",
    ),
    (
        "longer than the model reads",
        "ppo",
        [{"prompt": "the sea"}] * 2,
        ["--rollout.max_new_tokens=255"],
        "prompts have up to",
        "the 256 that policy.model reads",
    ),
    (
        "no held-out file",
        "sft",
        [{"text": "the sea"}],
        ["--data.eval=none.jsonl"],
        "data.eval = 'none.jsonl'",
        "no such file",
    ),
    (
        "no held-out file",
        "ppo",
        [{"prompt": "the sea"}],
        ["--data.eval_prompts=none.csv"],
        "data.eval_prompts = 'none.csv'",
    ),
]

STREAMED = ["--data.streaming=true", "--steps=2", "--data.max_tokens=64", "--data.eval_fraction=0"]
LATIN = b'{"text": "the sea"}\n{"text": "caf\xe9"}\n'

# Name, file name, its bytes, further words, and what must be said; read as a stream by the SFT stage.
STREAMS = [
    ("a list", "p.json", b'[{"text": "the sea"}]', [], "can only be read whole", "end in .jsonl"),
    ("no bytes", "p.jsonl", b"", [], "has no rows"),
    ("a header only", "p.csv", b"text\n", [], "has no rows"),
    ("no rows", "p.parquet", no_rows(), [], "has no rows"),
    ("cut in half", "p.parquet", WHOLE[: len(WHOLE) // 2], [], "not a readable Parquet file"),
    ("Latin-1", "p.jsonl", LATIN, [], "line 2", "byte 13 is e9"),
    ("cut off", "p.jsonl", b'{"text": "the', [], "line 1", "is not JSON"),
    ("all bad", "p.jsonl", jsonl({"text": ""}, {"text": 7}), ["--data.bad_rows=drop"], "no row is left", "line 1"),
    ("all too long", "p.jsonl", jsonl({"text": "the sea " * 99}), ["--data.too_long=drop"], "no row is left"),
    ("a long row", "p.jsonl", jsonl({"text": "the sea " * 99}), [], "line 1", "or set data.too_long"),
    ("no such column", "p.csv", b"story\nx\n", ["--data.columns.text=tale"], "names 'tale'", "only 'story'"),
    ("one row cannot be held out", "p.jsonl", jsonl({"text": "a"}), ["--data.eval_fraction=0.5"], "cannot be split"),
    ("longer than the model reads", "p.jsonl", jsonl({"text": "a"}), ["--data.max_tokens=999"], "up to 999 tokens"),
]


def cases() -> Iterator[Case]:
    for name, file, content, *said in FILES:
        yield Case(f"{file}: {name}", _file("ppo", file, content), (file, *said))
    for name, stage, row, *said in ROWS:
        yield Case(f"{stage} row: {name}", _file(stage, "p.jsonl", jsonl(row)), ("p.jsonl, line 1: ", *said))
    for name, stage, rows, words, *said in SETTINGS:
        yield Case(f"{stage} rows: {name}", _file(stage, "p.jsonl", jsonl(*rows), words), tuple(said))
    for name, file, content, words, *said in STREAMS:
        yield Case(f"streamed {file}: {name}", _file("sft", file, content, [*STREAMED, *words]), tuple(said))
    for stage, key in SOURCE.items():
        for name, source, *said in (
            ("no such file", "none.jsonl", "there is no such file", "mend the path"),
            ("a home that is none", "~nobody/p.jsonl", "there is no such file"),
        ):
            yield Case(f"{stage}: {name}", _source(stage, source), (f"{key} = ", *said))
    yield Case("a folder without data", _folder(), ("there is no file in that folder that ends in .jsonl", "mend the"))
    several = _folder("a.csv", "b.jsonl")
    yield Case("a folder of several kinds", several, ("several kinds (.csv, .jsonl)", "give those of one, such as"))
    yield Case("a pattern of nothing", _source("ppo", "none/*.csv"), ("no file of such a name, seen from", "mend the"))
    yield Case("a link to nothing", _link("gone.jsonl"), ("is a link to 'gone.jsonl'", "mend the link"))
    yield Case("a link to itself", _link("p.jsonl"), ("p.jsonl", "mend the link"))
    yield Case("unreadable", _link("/proc/self/mem"), ("p.jsonl: cannot be read", "Input/output error"))
    yield Case("a pipe", _pipe, ("neither a file nor a folder", "save it as a file"))


def _file(stage: str, name: str, content: bytes, words: Sequence[str] = ()) -> Callable[[World], Sequence[str]]:
    return lambda world: [*world.words(stage, data=world.write(name, content)), *words]


def _source(stage: str, source: str) -> Callable[[World], Sequence[str]]:
    return lambda world: world.words(stage, data=source)


def _folder(*names: str) -> Callable[[World], Sequence[str]]:
    def make(world: World) -> Sequence[str]:
        (world.folder / "p.jsonl").mkdir()
        for name in names:
            (world.folder / "p.jsonl" / name).write_bytes(GOOD)
        return world.words("ppo", data=world.folder / "p.jsonl")

    return make


def _link(target: str) -> Callable[[World], Sequence[str]]:
    def make(world: World) -> Sequence[str]:
        os.symlink(target, world.folder / "p.jsonl")
        return world.words("ppo", data=world.folder / "p.jsonl")

    return make


def _pipe(world: World) -> Sequence[str]:
    os.mkfifo(world.folder / "p.jsonl")
    return world.words("ppo", data=world.folder / "p.jsonl")
