"""What holds for any input: parsers give back what was written, and collation neither loses nor adds a token."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.config import PpoConfig, SftConfig
from tandem.data.examples import shuffled
from tandem.data.feed import InMemory
from tandem.data.prompts import shuffled_prompts
from tandem.data.rows import Row, Source, hold_out, read_rows
from tandem.errors import InputError, one_line
from tandem.recipe import load_config, parse_overrides, read_toml, without_none
from tandem.text import answered_ids, decoder, prompt_ids, taught_ids
from tandem.types import Prompt, pad_tokens, split_by_tokens, whole_texts
from tiny import make_tokenizer

TOKENIZER = make_tokenizer()
DECODE = decoder(TOKENIZER)


def any_input(*strategies: st.SearchStrategy[Any], examples: int = 60) -> Callable[[Any], Any]:
    """Run a test on inputs drawn from these strategies, without a deadline."""
    relaxed = settings(
        deadline=None, max_examples=examples, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    return lambda test: relaxed(given(*strategies)(test))


def outcome(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """What an action returns, or what it is refused with."""
    try:
        return action(), None
    except InputError as error:
        return None, str(error)


def in_a_line(value: Any) -> str:
    """A value as TOML writes it on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{in_a_line(key)} = {in_a_line(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(in_a_line, value))}]"
    return json.dumps(value, ensure_ascii=False)


whole = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
# Without what a tokenizer reads as a special token.
plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=30)
names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff"), min_size=1, max_size=8)
scalars = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | whole
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(whole, inner, max_size=3), max_leaves=8
)
toml_values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | whole,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(whole, inner, max_size=3),
    max_leaves=8,
)
ragged = st.lists(
    st.tuples(
        st.lists(st.integers(0, 99), min_size=1, max_size=9), st.lists(st.integers(0, 99), min_size=1, max_size=9)
    ),
    min_size=1,
    max_size=8,
)


@any_input(st.dictionaries(st.text("abc_", min_size=1, max_size=5), toml_values, min_size=1, max_size=4))
def test_a_recipe_reads_back_what_was_written(tmp_path: Path, tree: dict[str, Any]):
    path = tmp_path / "r.toml"
    path.write_text(tomli_w.dumps(tree), encoding="utf-8", newline="")
    assert read_toml(path) == tree


@any_input(
    st.fixed_dictionaries(
        {
            "epochs": st.floats(0.01, 100),
            "sequences_per_minibatch": st.integers(1, 10**6),
            "optimizer.lr": st.floats(1e-9, 1.0),
            "optimizer.betas": st.lists(st.floats(0, 0.99), min_size=2, max_size=2),
            "optimizer.schedule": st.sampled_from(["constant", "linear", "cosine"]),
            "data.max_tokens": st.integers(2, 10**6),
            "data.columns": st.dictionaries(st.sampled_from(["text", "prompt", "completion"]), names, max_size=3),
            "run.seed": st.integers(0, 2**32 - 1),
            "compute.trust_remote_code": st.booleans(),
        }
    ),
    examples=25,
)
def test_settings_come_back_from_the_words_that_give_them(given_settings: dict[str, Any]):
    words = [f"--{name}={in_a_line(value)}" for name, value in given_settings.items()]
    config = load_config(SftConfig, None, ["--model=m", "--data.train=t.jsonl", *words])
    for name, value in given_settings.items():
        found: Any = config
        for part in name.split("."):
            found = getattr(found, part)
        assert found == value
    assert SftConfig.model_validate(without_none(config.model_dump())) == config


@any_input(whole)
def test_any_text_is_a_value_or_the_text_itself(text: str):
    ((keys, value),) = parse_overrides([f"--a.b={text}"])
    assert keys == ["a", "b"]
    assert value == text or not isinstance(value, str) or text.strip()[:1] in ('"', "'")


@any_input(
    st.lists(st.text(max_size=12) | st.sampled_from(["--steps", "--policy.lr=1", "--rewards.0.model", "x"])),
    examples=25,
)
def test_any_words_make_a_configuration_or_one_line(words: list[str]):
    config, refusal = outcome(lambda: load_config(PpoConfig, None, words))
    assert (config is None) == bool(refusal)
    assert refusal is None or refusal == one_line(refusal)


