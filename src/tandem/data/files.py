"""Files in: JSONL, JSON, CSV and Parquet, each row with its place, and what is wrong with a file that is none."""

from __future__ import annotations

import csv
import glob
import json
import os
import reprlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tandem.errors import BadRowError, InputError, reason_of

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_LONGEST_CSV_FIELD = 2**31 - 1
_ROWS_AT_A_TIME = 1024
# By their first bytes; the longer of two that begin alike stands first.
_OTHER_KINDS = {
    b"\x1f\x8b": "gzip: decompress it",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "zstandard: decompress it",
    b"BZh": "bzip2: decompress it",
    b"\xfd7zXZ": "xz: decompress it",
    b"PAR1": "Parquet: let its name end in .parquet",
    b"\xff\xfe\x00\x00": "UTF-32: save it as UTF-8",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
}
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 60
_BRIEF.maxlevel = 3

Placed = tuple[Mapping[str, Any], str]


def shown(value: Any) -> str:
    """A value for a message, however large or deep it is."""
    try:
        return _BRIEF.repr(value)
    except (ValueError, RecursionError):
        return "a value too large to show"


def kind_of(value: Any) -> str:
    """A value with its type, in JSON's word where that has one."""
    return "null" if value is None else f"{type(value).__name__} ({shown(value)})"


Mark = Any
"""Where a row begins, as JSON can hold it."""


class Reader(ABC):
    """The rows of a source one after the other, each with its place, from the first or from a mark on.

    After a BadRowError the next row can be asked for all the same.
    """

    @abstractmethod
    def __next__(self) -> Placed: ...

    @abstractmethod
    def mark(self) -> Mark:
        """Where the row begins that comes next."""

    @abstractmethod
    def close(self) -> None: ...

    def __iter__(self) -> Iterator[Placed]:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def shards(path: Path, named: str) -> list[Path]:
    """The files that a folder stands for, or a pattern of names (`*`, `**`, `?`, `[...]`), in the order of their names.

    `named` is what a message calls them. Raises InputError where there is none that can be read, or they are of several
    kinds.
    """
    in_folder = path.is_dir()
    with _told(path):
        found = path.iterdir() if in_folder else map(Path, glob.glob(str(path), recursive=True))
        files = sorted(one for one in found if one.suffix.lower() in SUFFIXES and one.is_file())
    if not files:
        place = "in that folder" if in_folder else f"of such a name, seen from {os.getcwd()}"
        raise InputError(f"{named}: there is no file {place} that ends in {', '.join(SUFFIXES)}; mend the path.")
    kinds = sorted({one.suffix.lower() for one in files})
    if len(kinds) > 1:
        narrower = (path if in_folder else path.parent) / f"*{kinds[0]}"
        raise InputError(
            f"{named} stands for files of several kinds ({', '.join(kinds)}); give those of one, such as {narrower}."
        )
    return files


def open_files(paths: Sequence[Path], mark: Mark = None) -> Reader:
    """The rows of files one after the other, as `open_file` reads each, from the mark of an earlier reader on."""
    return open_file(paths[0], mark) if len(paths) == 1 else _Files(paths, mark)


class _Files(Reader):
    """A mark is the number of files before the one at hand, and that one's mark."""

    def __init__(self, paths: Sequence[Path], mark: Mark) -> None:
        self._paths = paths
        self._number: int = 0 if mark is None else mark[0]
        within = None if mark is None else mark[1]
        self._reader = open_file(paths[self._number], within)

    def __next__(self) -> Placed:
        while True:
            try:
                return next(self._reader)
            except StopIteration:
                if self._number + 1 == len(self._paths):
                    raise
            self._reader.close()
            self._number += 1
            self._reader = open_file(self._paths[self._number])

    def mark(self) -> Mark:
        return [self._number, self._reader.mark()]

    def close(self) -> None:
        self._reader.close()


