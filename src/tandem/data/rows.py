"""From a file or hub id to rows that know where they stand, so that a bad one can be named."""

from __future__ import annotations

import glob
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tandem.data.files import SUFFIXES, Mark, Placed, Reader, kind_of, open_files, shards, shown
from tandem.errors import BadRowError, ConversationError, InputError, RunError, reason_of
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


@dataclass(frozen=True)
class Source:
    """Where rows come from: `name` is a file, known by its suffix, a folder or a pattern for several files of a kind,
    or the id of a hub data set with its `split`.

    `key` is the configuration's name of it; `columns` renames: standard name -> name in the data.
    """

    name: str
    key: str
    split: str
    columns: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.key} = {self.name!r}"

    def open(self, mark: Mark = None, *, streaming: bool = False) -> Reader:
        """Its rows one after the other, from the mark of an earlier reader on.

        `streaming`: of a hub data set no more is downloaded than is read. Raises InputError for what cannot be read.
        """
        files = self.files()
        return open_files(files, mark) if files else _Hub(self, mark, streaming)

    def files(self) -> list[Path]:
        """The files that it is, none for a hub data set. Raises InputError where they are not there."""
        path = Path(os.path.expanduser(self.name))
        if os.path.isdir(path) or (glob.has_magic(self.name) and not os.path.exists(path)):
            return shards(path, str(self))
        if path.suffix.lower() in SUFFIXES:
            _check_file(path, str(self))
            return [path]
        if os.path.exists(path) or self.name.startswith((".", "/", "~")):
            raise InputError(
                f"{self}: give a file that ends in {', '.join(SUFFIXES)}, a folder of such files, or the id of a hub "
                "data set."
            )
        return []

    def row(self, placed: Placed) -> Row:
        """A row with its columns renamed. Raises BadRowError where it lacks one of them."""
        columns, place = placed
        if not self.columns:
            return Row(columns, place)
        renamed = dict(columns)
        for standard, given in self.columns.items():
            if given not in columns:
                have = ", ".join(map(repr, columns))
                raise BadRowError(
                    f"{place}: {self.key.rpartition('.')[0]}.columns names {given!r}, but the row has only {have}."
                )
            renamed[standard] = columns[given]
        return Row(renamed, place)


def read_rows(source: Source, *, streaming: bool = False) -> list[Row]:
    """All rows of a source. Raises InputError for what cannot be read, a row that is none, or no rows at all."""
    with source.open(streaming=streaming) as reader:
        placed = list(reader)
    if not placed:
        raise no_rows(source)
    return [source.row(one) for one in placed]


def no_rows(source: Source) -> InputError:
    return InputError(f"{source} has no rows; give a file that has some.")


def _check_file(path: Path, named: str) -> None:
    """Raises InputError where there is no file to read, with what is there instead."""
    if os.path.isfile(path):
        return
    if os.path.exists(path):
        raise InputError(f"{named} is neither a file nor a folder, and cannot be read twice; save it as a file.")
    if os.path.islink(path):
        raise InputError(f"{named} is a link to {os.readlink(path)!r}, and there is no such file; mend the link.")
    raise InputError(f"{named}: there is no such file, seen from {os.getcwd()}; mend the path.")


class _Hub(Reader):
    """A hub data set; a mark is the number of rows before it, and where the data set says that it stands."""

    def __init__(self, source: Source, mark: Mark, streaming: bool) -> None:
        import datasets

        self._source, self._number = source, 0
        try:
            self._rows = datasets.load_dataset(source.name, split=source.split, streaming=streaming)
        except Exception as error:
            raise InputError(
                f"{source}: no file of that name, and as a hub data set (split {source.split!r}) it cannot be "
                f"loaded: {reason_of(error)}. A file ends in {', '.join(SUFFIXES)}."
            ) from error
        if mark is not None:
            self._number, place = mark
            self._rows.load_state_dict(place)
        self._coming = iter(self._rows)

    def __next__(self) -> Placed:
        try:
            item = next(self._coming)
        except StopIteration:
            raise
        except Exception as error:
            raise RunError(f"{self._source}: row {self._number + 1} could not be read: {reason_of(error)}.") from error
        self._number += 1
        return dict(item), f"{self._source.name} ({self._source.split}), row {self._number}"

    def mark(self) -> Mark:
        return [self._number, self._rows.state_dict()]

    def close(self) -> None:
        if hasattr(self._coming, "close"):
            self._coming.close()


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
