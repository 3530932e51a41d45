"""Checkpoints on disk: complete or not there at all, verified when they are read.

A checkpoint is a folder `step_000012` with `tensors.safetensors`, `state.json` and `manifest.json`, which holds the
size and the SHA-256 of the other two. It is written aside, flushed to the disk and renamed, so that a crash at any
moment leaves the earlier ones whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.run.disk import flush_to_disk, refused_by_disk

FORMAT = 1
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class Snapshot:
    """A run between two steps: tensors by name, and what JSON can hold.

    The tensors are those that train, not copies: a snapshot is good until the next update, unless `copied`.
    """

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]

    def under(self, group: str) -> dict[str, Tensor]:
        """The tensors named `group/name`, by name."""
        prefix = f"{group}/"
        return {name.removeprefix(prefix): one for name, one in self.tensors.items() if name.startswith(prefix)}

    def copied(self) -> Self:
        """The same on tensors of its own, in main memory."""
        own = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors.items()}
        return replace(self, tensors=own)


@dataclass(frozen=True)
class Kept:
    """A checkpoint on disk, and its step."""

    path: Path
    step: int


def write_checkpoint(folder: Path, snapshot: Snapshot) -> Kept:
    """Write a checkpoint into the folder of checkpoints. Raises OSError where the disk does not take it."""
    target = folder / f"step_{snapshot.step:06d}"
    partial = folder / f".partial_{target.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with refused_by_disk():
        save_file({name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}, partial / _TENSORS)
    (partial / _STATE).write_text(json.dumps(snapshot.state), encoding="utf-8")
    files = {name: {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)} for name in _CONTENT}
    manifest = {"format": FORMAT, "step": snapshot.step, "files": files}
    (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for name in (*_CONTENT, _MANIFEST):
        flush_to_disk(partial / name)
    flush_to_disk(partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    flush_to_disk(folder)
    return Kept(target, snapshot.step)


_CONTENT = (_TENSORS, _STATE)


def newest_good(folder: Path, warn: Callable[[str], None]) -> Snapshot | None:
    """The newest checkpoint that is whole, or None where there is none.

    A damaged one is told, and set aside as `damaged_step_...`.
    """
    for path in sorted(folder.glob("step_*"), reverse=True):
        problem = damage(path)
        if problem is None:
            return read_checkpoint(path)
        aside = path.with_name(f"damaged_{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        warn(f"the checkpoint {path} is damaged ({problem}) and set aside as {aside.name}.")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None where every file is as it was written."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        files = {name: (int(manifest["files"][name]["bytes"]), manifest["files"][name]["sha256"]) for name in _CONTENT}
        known = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_MANIFEST} cannot be read: {type(error).__name__}"
    if known != FORMAT:
        return f"its format is {known!r}, and this version reads {FORMAT}"
    for name, (size, checksum) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _sha256(file) != checksum:
            return f"the checksum of {name} differs"
    return None


def kept_checkpoints(folder: Path) -> list[Kept]:
    """What is there, oldest first, by name and manifest alone; one whose manifest cannot be read is left out."""

    def found() -> Iterator[Kept]:
        for path in sorted(folder.glob("step_*")):
            try:
                manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
                yield Kept(path, int(manifest["step"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue

    return list(found())


def remove_partial(folder: Path) -> None:
    """Sweep away what a crash left half written."""
    for path in folder.glob(".partial_*"):
        shutil.rmtree(path, ignore_errors=True)


def read_checkpoint(path: Path) -> Snapshot:
    """What was written; see `damage` for whether it still is."""
    state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    return Snapshot(manifest["step"], load_file(path / _TENSORS), state)


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
