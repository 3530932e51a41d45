"""Data read while training goes on: each row once a pass, from any place on, and nothing held out is learnt."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tracemalloc
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from faults.same import differences
from tandem.cli import main
from tandem.config import PromptsSection, RowsSection
from tandem.data.examples import as_read, read_examples, read_pairs
from tandem.data.feed import Maker
from tandem.data.prompts import split_prompts
from tandem.data.rows import Source
from tandem.data.stream import open_stream
from tandem.errors import InputError
from tandem.run.folder import read_metrics
from tandem.run.record import fingerprint
from test_commands import WORDS, ppo_words, refused, write
from test_resume import self_ending_reward
from tiny import make_tokenizer

TOKENIZER = make_tokenizer()
KINDS = ("jsonl", "csv", "parquet")


def text_of(number: int) -> str:
    """Texts of many lengths, with letters of several bytes and line breaks."""
    return f"row {number} {'é☃ ' * (number % 7)}" + ("of\ntwo lines" if number % 5 == 0 else "")


def numbered_file(tmp_path: Path, kind: str, numbers: range = range(53), name: str = "rows") -> Path:
    path, rows = tmp_path / f"{name}.{kind}", [{"text": text_of(number)} for number in numbers]
    if kind == "jsonl":
        ends = ["\n", "\r\n", "\n\n", "\r"]
        lines = [json.dumps(row, ensure_ascii=n % 2 == 0) + ends[n % 4] for n, row in enumerate(rows)]
        path.write_bytes(b"\xef\xbb\xbf" + "".join(lines).encode())
    elif kind == "csv":
        quoted = ["text,n\r\n", *(f'"{row["text"]}",{n}\r\n' for n, row in enumerate(rows))]
        path.write_bytes("".join(quoted).encode())
    else:
        table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema({"text": pyarrow.string()}))
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


def numbered_folder(tmp_path: Path, kind: str) -> Path:
    """The same rows in several files, one of them without rows, beside something that is no data."""
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    for name, numbers in (("a", range(20)), ("b", range(0)), ("c", range(20, 21)), ("d", range(21, 53))):
        numbered_file(folder, kind, numbers, name)
    (folder / "README.md").write_text("rows")
    return folder


def by_pattern(tmp_path: Path, kind: str) -> Path:
    return numbered_folder(tmp_path, kind) / f"*.{kind}"


SOURCES = [numbered_file, numbered_folder, by_pattern]


def number_of(text: str) -> int:
    return int(text.split()[1])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_read_on_from_every_mark(tmp_path, kind, source):
    rows = Source(str(source(tmp_path, kind)), "data.train", "train", {})
    marks, whole = [], []
    with rows.open() as reader:
        for row in reader:
            whole.append(row)
            marks.append(json.loads(json.dumps(reader.mark())))
    assert [number_of(columns["text"]) for columns, _ in whole] == list(range(53))
    for read, mark in enumerate(marks, start=1):
        with rows.open(mark) as reader:
            assert list(reader) == whole[read:]


def stream_of(path: Path | str, buffer_rows: int, fraction: float = 0.0, seed: int = 0):
    """The numbers of the file's rows as a stream, and those that are held out."""
    maker = Maker(lambda row, _: number_of(row.columns["text"]), lambda row: row.place, "refuse", "nothing")
    source = Source(str(path), "data.train", "train", {})
    return open_stream(source, maker, buffer_rows, seed, fraction, Counter())


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_pass_has_every_row_once_in_an_order_within_the_buffer(tmp_path, kind, source):
    stream, _ = stream_of(source(tmp_path, kind), buffer_rows=10)
    taken = [number for batch, _ in islice(stream.batches(1), 3 * 53) for number in batch]
    passes = [taken[start : start + 53] for start in range(0, len(taken), 53)]
    for one in passes:
        assert sorted(one) == list(range(53))
        assert max(abs(place - number) for place, number in enumerate(one)) < 10
    assert passes[0][:10] != sorted(passes[0][:10])
    assert len({tuple(one) for one in passes}) == 3
    first, second = (max(one[:10]) for one in passes[:2])
    assert (first, second) != (9, 9), "windows end at the same rows in each pass"
    in_order, _ = stream_of(source(tmp_path, kind), buffer_rows=1)
    assert next(in_order.batches(53))[0] == list(range(53))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_from_every_place(tmp_path, kind, source):
    stream, held = stream_of(source(tmp_path, kind), buffer_rows=8, fraction=0.3)
    whole = list(islice(stream.batches(4), 40))
    for done in range(1, 30):
        place = json.loads(json.dumps(whole[done - 1][1]))
        assert list(islice(stream.batches(4, done, place), 40 - done)) == whole[done:]
    assert not {number for batch, _ in whole for number in batch} & set(held)
    assert len(held) == 2


