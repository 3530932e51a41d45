"""A case: a file in one of the formats, valid and then damaged, and what reads it."""

from __future__ import annotations

import csv
import io
import json
import random
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import tomli_w
from transformers import PreTrainedTokenizerBase

from fuzz.damage import NASTY_VALUES, damaged_bytes, damaged_tree
from fuzz.valid import STAGES, recipes, rows
from tandem.config import PpoConfig, PromptsSection, RewardConfig, RowsSection, SftConfig
from tandem.data.examples import as_read, read_examples, read_pairs
from tandem.data.prompts import read_prompts
from tandem.recipe import fields_of, load_config

KINDS: dict[str, Any] = {"sft": SftConfig, "reward": RewardConfig, "ppo": PpoConfig}
FORMATS = ("toml", "overrides", "jsonl", "json", "csv", "parquet")


def make(form: str, stage: str, chance: random.Random) -> bytes:
    """The bytes of a damaged file; for `overrides` the words, one a line."""
    by_structure = chance.random() < 0.5
    if form == "toml":
        text = chance.choice(recipes(stage)).read_text(encoding="utf-8")
        return _toml(text, by_structure, chance)
    if form == "overrides":
        return _words(stage, chance)
    return _data(form, rows(stage, chance), by_structure, chance)


def _toml(text: str, by_structure: bool, chance: random.Random) -> bytes:
    if by_structure:
        try:
            return tomli_w.dumps(damaged_tree(tomllib.loads(text), chance)).encode("utf-8", "surrogatepass")
        except (TypeError, ValueError, AttributeError):
            pass
    return damaged_bytes(text.encode(), chance)


def _words(stage: str, chance: random.Random) -> bytes:
    """Settings of a stage with nasty values, some of their names damaged."""
    names = [name for name, _ in fields_of(KINDS[stage])]
    words = []
    for name in chance.choices(names, k=chance.randint(1, 5)):
        value = str(chance.choice(NASTY_VALUES)).replace("\n", " ")
        shown = name if chance.random() < 0.7 else damaged_bytes(name.encode(), chance).decode("utf-8", "replace")
        words += chance.choice([[f"--{shown}={value}"], [f"--{shown}", value], [shown, value], [f"--{shown}"]])
    return "\n".join(word.replace("\n", " ") for word in words).encode("utf-8", "surrogatepass")


def _data(form: str, found: list[dict[str, Any]], by_structure: bool, chance: random.Random) -> bytes:
    write = {"jsonl": _jsonl, "json": _json, "csv": _csv, "parquet": _parquet}[form]
    if by_structure:
        try:
            return write(damaged_tree(found, chance))
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError, csv.Error, pyarrow.ArrowException):
            pass
    return damaged_bytes(write(found), chance)


def _jsonl(found: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in found).encode()


def _json(found: Any) -> bytes:
    return json.dumps(found, indent=1).encode()


def _csv(found: Any) -> bytes:
    header = list(dict.fromkeys(name for row in found for name in row))
    text = io.StringIO()
    csv.writer(text).writerows([header, *([row.get(name, "") for name in header] for row in found)])
    return text.getvalue().encode("utf-8", "surrogatepass")


def _parquet(found: Any) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), out)
    return out.getvalue()


def reader(form: str, stage: str, path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[[], object]:
    """What a stage does with the file."""
    if form == "toml":
        return lambda: load_config(KINDS[stage], path, [])
    if form == "overrides":
        words = path.read_bytes().decode("utf-8", "surrogatepass").split("\n")
        return lambda: load_config(KINDS[stage], recipes(stage)[0], words)
    if stage == "ppo":
        prompts = PromptsSection(prompts=str(path), max_prompt_tokens=10_000)
        return lambda: read_prompts(prompts, tokenizer, Counter())
    data = RowsSection(train=str(path), eval_fraction=0.0, max_tokens=10_000)
    if stage == "sft":
        return lambda: read_examples(data, tokenizer, 0)
    return lambda: read_pairs(data, tokenizer, 0, as_read)


def drawn(number: int, seed: int) -> tuple[str, str, random.Random]:
    """The format and stage of a case, and the chance that damages it: the same for the same seed."""
    chance = random.Random(f"{seed}/{number}")
    return FORMATS[number % len(FORMATS)], STAGES[number // len(FORMATS) % len(STAGES)], chance