def open_file(path: Path, mark: Mark = None) -> Reader:
    """The rows of a file, whose suffix says how it is read, from the mark of an earlier reader on.

    Raises InputError where the file cannot be read; its rows raise it too, and BadRowError where one is no row.
    """
    readers: Mapping[str, Callable[[Path, Mark], Reader]] = {
        ".jsonl": _Jsonl,
        ".json": _Json,
        ".csv": _Csv,
        ".parquet": _Parquet,
    }
    with _told(path):
        return readers[path.suffix.lower()](path, mark)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Within it, what keeps a file from being read becomes one message."""
    try:
        yield
    except UnicodeDecodeError:
        raise InputError(_not_text(path)) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or reason_of(error)}; give another file.") from error


class _FileReader(Reader):
    """A reader of a file, by `_next`, which gives None at its end."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @abstractmethod
    def _next(self) -> Placed | None: ...

    def __next__(self) -> Placed:
        with _told(self._path):
            found = self._next()
        if found is None:
            raise StopIteration
        return found


def _not_text(path: Path) -> str:
    """Where a file ceases to be UTF-8, and what it may be."""
    if (other := _other_kind(path)) is not None:
        return other
    with path.open("rb") as content:
        for number, line in enumerate(content, start=1):
            if (problem := _not_utf8(line)) is not None:
                return f"{path}, line {number}: {problem}"
    return f"{path}: holds text that is not UTF-8; save it as UTF-8."


def _other_kind(path: Path) -> str | None:
    """What a file is that begins as no text does."""
    with path.open("rb") as content:
        first = content.read(max(map(len, _OTHER_KINDS)))
    kind = next((kind for start, kind in _OTHER_KINDS.items() if first.startswith(start)), None)
    return None if kind is None else f"{path}: is not UTF-8 text; it begins as {kind}."


def _not_utf8(line: bytes) -> str | None:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = line[error.start : error.start + 1].hex()
        return f"is not UTF-8 text (byte {error.start} is {found}); save the file as UTF-8."
    return None


class _Jsonl(_FileReader):
    """A mark is the number of lines before it, and where the text stands (for most files, the byte)."""

    def __init__(self, path: Path, mark: Mark) -> None:
        super().__init__(path)
        if (other := _other_kind(path)) is not None:
            raise InputError(other)
        # Bytes that are no text are kept as such, so that they spoil one line and not all that follow.
        self._lines, self._number = path.open(encoding="utf-8-sig", errors="surrogateescape"), 0
        if mark is not None:
            self._number, place = mark
            self._lines.seek(place)

    def _next(self) -> Placed | None:
        # An iteration over the lines would forbid to ask for the place.
        while line := self._lines.readline():
            self._number += 1
            if line.strip():
                place = f"{self._path}, line {self._number}"
                if (problem := _not_utf8(line.encode("utf-8", "surrogateescape"))) is not None:
                    raise BadRowError(f"{place}: {problem}")
                whole = self._number == 1 and line.lstrip().startswith("[")
                hint = " If the file is one list of rows, let its name end in .json." if whole else ""
                return _object(_json(line, place, hint), place, hint)
        return None

    def mark(self) -> Mark:
        return [self._number, self._lines.tell()]

    def close(self) -> None:
        self._lines.close()


class _Json(_FileReader):
    """The whole list is in memory; a mark is the number of items before it."""

    def __init__(self, path: Path, mark: Mark) -> None:
        super().__init__(path)
        hint = " If each line is a row, let the file's name end in .jsonl."
        content = _json(path.read_text(encoding="utf-8-sig"), str(path), hint)
        if not isinstance(content, list):
            raise InputError(f"{path}: must hold a list of objects, and holds {kind_of(content)}.{hint}")
        self._items, self._number = content, mark or 0

    def _next(self) -> Placed | None:
        if self._number == len(self._items):
            return None
        self._number += 1
        return _object(self._items[self._number - 1], f"{self._path}, item {self._number}")

    def mark(self) -> Mark:
        return self._number

    def close(self) -> None:
        self._items = []