@any_input(st.lists(st.dictionaries(whole, json_values, min_size=1, max_size=4), min_size=1, max_size=4))
def test_json_rows_come_back(tmp_path: Path, rows: list[dict[str, Any]]):
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    for name in ("a.json", "a.jsonl"):
        assert [row.columns for row in read_rows(Source(str(tmp_path / name), "data.train", "train", {}))] == rows


@any_input(names, st.lists(st.tuples(whole, whole), min_size=1, max_size=4))
def test_csv_rows_come_back(tmp_path: Path, name: str, fields: list[tuple[str, str]]):
    header = [name, f"{name}2"]
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *fields])
    found = read_rows(Source(str(tmp_path / "a.csv"), "data.train", "train", {}))
    assert [[row.columns[column] for column in header] for row in found] == [list(row) for row in fields]


@any_input(
    st.lists(st.tuples(whole, st.none() | st.integers(-9, 9), st.floats(allow_nan=False)), min_size=1, max_size=4)
)
def test_parquet_rows_come_back(tmp_path: Path, fields: list[tuple[Any, ...]]):
    rows = [dict(zip(("prompt", "n", "x"), row, strict=True)) for row in fields]
    schema = pyarrow.schema([("prompt", pyarrow.string()), ("n", pyarrow.int64()), ("x", pyarrow.float64())])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
    assert [row.columns for row in read_rows(Source(str(tmp_path / "a.parquet"), "data.train", "train", {}))] == rows


@any_input(
    json_values | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "bot"]), "content": st.text()}))
)
def test_a_field_is_text_or_its_row_is_named(value: Any):
    found, refusal = outcome(lambda: Row({"prompt": value}, "f.jsonl, line 3").text("prompt"))
    if refusal is not None:
        assert refusal.startswith("f.jsonl, line 3: ")
        assert refusal == one_line(refusal)
    elif isinstance(found, str):
        assert found == value
        assert found.strip()
    else:
        assert [dict(turn) for turn in found] == value


@any_input(st.text() | st.text(min_size=1).map(lambda text: text * 900))
def test_a_message_is_one_line_that_a_terminal_can_show(text: str):
    said = one_line(text)
    assert len(said.splitlines()) <= 1
    assert said.isprintable()
    assert len(said) <= 1200
    assert said == one_line(said)


@any_input(ragged)
def test_padding_keeps_every_token_and_adds_none(rows: list[tuple[list[int], list[int]]]):
    tokens = pad_tokens([prompt for prompt, _ in rows], [response for _, response in rows])
    assert tokens.mask.sum(1).tolist() == tokens.response_lengths.tolist() == [len(response) for _, response in rows]
    assert tokens.lengths.tolist() == [len(prompt) + len(response) for prompt, response in rows]
    for row, (prompt, response) in enumerate(rows):
        assert tokens.ids[row, : tokens.lengths[row]].tolist() == prompt + response
        assert tokens.response_ids[row][tokens.mask[row]].tolist() == response
        assert not tokens.response_ids[row][~tokens.mask[row]].any()


@any_input(ragged, st.data())
def test_selecting_rows_keeps_what_they_hold(rows: list[tuple[list[int], list[int]]], data: st.DataObject):
    tokens = pad_tokens([prompt for prompt, _ in rows], [response for _, response in rows])
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    part = tokens.select(torch.tensor(chosen))
    assert part.ids.shape[1] == int(part.lengths.max())
    for place, row in enumerate(chosen):
        assert part.ids[place, : part.lengths[place]].tolist() == rows[row][0] + rows[row][1]
        assert part.response_ids[place][part.mask[place]].tolist() == rows[row][1]


@any_input(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 200))
def test_every_row_is_in_one_group_within_the_budget(lengths: list[int], budget: int):
    groups = split_by_tokens(torch.tensor(lengths), budget)
    assert sorted(row for group in groups for row in group.tolist()) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[row] for row in group.tolist())
        assert len(group) == 1 or len(group) * longest <= budget
    assert max(lengths) == lengths[groups[0][0]]


@any_input(st.lists(st.lists(st.integers(0, 99), min_size=2, max_size=9), min_size=1, max_size=8), st.booleans())
def test_whole_texts_count_all_their_tokens(texts: list[list[int]], all_answers: bool):
    tokens = whole_texts(texts, [1] * len(texts) if all_answers else None)
    assert tokens.lengths.tolist() == [len(text) for text in texts]
    assert int(tokens.mask.sum()) == sum(len(text) - 1 if all_answers else 1 for text in texts)
    for row, text in enumerate(texts):
        assert tokens.ids[row, : len(text)].tolist() == text


