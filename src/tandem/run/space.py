"""Room on the disk, looked for before a run rather than missed within it."""

from __future__ import annotations

import shutil
from pathlib import Path

from tandem.errors import InputError

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def check_space(folder: Path, needed: int, what_for: str) -> None:
    """See that the file system of a folder, which need not exist yet, has room for `needed` bytes.

    Raises InputError where it has less.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(
            f"run.directory = {str(folder)!r}: its file system has {readable(free)} free, and {what_for} will take "
            f"{readable(needed)}; make room, or choose a folder on another disk."
        )


def readable(size: int) -> str:
    """A number of bytes in the unit that suits it."""
    amount, unit = float(size), _UNITS[0]
    for unit in _UNITS:
        if amount < 1024 or unit == _UNITS[-1]:
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == _UNITS[0] else f"{amount:.1f} {unit}"