def test_what_has_passed_is_not_read_again(tmp_path):
    path = Path(write(tmp_path / "rows.jsonl", [{"text": text_of(number)} for number in range(53)]))
    stream, _ = stream_of(path, buffer_rows=10)
    whole = list(islice(stream.batches(5), 10))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(b"x" * (len(line) - 1) + b"\n" if n < 30 else line for n, line in enumerate(lines)))
    place = whole[6][1]
    assert list(islice(stream.batches(5, 7, place), 3)) == whole[7:]


@pytest.mark.parametrize("together", [2**30, 100])
@pytest.mark.parametrize("source", SOURCES)
def test_another_content_or_another_file_is_noticed(tmp_path, monkeypatch, source, together):
    monkeypatch.setattr("tandem.run.record._WHOLE_TOGETHER", together)
    path = source(tmp_path, "jsonl")
    marks = [fingerprint(path), fingerprint(path)]
    last = sorted(tmp_path.rglob("*.jsonl"))[-1]
    last.write_bytes(last.read_bytes().replace(b"row 52", b"row 25"))
    marks.append(fingerprint(path))
    if source is not numbered_file:
        shutil.copy(last, last.with_name("e.jsonl"))
        marks.append(fingerprint(path))
    assert None not in marks
    assert len(set(marks)) == len(marks) - 1


def test_a_hub_data_set_is_read_on_from_where_it_stood(monkeypatch):
    import datasets

    rows = [{"text": text_of(number)} for number in range(53)]
    asked = []

    def load(name, split, streaming):
        asked.append((name, split, streaming))
        return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    stream, _ = stream_of("someone/something", buffer_rows=8)
    whole = list(islice(stream.batches(4), 30))
    assert sorted([number for batch, _ in whole for number in batch][:53]) == list(range(53))
    assert set(asked) == {("someone/something", "train", True)}
    for done in (1, 5, 13, 20):
        place = json.loads(json.dumps(whole[done - 1][1]))
        later = [batch for batch, _ in islice(stream.batches(4, done, place), 30 - done)]
        assert later == [batch for batch, _ in whole[done:]]


def test_memory_holds_a_buffer_and_not_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {number} {'x' * 1000}"}) + "\n" for number in range(8000)))
    stream, _ = stream_of(path, buffer_rows=100)
    tracemalloc.start()
    taken = sum(len(batch) for batch, _ in islice(stream.batches(100), 80))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken == 8000
    assert peak < 1_000_000 < path.stat().st_size / 8


def test_pairs_of_a_held_out_prompt_never_train_and_those_of_one_prompt_come_together(tmp_path):
    rows = [
        {"prompt": f"the {WORDS[number % 6]}", "chosen": f" was {number}", "rejected": " was bad"}
        for number in range(60)
    ]
    source = write(tmp_path / "p.jsonl", rows)
    data = RowsSection(train=source, streaming=True, buffer_rows=12, eval_fraction=0.34)
    split = read_pairs(data, TOKENIZER, 0, as_read)
    held = {pair.prompt for pair in split.heldout}
    assert (len(held), len(split.heldout)) == (2, 4)
    assert split.longest == 1024
    taken = [pair for batch, _ in islice(split.train.batches(8), 20) for pair in batch]
    assert {pair.prompt for pair in taken} == {repr(row["prompt"]) for row in rows} - held
    for start in range(0, 40, 8):
        window = [pair.prompt for pair in taken[start : start + 8]]
        assert all(window[n] == window[n + 1] for n in range(0, 8, 2))


