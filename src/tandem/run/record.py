"""What a run began with: its stage, its inputs and the versions, so that going on with anything else is noticed."""

from __future__ import annotations

import glob
import hashlib
import platform
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

import tandem
from tandem.config import CheckpointSection, ParallelSection, RunSection
from tandem.errors import InputError

_INPUTS = {"model", "baseline", "reference", "function", "train", "eval", "prompts", "eval_prompts", "rollouts"}
_WHOLE = 2**26
_EDGE = 2**20
_WHOLE_TOGETHER = 2**30
_EDGE_OF_MANY = 2**14


class Settings(Protocol):
    """Any command's configuration."""

    def model_dump(self) -> dict[str, Any]: ...


class Recipe(Settings, Protocol):
    """What any training stage's configuration says about its run."""

    @property
    def run(self) -> RunSection: ...

    @property
    def checkpoints(self) -> CheckpointSection: ...

    @property
    def parallel(self) -> ParallelSection: ...


def record_of(stage: str, config: Settings) -> dict[str, Any]:
    """What `run.json` holds; `identity` is what trackers know the run by."""
    identity = secrets.token_hex(4)
    return {
        "stage": stage,
        "identity": identity,
        "inputs": dict(_fingerprints(config.model_dump())),
        "made_with": made_with(),
    }


def made_with() -> dict[str, Any]:
    """What, besides the recipe, decides the last bit of every number."""
    return {
        "tandem": tandem.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def check_inputs(path: Path, record: Mapping[str, Any], config: Recipe) -> None:
    """Raises InputError where a model or a data file is not what the run began with."""
    for name, source in changed_inputs(record, config).items():
        raise InputError(
            f"--resume {path}: {name} = {source!r} has changed since the run began, and going on would "
            "mix two runs; put it back as it was, or start a new run."
        )


def changed_inputs(record: Mapping[str, Any], config: Recipe, *, moved: bool = False) -> dict[str, str]:
    """The models and data files whose content is not what the run began with, by their dotted names.

    Those that the recipe now takes from another place are another matter, unless they were only `moved`.
    """
    found = {}
    for name, now in _fingerprints(config.model_dump()):
        before = record["inputs"].get(name)
        same_place = before is not None and (moved or before["source"] == now["source"])
        if before is not None and same_place and before["sha256"] != now["sha256"]:
            found[name] = now["source"]
    return found


def differences(record: Mapping[str, Any]) -> list[str]:
    """What is not as it was when the run began, and lets the last bits of its numbers differ."""
    now = made_with()
    return [f"{name} {was} -> {now[name]}" for name, was in record["made_with"].items() if now.get(name) != was]


def _fingerprints(tree: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    """Every local model, data file and reward function of a configuration, by its dotted name."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for name, value in items:
        dotted = f"{prefix}{name}"
        if isinstance(value, Mapping | list):
            yield from _fingerprints(value, f"{dotted}.")
        elif name in _INPUTS and isinstance(value, str):
            path = Path(value.rpartition(":")[0] if name == "function" else value).expanduser()
            # A name without a place is the working folder to Path, which holds runs, data and much else.
            found = None if str(path) == "." else fingerprint(path)
            if found is not None:
                yield dotted, {"source": value, "sha256": found}


def fingerprint(path: Path) -> str | None:
    """SHA-256 over names, sizes and content of a file, a folder, or those that a pattern of names stands for.

    Of a file beyond 64 MiB it is the first and last MiB; of one that comes after 1 GiB of smaller ones the first and
    last 16 KiB, so that many of them take no time. None for what is no local file or cannot be read: whoever needs it
    says so.
    """
    total, left = hashlib.sha256(), _WHOLE_TOGETHER
    try:
        files = _named_files(path)
        for name, file in files:
            size = file.stat().st_size
            total.update(f"{name}:{size}:".encode())
            if size > _WHOLE:
                total.update(_edges(file, size, _EDGE))
            elif size > left:
                total.update(_edges(file, size, min(size, _EDGE_OF_MANY)))
            else:
                total.update(_all(file))
                left -= size
    except (OSError, ValueError):
        return None
    return total.hexdigest() if files else None


def _named_files(path: Path) -> list[tuple[str, Path]]:
    if path.is_dir():
        found = [(str(file.relative_to(path)), file) for file in sorted(path.rglob("*"))]
    elif path.exists():
        found = [(".", path)]
    else:
        found = [(file.name, file) for file in sorted(map(Path, glob.glob(str(path), recursive=True)))]
    return [(name, file) for name, file in found if file.is_file()]


def _all(file: Path) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def _edges(file: Path, size: int, edge: int) -> bytes:
    with file.open("rb") as content:
        first = content.read(edge)
        content.seek(size - edge)
        return hashlib.sha256(first + content.read(edge)).digest()