@any_input(plain, plain)
def test_an_answer_follows_its_prompt_and_reads_as_it_was_written(prompt: str, answer: str):
    before = prompt_ids(TOKENIZER, prompt)
    ids, taught = taught_ids(TOKENIZER, prompt, answer)
    assert ids[: len(before)] == before
    assert taught == [False] * len(before) + [True] * (len(ids) - len(before))
    assert ids[-1] == TOKENIZER.eos_token_id
    assert DECODE(before, ids[len(before) :]) == answer
    assert TOKENIZER.decode(before) == prompt
    assert TOKENIZER.decode(answered_ids(TOKENIZER, prompt, answer)) == prompt + answer


@any_input(plain, plain)
def test_in_a_conversation_only_the_answer_is_taught(prompt: str, answer: str):
    turns = ({"role": "user", "content": prompt},)
    before = prompt_ids(TOKENIZER, turns)
    ids, taught = taught_ids(TOKENIZER, turns, answer)
    assert ids[: len(before)] == before
    assert (
        TOKENIZER.decode([token for token, is_taught in zip(ids, taught, strict=True) if is_taught]) == answer + "</s>"
    )


@any_input(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.floats(0, 1), st.integers(0, 99))
def test_held_out_keys_are_whole(keys: list[int], fraction: float, seed: int):
    items = list(enumerate(keys))

    def split() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        return hold_out(items, fraction, seed, key=lambda item: item[1])

    if fraction > 0 and len(set(keys)) == 1:
        with pytest.raises(InputError, match="cannot be split"):
            split()
        return
    train, heldout = split()
    assert sorted(train + heldout) == items
    assert not {key for _, key in train} & {key for _, key in heldout}
    assert train
    assert bool(heldout) == (fraction > 0)
    assert split() == (train, heldout)


@any_input(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(0, 99))
def test_each_pass_sees_every_item_once_and_groups_stay_together(sizes: list[int], seed: int):
    groups = [[(group, item) for item in range(size)] for group, size in enumerate(sizes)]
    order = shuffled(groups, seed)
    for _ in range(3):
        taken = list(islice(order, sum(sizes)))
        assert sorted(taken) == [item for group in groups for item in group]
        passed = [group for group, _ in groupby(taken, key=lambda item: item[0])]
        assert taken == [item for group in passed for item in groups[group]]


@any_input(st.integers(1, 12), st.integers(1, 9), st.integers(0, 99))
def test_batches_of_prompts_are_passes_in_a_row(count: int, size: int, seed: int):
    prompts = [Prompt((n,), str(n), None, {}) for n in range(count)]
    feed = InMemory(prompts, partial(shuffled_prompts, prompts, seed))
    batches = [batch for batch, _ in islice(feed.batches(size), 3 * count)]
    assert {len(batch) for batch in batches} == {size}
    taken = [prompt.ids[0] for batch in batches for prompt in batch]
    for start in range(0, len(taken) - count + 1, count):
        assert sorted(taken[start : start + count]) == list(range(count))
    later = [prompt.ids[0] for batch, _ in islice(feed.batches(size, done=2), 3 * count - 2) for prompt in batch]
    assert later == taken[2 * size :]


@any_input(st.binary(max_size=80), st.sampled_from(["p.jsonl", "p.json", "p.csv", "p.parquet"]))
def test_no_bytes_make_more_than_one_line(tmp_path: Path, content: bytes, name: str):
    (tmp_path / name).write_bytes(content)
    rows, refusal = outcome(lambda: read_rows(Source(str(tmp_path / name), "data.train", "train", {})))
    assert rows or name in (refusal or "")
    assert refusal is None or refusal == one_line(refusal)


@any_input(st.integers(0, 10**6))
def test_bytes_changed_in_a_parquet_file_make_no_more_than_one_line(tmp_path: Path, seed: int):
    chance, path = random.Random(seed), tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["the sea", None, "a film"], "n": [1, 2, 3]}), path)
    content = bytearray(path.read_bytes())
    for _ in range(chance.randint(1, 8)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    path.write_bytes(content)
    rows, refusal = outcome(lambda: read_rows(Source(str(path), "data.train", "train", {})))
    assert rows or "p.parquet" in (refusal or "")
