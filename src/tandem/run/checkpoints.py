"""Checkpoints on disk: complete or not there at all, verified when they are read.

A checkpoint is a folder `step_000012` with the tensors, `state.json` and `manifest.json`, which holds the size and the
SHA-256 of every other file. It is written aside, flushed to the disk and renamed, so that a crash at any moment leaves
the earlier ones whole.

One process writes its tensors as `tensors.safetensors`. Several that train together write the folder `tensors`, a
distributed checkpoint of torch's, to which each adds the parts that it holds. Either is read by any number of
processes, one tensor at a time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed.checkpoint as distributed
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tandem.run.disk import flush_to_disk, refused_by_disk
from tandem.world import world

FORMAT = 1
_TENSORS, _PARTS, _STATE, _MANIFEST = "tensors.safetensors", "tensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class Snapshot:
    """A run between two steps: tensors by name, and what JSON can hold.

    The tensors are those that train, not copies: a snapshot is good until the next update, unless `copied`.
    """

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]

    def under(self, group: str) -> Mapping[str, Tensor]:
        """The tensors named `group/name`, by name."""
        return Group(self.tensors, f"{group}/")

    def copied(self) -> Self:
        """The same on tensors of its own, in main memory."""
        own = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors.items()}
        return replace(self, tensors=own)


@dataclass(frozen=True)
class Group(Mapping[str, Tensor]):
    """Those of many tensors whose names begin alike, by the rest of their names."""

    tensors: Mapping[str, Tensor]
    prefix: str

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.tensors if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Saved(Mapping[str, Tensor]):
    """The tensors of a checkpoint, each read when it is asked for: no more than one need be in memory."""

    path: Path

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if not self._in_parts:
            with safe_open(self.path / _TENSORS, "pt") as file:
                return file.get_tensor(name)
        shape, dtype = self._names[name]
        whole = {name: torch.empty(shape, dtype=dtype)}
        with quiet_when_alone():
            distributed.load(whole, checkpoint_id=self.path / _PARTS, no_dist=True)
        return whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def _in_parts(self) -> bool:
        return (self.path / _PARTS).is_dir()

    @cached_property
    def _names(self) -> Mapping[str, Any]:
        """The names, with shape and type where the tensors are in parts."""
        if not self._in_parts:
            with safe_open(self.path / _TENSORS, "pt") as file:
                return dict.fromkeys(file.keys())
        known = distributed.FileSystemReader(self.path / _PARTS).read_metadata().state_dict_metadata
        return {
            name: (one.size, one.properties.dtype)
            for name, one in known.items()
            if isinstance(one, TensorStorageMetadata)
        }


@contextmanager
def quiet_when_alone() -> Iterator[None]:
    """Within it torch does not remark that it reads without other processes, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@dataclass(frozen=True)
class Kept:
    """A checkpoint on disk, and its step."""

    path: Path
    step: int


def write_checkpoint(folder: Path, snapshot: Snapshot) -> Kept:
    """Write a checkpoint into the folder of checkpoints. Raises OSError where the disk does not take it.

    Processes that train together write it together: all of them must call this.
    """
    target = folder / f"step_{snapshot.step:06d}"
    partial = folder / f".partial_{target.name}"
    world().from_first(lambda: _empty(partial))
    if world().alone:
        with refused_by_disk():
            save_file({name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}, partial / _TENSORS)
    else:
        _write_parts(snapshot.tensors, partial / _PARTS)
    world().from_first(lambda: _finish(partial, target, snapshot))
    return Kept(target, snapshot.step)


def _empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_parts(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Each process writes what it holds; a tensor that all hold whole is written by one of them."""
    try:
        distributed.save(dict(tensors), checkpoint_id=folder)
    except CheckpointException as error:
        refused = next((one for one, _ in error.failures.values() if isinstance(one, OSError)), None)
        if refused is None:
            raise
        raise OSError(refused.errno or errno.EIO, refused.strerror or str(refused)) from error


def _finish(partial: Path, target: Path, snapshot: Snapshot) -> None:
    """State and manifest, all of it on the disk, and the name by which it is found."""
    (partial / _STATE).write_text(json.dumps(snapshot.state), encoding="utf-8")
    written = sorted(file for file in partial.rglob("*") if file.is_file())
    files = {
        str(file.relative_to(partial)): {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in written
    }
    manifest = {"format": FORMAT, "step": snapshot.step, "files": files}
    (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in (*written, partial / _MANIFEST, *{file.parent for file in written}, partial):
        flush_to_disk(path)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    flush_to_disk(target.parent)


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
        files = {name: (int(file["bytes"]), file["sha256"]) for name, file in manifest["files"].items()}
        known = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_MANIFEST} cannot be read: {type(error).__name__}"
    if known != FORMAT:
        return f"its format is {known!r}, and this version reads {FORMAT}"
    for name in (_STATE, _TENSORS if _TENSORS in files else f"{_PARTS}/.metadata"):
        if name not in files:
            return f"{_MANIFEST} does not list {name}"
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
    return Snapshot(manifest["step"], Saved(path), state)


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