def test_limits_and_counts_apply_as_rows_come(tmp_path):
    rows = [{"text": "the sea"}] * 30 + [{"text": "the sea " * 30}, {"text": ""}, {"no": 1}] + [{"text": "a film"}] * 9
    path = write(tmp_path / "s.jsonl", rows)
    Path(path).write_bytes(Path(path).read_bytes() + b'{nonsense\n{"text": "caf\xe9"}\n{"text": "a sea"}\n')
    data = RowsSection(
        train=path, streaming=True, buffer_rows=5, eval_fraction=0, max_tokens=20, too_long="drop", bad_rows="drop"
    )
    split = read_examples(data, TOKENIZER, 0)
    assert split.notes == []
    ((batch, place),) = islice(split.train.batches(41), 1)
    assert len(batch) == 41
    assert split.train.facts(place) == {"stream": {"passes": 1, "used": 41, "dropped": 1, "bad": 4}}
    said = split.train.notes(place)
    assert "41 rows were trained on" in said[0]
    assert "1 rows were longer than data.max_tokens = 20 and dropped." in said[1]


@pytest.mark.parametrize("bad_rows", ["refuse", "drop"])
def test_a_pass_without_a_row_ends_the_stream(tmp_path, bad_rows):
    path = write(tmp_path / "s.jsonl", [{"text": "the sea"}])
    data = RowsSection(train=path, streaming=True, buffer_rows=4, eval_fraction=0, bad_rows=bad_rows)
    split = read_examples(data, TOKENIZER, 0)
    Path(path).write_text('{"text": ""}\n')
    with pytest.raises(InputError, match=r"'text' is empty.*bad_rows|no row is left.*'text' is empty"):
        next(split.train.batches(1))


def test_prompts_are_held_out_by_their_own_file_only(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"prompt": f"the sea {number}"} for number in range(9)])
    split = split_prompts(PromptsSection(prompts=source, streaming=True, max_prompt_tokens=50), TOKENIZER, 0)
    assert (split.heldout, split.longest, split.train.count) == ([], 50, None)
    assert len(split.train.sample) == 9
    given = PromptsSection(prompts=source, eval_prompts=source, streaming=True)
    assert len(split_prompts(given, TOKENIZER, 0).heldout) == 9


def words_of(tmp_path: Path, stage: str, model: Path, kind: str) -> list[str]:
    """A command that trains from a stream of several windows and passes, its steps more than a pass has."""
    path = tmp_path / f"data.{kind}"
    if stage == "sft":
        rows = [{"prompt": f"the sea {n}", "completion": f" was {WORDS[n % 6]}"} for n in range(30)]
    else:
        rows = [
            {"prompt": f"the {WORDS[n % 6]} {n // 2}", "chosen": " was good", "rejected": " bad"} for n in range(30)
        ]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=6)
    else:
        write(path, rows)
    size = "--sequences_per_minibatch=4" if stage == "sft" else "--pairs_per_minibatch=4"
    words = [stage, f"--model={model}", f"--data.train={path}", size, "--steps=12", "--eval_every=5"]
    words += ["--data.streaming=true", "--data.buffer_rows=8", "--data.max_tokens=64", "--optimizer.lr=0.001"]
    return [*words, "--run.trackers=[]"]


@pytest.fixture
def ended_by_sigterm(monkeypatch):
    """Let a stage's n-th step end the run, once."""

    def at(stage: str, number: int) -> None:
        from tandem.stages import dpo, reward, sft

        module = {"sft": sft, "reward": reward, "dpo": dpo}[stage]
        learn, calls = module.train_on, Counter()

        def train_on(*given):
            calls["n"] += 1
            if calls["n"] == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return learn(*given)

        monkeypatch.setattr(module, "train_on", train_on)

    return at