def _json(text: str, place: str, hint: str = "") -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_doubles)
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 20) : error.pos + 40].strip()
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise BadRowError(
            f"{place}: is not JSON: {error.msg} at {line}column {error.colno}, near {near!r}.{hint}"
        ) from None
    except RecursionError:
        raise BadRowError(f"{place}: is nested too deeply to be read; a row is a flat object.") from None
    except ValueError as error:
        raise BadRowError(f"{place}: cannot be read as JSON: {reason_of(error)}.") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {shown(twice)} stands twice in one object; keep one")
    return found


def _object(item: Any, place: str, hint: str = "") -> Placed:
    if not isinstance(item, dict):
        raise BadRowError(f"{place}: must be an object with named fields, and is {kind_of(item)}.{hint}")
    return item, place


class _Csv(_FileReader):
    """A mark is the number of lines before it, and where the text stands."""

    def __init__(self, path: Path, mark: Mark) -> None:
        super().__init__(path)
        csv.field_size_limit(_LONGEST_CSV_FIELD)
        self._lines, self._before = path.open(encoding="utf-8-sig", newline=""), 0
        self._rows = self._reader()
        try:
            self._header = list(self._rows.fieldnames or [])
        except csv.Error as error:
            raise self._no_csv(error) from None
        _check_names(self._header, f"{path}, line {self._line}")
        if mark is not None:
            self._before, place = mark
            self._lines.seek(place)
            self._rows = self._reader(self._header)

    def _reader(self, names: list[str] | None = None) -> csv.DictReader[str]:
        # An iteration over the lines would forbid to ask for the place.
        return csv.DictReader(iter(self._lines.readline, ""), names, strict=True)

    @property
    def _line(self) -> int:
        return self._before + self._rows.line_num

    def _no_csv(self, error: csv.Error) -> InputError:
        return InputError(f"{self._path}, line {self._line}: is not CSV: {error}.")

    def _next(self) -> Placed | None:
        try:
            item = next(self._rows, None)
        except csv.Error as error:
            raise self._no_csv(error) from None
        if item is None:
            return None
        place = f"{self._path}, line {self._line}"
        if None in item or None in item.values():
            raise BadRowError(
                f"{place}: has not as many fields as the header, which has {len(self._header)} "
                f"({', '.join(map(shown, self._header))}); quote a field that holds a comma or a line break."
            )
        return item, place

    def mark(self) -> Mark:
        return [self._line, self._lines.tell()]

    def close(self) -> None:
        self._lines.close()


def _check_names(names: list[str], place: str) -> None:
    """Raises InputError where two columns have one name, so that one of them would be lost."""
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise InputError(f"{place}: two columns are named {shown(twice[0])}; rename or remove one.")


class _Parquet(_FileReader):
    """A row group at a time; a mark is the number of rows before it."""

    def __init__(self, path: Path, mark: Mark) -> None:
        import pyarrow.parquet

        super().__init__(path)
        self._number: int = mark or 0
        with self._readable():
            self._file = pyarrow.parquet.ParquetFile(path)
            _check_names(self._file.schema_arrow.names, str(path))
        self._rows = self._rows_from(self._number)

    def _rows_from(self, number: int) -> Iterator[Mapping[str, Any]]:
        metadata = self._file.metadata
        ends = list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))
        first = bisect_right(ends, number)
        before = ends[first - 1] if first else 0
        # Asked for all groups at once, pyarrow keeps what it has read of the earlier ones.
        batches = (
            batch for group in range(first, len(ends)) for batch in self._file.iter_batches(_ROWS_AT_A_TIME, [group])
        )
        return islice((row for batch in batches for row in batch.to_pylist()), number - before, None)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, UnicodeDecodeError, OverflowError, ValueError) as error:
            raise InputError(
                f"{self._path}: is not a readable Parquet file: {reason_of(error)}. Was it written and copied whole?"
            ) from None

    def _next(self) -> Placed | None:
        with self._readable():
            item = next(self._rows, None)
        if item is None:
            return None
        self._number += 1
        return item, f"{self._path}, row {self._number}"

    def mark(self) -> Mark:
        return self._number

    def close(self) -> None:
        self._file.close()
