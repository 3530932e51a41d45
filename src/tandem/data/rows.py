"""From a file or hub id to rows that know where they stand, so that a bad one can be named."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tandem.errors import BadRowError, InputError
from tandem.text import Text

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """A row's columns, and its place (file and line, or row number) for messages."""

    columns: Mapping[str, Any]
    place: str

    def refuse(self, problem: str) -> BadRowError:
        return BadRowError(f"{self.place}: {problem}")

    def text(self, column: str) -> Text:
        """A non-empty string or conversation. Raises InputError where it is neither."""
        value = self.columns[column]
        if isinstance(value, str):
            if not value.strip():
                raise self.refuse(f"{column!r} is empty.")
            return value
        if isinstance(value, list | tuple):
            return self._conversation(column, value)
        raise self.refuse(
            f"{column!r} is {_kind(value)}; allowed are text or a conversation (a list of role and content)."
        )

    def _conversation(self, column: str, turns: Sequence[Any]) -> Text:
        if not turns:
            raise self.refuse(f"{column!r} is an empty conversation.")
        for number, turn in enumerate(turns):
            if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
                raise self.refuse(f"turn {number} of {column!r} is {turn!r:.80}; each needs a role and a content.")
            if turn["role"] not in _ROLES:
                raise self.refuse(
                    f"turn {number} of {column!r} has the role {turn['role']!r}; allowed are {', '.join(_ROLES)}."
                )
            if not isinstance(turn["content"], str):
                raise self.refuse(f"the content of turn {number} of {column!r} is {_kind(turn['content'])}, not text.")
        return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} ({value!r:.60})"


def read_rows(source: str, key: str, split: str, columns: Mapping[str, str]) -> list[Row]:
    """All rows of a file (by its suffix) or hub id, with columns renamed: standard name -> name in the data.

    `key` is the configuration's name of the source. Raises InputError for a missing or unreadable file, a row
    that is no object, or no rows at all.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in _SUFFIXES:
        if not path.is_file():
            raise InputError(f"{key} = {source!r}: there is no such file.")
        rows = list(_read_file(path))
    elif path.exists() or source.startswith((".", "/", "~")):
        kinds = ", ".join(_SUFFIXES)
        raise InputError(f"{key} = {source!r}: give a file that ends in {kinds}, or the id of a hub data set.")
    else:
        rows = list(_read_hub(source, key, split))
    if not rows:
        raise InputError(f"{key} = {source!r} has no rows.")
    return [_renamed(row, columns, key) for row in rows]


def _renamed(row: Row, columns: Mapping[str, str], key: str) -> Row:
    if not columns:
        return row
    renamed = dict(row.columns)
    for standard, given in columns.items():
        if given not in row.columns:
            have = ", ".join(map(repr, row.columns))
            raise row.refuse(f"{key.rpartition('.')[0]}.columns names {given!r}, but the row has only {have}.")
        renamed[standard] = row.columns[given]
    return Row(renamed, row.place)


def _read_file(path: Path) -> Iterator[Row]:
    reader = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        yield from reader[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}.") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                yield _object(_json(line, place), place)


def _read_json(path: Path) -> Iterator[Row]:
    content = _json(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(content, list):
        raise InputError(f"{path}: must hold a list of objects, and holds {_kind(content)}.")
    for number, item in enumerate(content, start=1):
        place = f"{path}, item {number}"
        yield _object(item, place)


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: is not JSON: {error.msg} at column {error.colno}: {text.strip()[:60]!r}.") from None
    except RecursionError:
        raise InputError(f"{place}: is nested too deeply to be read.") from None


def _object(item: Any, place: str) -> Row:
    if not isinstance(item, dict):
        raise InputError(f"{place}: must be an object with named fields, and is {_kind(item)}.")
    return Row(item, place)


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for item in reader:
                place = f"{path}, line {reader.line_num}"
                if None in item or None in item.values():
                    raise InputError(
                        f"{place}: has not as many fields as the header, which has {len(reader.fieldnames or [])}."
                    )
                yield Row(item, place)
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: is not CSV: {error}.") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        items = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: is not a readable Parquet file: {str(error).splitlines()[0]}.") from None
    for number, item in enumerate(items, start=1):
        yield Row(item, f"{path}, row {number}")


def _read_hub(source: str, key: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(source, split=split)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise InputError(
            f"{key} = {source!r}: no file of that name, and as a hub data set (split {split!r}) it cannot be "
            f"loaded: {reason[0] if reason else type(error).__name__}"
        ) from error
    for number, item in enumerate(rows, start=1):
        yield Row(dict(item), f"{source} ({split}), row {number}")


Item = TypeVar("Item")


def hold_out(
    items: Sequence[Item], fraction: float, seed: int, key: Callable[[Item], Any]
) -> tuple[list[Item], list[Item]]:
    """Split into what trains and what is held out, at random by the seed; both keep at least one item.

    Items of the same key go the same way, and `fraction` counts keys. Raises InputError where there is one key.
    """
    if fraction == 0:
        return list(items), []
    keys = list(dict.fromkeys(key(item) for item in items))
    if len(keys) < 2:
        raise InputError(
            "rows of one prompt cannot be split into training and held-out rows; set data.eval, give more rows, or "
            "set data.eval_fraction = 0."
        )
    random.Random(seed).shuffle(keys)
    held = set(keys[: min(max(1, round(fraction * len(keys))), len(keys) - 1)])
    return [item for item in items if key(item) not in held], [item for item in items if key(item) in held]


def missing_columns(row: Row, needed: Iterable[str]) -> InputError:
    have = ", ".join(map(repr, row.columns)) or "none"
    return row.refuse(f"needs {' or '.join(needed)}, and its columns are {have}; data.columns can rename them.")
