"""How a run begins: anew in a free folder, or from the newest whole checkpoint of one that was cut short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.errors import InputError
from tandem.recipe import flat, read_record, read_toml, without_none
from tandem.run.checkpoints import Snapshot, newest_good, remove_partial
from tandem.run.progress import Progress
from tandem.run.record import Recipe, check_inputs, differences, record_of

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Start:
    """What `run.json` says, and the snapshot to go on from; None where the run begins at its first step."""

    record: Mapping[str, Any]
    snapshot: Snapshot | None


def start_of(path: Path, stage: str, config: Recipe, resume: bool, progress: Progress) -> Start:
    """Find where to begin.

    Raises InputError where the folder holds a run already or, to go on, where it holds none, or where a model or data
    file is not what it was.
    """
    if not resume:
        check_free(path)
        return Start(record_of(stage, config), None)
    record = read_record(path)
    check_inputs(path, record, config)
    for line in changed_settings(path, config):
        progress.say(f"changed: {line}")
    if changed := differences(record):
        progress.warn(f"not as when the run began: {', '.join(changed)}. The last bits of its numbers may differ.")
    remove_partial(path / CHECKPOINTS)
    snapshot = newest_good(path / CHECKPOINTS, progress.warn)
    if snapshot is None:
        progress.say(f"{path} holds no checkpoint yet; the run begins again.")
    else:
        progress.say(f"{path}: going on after step {snapshot.step}.")
    return Start(record, snapshot)


@dataclass(frozen=True)
class Changed:
    """A setting that is not as it was when the run was last saved; `unset` where it was or is none."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} {self.before} -> {self.now}"


def changed_settings(path: Path, config: Recipe) -> list[Changed]:
    """What the recipe says that it did not say when the run was last saved: `steps 100 -> 200`."""
    before = flat(read_toml(path / "config.toml"))
    now = flat(without_none(config.model_dump()))
    names = [name for name in {**before, **now} if name != "run.directory" and before.get(name) != now.get(name)]
    return [Changed(name, before.get(name, "unset"), now.get(name, "unset")) for name in names]


def check_planned(done: int, planned: int, setting: str) -> None:
    """Raises InputError where a run has done more steps than it is to do."""
    if done > planned:
        raise InputError(f"{done} steps are done, and {setting} makes it {planned} in all; give as many or more.")


def check_free(path: Path, whole: Path | None = None) -> None:
    """Raises InputError where a run has left metrics in the folder; one that ended before its first step has not.

    `whole` is the folder of the pipeline whose stage it would be.
    """
    metrics = path / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size > 0:
        raise InputError(
            f"{path} already holds a run; go on with it by --resume {whole or path}, or choose another folder with "
            "--run.directory."
        )
