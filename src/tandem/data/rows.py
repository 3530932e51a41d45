"""From a file or hub id to rows that know where they stand, so that a bad one can be named."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tandem.data.files import SUFFIXES, kind_of, read_file, shown
from tandem.errors import BadRowError, ConversationError, InputError, reason_of
from tandem.text import Text

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """A row's columns, and its place (file and line, or row number) for messages."""

    columns: Mapping[str, Any]
    place: str

    def refuse(self, problem: str) -> BadRowError:
        return BadRowError(f"{self.place}: {problem}")

    @contextmanager
    def named(self) -> Iterator[None]:
        """Within it, an error that does not know of rows says which one it met."""
        try:
            yield
        except BadRowError:
            raise
        except ConversationError as error:
            raise self.refuse(str(error)) from error
        except InputError as error:
            raise InputError(f"{self.place}: {error}") from error

    def text(self, column: str) -> Text:
        """A non-empty string or conversation. Raises InputError where it is neither."""
        value = self.columns[column]
        if isinstance(value, str):
            if not value.strip():
                raise self.refuse(f"{column!r} is empty; allowed are text or a conversation.")
            return self._whole(value, repr(column))
        if isinstance(value, list | tuple):
            return self._conversation(column, value)
        raise self.refuse(
            f"{column!r} is {kind_of(value)}; allowed are text or a conversation (a list of role and content)."
        )

    def _conversation(self, column: str, turns: Sequence[Any]) -> Text:
        if not turns:
            raise self.refuse(f"{column!r} is an empty conversation; it needs a turn with a role and a content.")
        return tuple(self._turn(turn, f"turn {number} of {column!r}") for number, turn in enumerate(turns))

    def _turn(self, turn: Any, name: str) -> dict[str, str]:
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise self.refuse(f"{name} is {kind_of(turn)}; each needs a role and a content.")
        role, content = turn["role"], turn["content"]
        if role not in _ROLES:
            raise self.refuse(f"{name} has the role {shown(role)}; allowed are {', '.join(_ROLES)}.")
        if not isinstance(content, str):
            raise self.refuse(f"the content of {name} is {kind_of(content)}, not text; give it as one text.")
        return {"role": role, "content": self._whole(content, f"the content of {name}")}

    def _whole(self, text: str, name: str) -> str:
        """The text, which must be one that UTF-8 can hold: JSON can spell halves of characters that it cannot."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.refuse(
                f"{name} holds half a character ({text[error.start]!r}, at character {error.start}), which is no text; "
                "write the character whole, or take it out."
            ) from None
        return text


def read_rows(source: str, key: str, split: str, columns: Mapping[str, str]) -> list[Row]:
    """All rows of a file (by its suffix) or hub id, with columns renamed: standard name -> name in the data.

    `key` is the configuration's name of the source. Raises InputError for a missing or unreadable file, a row
    that is no object, or no rows at all.
    """
    path = Path(os.path.expanduser(source))
    if path.suffix.lower() in SUFFIXES:
        _check_file(path, f"{key} = {source!r}")
        rows = [Row(columns, place) for columns, place in read_file(path)]
    elif os.path.exists(path) or source.startswith((".", "/", "~")):
        kinds = ", ".join(SUFFIXES)
        raise InputError(f"{key} = {source!r}: give a file that ends in {kinds}, or the id of a hub data set.")
    else:
        rows = list(_read_hub(source, key, split))
    if not rows:
        raise InputError(f"{key} = {source!r} has no rows; give a file that has some.")
    return [_renamed(row, columns, key) for row in rows]


def _check_file(path: Path, named: str) -> None:
    """Raises InputError where there is no file to read, with what is there instead."""
    if os.path.isfile(path):
        return
    if os.path.isdir(path):
        raise InputError(f"{named} is a folder; give one file of it.")
    if os.path.exists(path):
        raise InputError(f"{named} is neither a file nor a folder, and cannot be read twice; save it as a file.")
    if os.path.islink(path):
        raise InputError(f"{named} is a link to {os.readlink(path)!r}, and there is no such file; mend the link.")
    raise InputError(f"{named}: there is no such file, seen from {os.getcwd()}; mend the path.")


def _renamed(row: Row, columns: Mapping[str, str], key: str) -> Row:
    if not columns:
        return row
    renamed = dict(row.columns)
    for standard, given in columns.items():
        if given not in row.columns:
            have = ", ".join(map(repr, row.columns))
            raise InputError(
                f"{row.place}: {key.rpartition('.')[0]}.columns names {given!r}, but the row has only {have}."
            )
        renamed[standard] = row.columns[given]
    return Row(renamed, row.place)


def _read_hub(source: str, key: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(source, split=split)
    except Exception as error:
        raise InputError(
            f"{key} = {source!r}: no file of that name, and as a hub data set (split {split!r}) it cannot be "
            f"loaded: {reason_of(error)}. A file ends in {', '.join(SUFFIXES)}."
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
            "data.train: rows of one prompt cannot be split into training and held-out rows; set data.eval, give more "
            "rows, or set data.eval_fraction = 0."
        )
    random.Random(seed).shuffle(keys)
    held = set(keys[: min(max(1, round(fraction * len(keys))), len(keys) - 1)])
    return [item for item in items if key(item) not in held], [item for item in items if key(item) in held]


def missing_columns(row: Row, needed: Iterable[str]) -> InputError:
    have = ", ".join(map(repr, row.columns)) or "none"
    return row.refuse(f"needs {' or '.join(needed)}, and its columns are {have}; data.columns can rename them.")
