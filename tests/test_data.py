"""Rows in: the formats that people have, and the rows that are refused."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.config import PromptsSection, RowsSection
from tandem.data.examples import as_read, as_written, read_examples, read_pairs
from tandem.data.prompts import read_prompts, split_prompts
from tandem.data.rows import Source, hold_out, read_rows
from tandem.errors import InputError
from tiny import make_tokenizer

TOKENIZER = make_tokenizer()
USER = {"role": "user", "content": "what is two?"}
SAYS = {"role": "assistant", "content": "a good story"}
WRONG = {"role": "assistant", "content": "a bad one"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts(source, tokenizer=TOKENIZER, longest=100, too_long="refuse", columns=None):
    data = PromptsSection(prompts=source, columns=columns or {}, max_prompt_tokens=longest, too_long=too_long)
    counts = Counter()
    return read_prompts(data, tokenizer, counts), counts["dropped"]


def examples(path, rows, tokenizer=TOKENIZER, **options):
    data = RowsSection(train=write(path, rows), eval_fraction=0.0, **options)
    return read_examples(data, tokenizer, 0)


def pairs(path, rows, tokenizer=TOKENIZER, view=as_read, **options):
    data = RowsSection(train=write(path, rows), eval_fraction=0.0, **options)
    return read_pairs(data, tokenizer, 0, view)


def test_every_file_kind_gives_the_same_rows(tmp_path):
    rows = [{"prompt": "the film, was"}, {"prompt": 'a "good" story'}]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text('prompt\n"the film, was"\n"a ""good"" story"\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for kind in ("jsonl", "json", "csv", "parquet"):
        found = read_rows(Source(str(tmp_path / f"a.{kind}"), "data.train", "train", {}))
        assert [dict(row.columns) for row in found] == rows


def test_prompts_may_be_text_or_conversations(tmp_path):
    found, dropped = prompts(write(tmp_path / "p.jsonl", [{"prompt": "the film", "answer": 4}, {"prompt": [USER]}]))
    assert dropped == 0
    assert found[0].messages is None
    assert found[0].row["answer"] == 4
    assert TOKENIZER.decode(found[0].ids) == "the film"
    assert found[1].text == "<|user|>what is two?</s><|assistant|>"
    assert list(found[1].ids) == TOKENIZER(found[1].text, add_special_tokens=False).input_ids


def test_columns_can_be_renamed(tmp_path):
    found, _ = prompts(write(tmp_path / "p.jsonl", [{"question": "the film"}]), columns={"prompt": "question"})
    assert found[0].text == "the film"


def test_prompt_batches_see_every_prompt_before_any_twice(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"prompt": f"film {n}"} for n in range(5)])
    feed = split_prompts(PromptsSection(prompts=source), TOKENIZER, seed=0).train
    taken = [prompt.text for batch, _ in islice(feed.batches(2), 5) for prompt in batch]
    assert sorted(taken[:5]) == sorted(taken[5:]) == sorted(prompt.text for prompt in feed.sample)
    assert taken[:5] != taken[5:]


def test_of_a_text_every_token_is_taught(tmp_path):
    (example,) = examples(tmp_path / "s.jsonl", [{"text": "a good story"}]).train.sample
    assert TOKENIZER.decode(example.ids) == "<s>a good story</s>"
    assert example.taught == (False, *[True] * (len(example.ids) - 1))


def test_of_a_completion_only_the_answer_is_taught(tmp_path):
    (example,) = examples(tmp_path / "s.jsonl", [{"prompt": "the film", "completion": " was slow"}]).train.sample
    taught = [token for token, is_taught in zip(example.ids, example.taught, strict=True) if is_taught]
    assert TOKENIZER.decode(taught) == " was slow</s>"


def test_of_a_conversation_every_turn_of_the_assistant_is_taught(tmp_path):
    (example,) = examples(tmp_path / "s.jsonl", [{"messages": [USER, SAYS, USER, WRONG]}]).train.sample
    taught = [token for token, is_taught in zip(example.ids, example.taught, strict=True) if is_taught]
    assert TOKENIZER.decode(taught) == "a good story</s>a bad one</s>"
    assert TOKENIZER.decode(example.ids).count("<|user|>what is two?</s>") == 2


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "what?", "chosen": " good", "rejected": " bad"},
        {"prompt": [USER], "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [SAYS], "rejected": [WRONG]},
        {"prompt": [USER], "chosen": [USER, SAYS], "rejected": [USER, WRONG]},
        {"prompt": USER["content"], "chosen": [USER, SAYS], "rejected": [USER, WRONG]},
        {"chosen": [USER, SAYS], "rejected": [USER, WRONG]},
    ],
)
def test_preferences_in_every_convention(tmp_path, row):
    (pair,) = pairs(tmp_path / "p.jsonl", [row]).train.sample
    chosen, rejected = TOKENIZER.decode(pair.chosen.ids), TOKENIZER.decode(pair.rejected.ids)
    assert "good" in chosen
    assert "bad" in rejected
    assert "what" in chosen
    assert "what" in rejected


def test_long_pairs_lose_the_left_of_their_prompt(tmp_path):
    row = {"prompt": "the film was slow " * 20, "chosen": "good", "rejected": "bad"}
    split = pairs(tmp_path / "p.jsonl", [row], max_tokens=10, too_long="truncate")
    assert split.counts["truncated"] == 1
    assert len(split.train.sample[0].chosen.ids) == 10
    assert TOKENIZER.decode(split.train.sample[0].chosen.ids).endswith("good")


def test_bad_rows_are_dropped_only_where_asked_for_and_are_counted(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": other} for other in ("b", "", "c")]
    split = pairs(tmp_path / "p.jsonl", rows, bad_rows="drop")
    assert (split.counts["bad"], split.train.count) == (2, 1)
    assert split.notes == ["2 rows could not be used and were dropped (data.bad_rows)."]


def test_dropped_rows_are_counted(tmp_path):
    rows = [{"text": "a"}, {"text": "the film was slow " * 20}]
    split = examples(tmp_path / "s.jsonl", rows, max_tokens=10, too_long="drop")
    assert (split.counts["dropped"], split.train.count) == (1, 1)


BAD_FILES = [
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', ["p.jsonl, line 2", "is not JSON"]),
    ("p.jsonl", b'{"prompt": "a"}\n["b"]\n', ["p.jsonl, line 2", "must be an object"]),
    ("p.jsonl", b'{"text": "a"}\n', ["line 1", "needs 'prompt'", "'text'"]),
    ("p.jsonl", b'{"prompt": null}\n', ["line 1", "'prompt' is null"]),
    ("p.jsonl", b'{"prompt": "  "}\n', ["line 1", "'prompt' is empty"]),
    ("p.jsonl", b'{"prompt": 7}\n', ["line 1", "'prompt' is int"]),
    ("p.jsonl", b'{"prompt": []}\n', ["line 1", "empty conversation"]),
    ("p.jsonl", b'{"prompt": [{"role": "robot", "content": "x"}]}\n', ["'robot'", "user, assistant"]),
    ("p.jsonl", b'{"prompt": [{"role": "user"}]}\n', ["turn 0", "role and a content"]),
    ("p.jsonl", b'{"prompt": [{"role": "user", "content": 3}]}\n', ["turn 0", "int", "not text"]),
    ("p.jsonl", b'{"prompt": [{"role": "assistant", "content": "x"}]}\n', ["ends with the assistant's turn"]),
    ("p.jsonl", b"", ["has no rows"]),
    ("p.jsonl", b'{"prompt": "\xff"}\n', ["not UTF-8"]),
    ("p.json", b'{"prompt": "a"}', ["must hold a list"]),
    ("p.csv", b"prompt,b\nx,y\nz\n", ["p.csv, line 3", "as many fields"]),
    ("p.csv", b'prompt\n"open\n', ["p.csv", "not CSV"]),
    ("p.parquet", b"PAR1 no", ["p.parquet", "not a readable Parquet"]),
    ("p.txt", b"a", ["give a file that ends in"]),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD_FILES)
def test_bad_prompt_files_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as refusal:
        prompts(str(tmp_path / name))
    for part in said:
        assert part in str(refusal.value)


def test_missing_files_and_unknown_columns(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        prompts(str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="names 'q', but the row has only 'prompt'"):
        prompts(write(tmp_path / "p.jsonl", [{"prompt": "a"}]), columns={"prompt": "q"})


def test_long_prompts_are_refused_or_dropped(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"prompt": "film"}, {"prompt": "film " * 50}])
    with pytest.raises(InputError, match=r"line 2: the prompt has \d+ tokens"):
        prompts(source, longest=20)
    assert prompts(source, longest=20, too_long="drop")[1] == 1
    with pytest.raises(InputError, match="no row is left"):
        prompts(write(tmp_path / "q.jsonl", [{"prompt": "film " * 50}]), longest=20, too_long="drop")


def test_conversations_need_a_chat_template(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"prompt": [USER]}])
    with pytest.raises(InputError, match="no chat template"):
        prompts(source, tokenizer=make_tokenizer(chat=False))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b"}, "needs 'chosen' and 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "'chosen' is empty"),
        ({"chosen": "a", "rejected": "b"}, "'prompt' is missing"),
        ({"chosen": [SAYS], "rejected": [WRONG]}, "no common prompt"),
        ({"prompt": [USER], "chosen": [USER], "rejected": "b"}, "one turn of the assistant"),
    ],
)
def test_bad_pairs_are_named(tmp_path, row, said):
    with pytest.raises(InputError, match=said) as refusal:
        pairs(tmp_path / "p.jsonl", [row])
    assert "line 1" in str(refusal.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"completion": "b"}, "needs 'text' or 'messages'"),
        ({"messages": [USER]}, "in which the assistant speaks"),
        ({"text": [USER, SAYS]}, "name the column 'messages'"),
        ({"prompt": "a", "completion": None}, "'completion' is null"),
        ({"text": "film " * 200}, "raise it, or set data.too_long"),
    ],
)
def test_bad_examples_are_named(tmp_path, row, said):
    with pytest.raises(InputError, match=said):
        examples(tmp_path / "s.jsonl", [row], max_tokens=50)


@settings(deadline=None, max_examples=50)
@given(count=st.integers(3, 60), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_held_out_rows_are_a_partition(count, fraction, seed):
    train, heldout = hold_out(list(range(count)), fraction, seed, key=lambda item: item // 2)
    assert sorted(train + heldout) == list(range(count))
    assert train
    assert heldout
    assert not {item // 2 for item in train} & {item // 2 for item in heldout}


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60))
def test_no_bytes_in_a_file_make_a_traceback(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "p.jsonl"
    path.write_bytes(content)
    try:
        found, _ = prompts(str(path))
    except InputError:
        return
    assert found


def test_a_policy_writes_its_answer_to_the_end_of_sequence(tmp_path):
    rows = [{"prompt": "the sea", "chosen": " was quiet", "rejected": " was slow"}]
    pair = pairs(tmp_path / "p.jsonl", rows, view=as_written).train.sample[0]
    for answered, text in ((pair.chosen, " was quiet</s>"), (pair.rejected, " was slow</s>")):
        assert TOKENIZER.decode(answered.ids[answered.prompt_length :]) == text
        assert TOKENIZER.decode(answered.ids[: answered.prompt_length]).endswith("the sea")


def test_only_the_last_turn_is_the_answer(tmp_path):
    before = [
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "a story"},
        {"role": "user", "content": "a good one?"},
    ]
    rows = [{"prompt": before, "chosen": "a good one", "rejected": "no"}]
    pair = pairs(tmp_path / "p.jsonl", rows, view=as_written).train.sample[0]
    assert TOKENIZER.decode(pair.chosen.ids[pair.chosen.prompt_length :]) == "a good one</s>"
    assert "a story" in TOKENIZER.decode(pair.chosen.ids[: pair.chosen.prompt_length])


def test_a_long_pair_loses_the_left_of_its_prompt(tmp_path):
    rows = [{"prompt": "the sea " * 30, "chosen": " was quiet", "rejected": " was slow"}]
    found = pairs(tmp_path / "p.jsonl", rows, view=as_written, max_tokens=12, too_long="truncate")
    whole = pairs(tmp_path / "q.jsonl", rows, view=as_written).train.sample[0]
    cut = found.train.sample[0]
    assert found.counts["truncated"] == 1
    assert cut.chosen.ids == whole.chosen.ids[-12:]
    answer = len(whole.chosen.ids) - whole.chosen.prompt_length
    assert len(cut.chosen.ids) - cut.chosen.prompt_length == answer


def test_a_margin_says_by_how_much(tmp_path):
    row = {"prompt": "the sea", "chosen": " was quiet", "rejected": " was slow"}
    found = pairs(tmp_path / "p.jsonl", [row | {"margin": 0.5}, row | {"margin": None}, row])
    assert [pair.margin for pair in found.train.sample] == [0.5, 0.0, 0.0]
    for bad in (-1, "much", True, float("nan"), [1]):
        with pytest.raises(InputError, match="allowed is a number from 0: by how much"):
            pairs(tmp_path / "q.jsonl", [row | {"margin": bad}])