@pytest.mark.parametrize(
    ("stage", "kind", "more"),
    [
        ("sft", "jsonl", []),
        ("reward", "parquet", []),
        ("dpo", "jsonl", ["--adapters.rank=4"]),
        ("dpo", "parquet", []),
    ],
    ids=str,
)
def test_training_from_a_stream_goes_on_exactly(tiny, tmp_path, capsys, ended_by_sigterm, stage, kind, more):
    words = [*words_of(tmp_path, stage, tiny(), kind), *more]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert main([*words, f"--run.directory={whole}"]) == 0
    ended_by_sigterm(stage, 6)
    assert main([*words, f"--run.directory={cut}"]) == 130
    assert main([stage, "--resume", str(cut)]) == 0
    assert differences(cut, whole) == []
    assert "rows were trained on, in 1 whole passes" in " ".join(capsys.readouterr().out.split())
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["stream"] == {"passes": 1, "used": 48}
    if stage == "dpo":
        rows = read_metrics(whole)
        assert rows[0]["train/margin"] == 0
        assert rows[-1]["train/margin"] > 0


@pytest.mark.parametrize("more", [[], ["--rollout.staleness=1"]], ids=str)
def test_a_joint_run_on_a_stream_goes_on_exactly(tiny, tmp_path, more):
    function, _ = self_ending_reward(tmp_path, 5)
    source = write(tmp_path / "stream.jsonl", [{"prompt": f"the {WORDS[n % 6]} {n}"} for n in range(10)])
    words = [*ppo_words(tmp_path, tiny(), f"--rewards.0.function={function}", "--value.start=policy"), *more]
    words += ["--data.streaming=true", "--data.buffer_rows=4", "--data.max_prompt_tokens=40", "--policy.lr=0.001"]
    words += [f"--data.prompts={source}", "--steps=6"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert main([*words, f"--run.directory={cut}"]) == 130
    assert main(["ppo", "--resume", str(cut)]) == 0
    assert main([*words, f"--run.directory={whole}"]) == 0
    assert differences(cut, whole) == []


def test_a_bad_row_in_mid_run_is_named_and_the_run_can_go_on(tiny, tmp_path, capsys):
    words = words_of(tmp_path, "sft", tiny(), "jsonl")
    path = tmp_path / "data.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:25], '{"prompt": "the sea"\n', *lines[25:]]))
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    said = refused(capsys, [*words, f"--run.directory={cut}"])
    assert f"{path}, line 26: is not JSON" in said
    assert 'data.bad_rows = "drop"' in said
    assert f"go on with: tandem sft --resume {cut}" in said
    done = len(read_metrics(cut))
    assert 4 <= done < 8
    assert f"The state after step {done} is saved" in said
    assert "line 26" in refused(capsys, ["sft", "--resume", str(cut)])
    assert main(["sft", "--resume", str(cut), "--data.bad_rows=drop"]) == 0
    assert main([*words, f"--run.directory={whole}", "--data.bad_rows=drop"]) == 0
    assert differences(cut, whole) == []


def test_what_would_mix_two_orders_is_refused(tiny, tmp_path, capsys, ended_by_sigterm):
    words = words_of(tmp_path, "sft", tiny(), "jsonl")
    cut = tmp_path / "cut"
    ended_by_sigterm("sft", 3)
    assert main([*words, f"--run.directory={cut}"]) == 130
    capsys.readouterr()
    again = ["sft", "--resume", str(cut)]
    assert "the run was begun with 8" in refused(capsys, [*again, "--data.buffer_rows=9"])
    whole = ["--data.streaming=false", "--data.buffer_rows=10_000"]
    assert "begun with data.streaming = true" in refused(capsys, [*again, *whole])
    path = tmp_path / "data.jsonl"
    before = path.read_text()
    path.write_text(before.replace("sea", "film", 1))
    assert "has changed since the run began" in refused(capsys, again)
    path.write_text(before)
    assert main(again) == 0
