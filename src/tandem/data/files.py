"""Files in: JSONL, JSON, CSV and Parquet, each row with its place, and what is wrong with a file that is none."""

from __future__ import annotations

import csv
import json
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tandem.errors import InputError, reason_of

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_LONGEST_CSV_FIELD = 2**31 - 1
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


def read_file(path: Path) -> Iterator[Placed]:
    """The columns of each row, and where it stands; the file's suffix says how it is read.

    Raises InputError where the file cannot be read, or a row is no object.
    """
    reader = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        yield from reader[path.suffix.lower()](path)
    except UnicodeDecodeError:
        raise InputError(_not_text(path)) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or reason_of(error)}; give another file.") from error


def _not_text(path: Path) -> str:
    """Where a file ceases to be UTF-8, and what it may be."""
    content = path.read_bytes()
    for start, kind in _OTHER_KINDS.items():
        if content.startswith(start):
            return f"{path}: is not UTF-8 text; it begins as {kind}."
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            found = line[error.start : error.start + 1].hex()
            return f"{path}, line {number}: is not UTF-8 text (byte {error.start} is {found}); save the file as UTF-8."
    return f"{path}: holds text that is not UTF-8; save it as UTF-8."


def _read_jsonl(path: Path) -> Iterator[Placed]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                whole = number == 1 and line.lstrip().startswith("[")
                hint = " If the file is one list of rows, let its name end in .json." if whole else ""
                yield _object(_json(line, place, hint), place, hint)


def _read_json(path: Path) -> Iterator[Placed]:
    hint = " If each line is a row, let the file's name end in .jsonl."
    content = _json(path.read_text(encoding="utf-8-sig"), str(path), hint)
    if not isinstance(content, list):
        raise InputError(f"{path}: must hold a list of objects, and holds {kind_of(content)}.{hint}")
    for number, item in enumerate(content, start=1):
        place = f"{path}, item {number}"
        yield _object(item, place)


def _json(text: str, place: str, hint: str = "") -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_doubles)
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 20) : error.pos + 40].strip()
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise InputError(
            f"{place}: is not JSON: {error.msg} at {line}column {error.colno}, near {near!r}.{hint}"
        ) from None
    except RecursionError:
        raise InputError(f"{place}: is nested too deeply to be read; a row is a flat object.") from None
    except ValueError as error:
        raise InputError(f"{place}: cannot be read as JSON: {reason_of(error)}.") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {shown(twice)} stands twice in one object; keep one")
    return found


def _object(item: Any, place: str, hint: str = "") -> Placed:
    if not isinstance(item, dict):
        raise InputError(f"{place}: must be an object with named fields, and is {kind_of(item)}.{hint}")
    return item, place


def _read_csv(path: Path) -> Iterator[Placed]:
    csv.field_size_limit(_LONGEST_CSV_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            header = list(reader.fieldnames or [])
            _check_names(header, f"{path}, line {reader.line_num}")
            for item in reader:
                place = f"{path}, line {reader.line_num}"
                if None in item or None in item.values():
                    raise InputError(
                        f"{place}: has not as many fields as the header, which has {len(header)} "
                        f"({', '.join(map(shown, header))}); quote a field that holds a comma or a line break."
                    )
                yield item, place
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: is not CSV: {error}.") from None


def _check_names(names: list[str], place: str) -> None:
    """Raises InputError where two columns have one name, so that one of them would be lost."""
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise InputError(f"{place}: two columns are named {shown(twice[0])}; rename or remove one.")


def _read_parquet(path: Path) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        _check_names(pyarrow.parquet.read_schema(path).names, str(path))
        items = pyarrow.parquet.read_table(path, partitioning=None).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OverflowError, ValueError) as error:
        raise InputError(
            f"{path}: is not a readable Parquet file: {reason_of(error)}. Was it written and copied whole?"
        ) from None
    for number, item in enumerate(items, start=1):
        yield item, f"{path}, row {number}"
