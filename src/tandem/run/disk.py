"""Writing so that a crash, a power cut or a full disk leaves something whole."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tandem.errors import RunError


def flush_to_disk(path: Path) -> None:
    """Have the file or folder on the disk before anything that is written after it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Replace a file by a new one that is on the disk before the old one goes."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    flush_to_disk(aside)
    aside.replace(path)
    flush_to_disk(path.parent)


def write_json(content: Mapping[str, Any], path: Path) -> None:
    write_whole(path, json.dumps(finite_or_none(content), indent=2, ensure_ascii=False) + "\n")


def finite_or_none(tree: Any) -> Any:
    """A tree that JSON can hold: a number that is not finite becomes null."""
    if isinstance(tree, Mapping):
        return {name: finite_or_none(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite_or_none(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


@contextmanager
def refused_by_disk() -> Iterator[None]:
    """Within it, whatever the disk does not take ends in an OSError, that of safetensors too."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises RunError where the disk does not take what is written in it."""
    try:
        with refused_by_disk():
            yield
    except OSError as error:
        raise RunError(
            f"{path} could not be written: {error.strerror}; make room, or see to it that it can be written."
        ) from error
