"""How a run begins: anew in a free folder, or from the newest whole checkpoint of one that was cut short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tandem.errors import InputError
from tandem.run.checkpoints import Snapshot, newest_good, remove_partial
from tandem.run.progress import Progress
from tandem.run.record import check_inputs, differences, read_record, record_of

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Start:
    """What `run.json` says, and the snapshot to go on from; None where the run begins at its first step."""

    record: Mapping[str, Any]
    snapshot: Snapshot | None


def start_of(path: Path, stage: str, config: BaseModel, resume: bool, progress: Progress) -> Start:
    """Find where to begin.

    Raises InputError where the folder holds a run already or, to go on, where it holds none, or where a model or data
    file is not what it was.
    """
    if not resume:
        check_free(path)
        return Start(record_of(stage, config), None)
    record = read_record(path)
    check_inputs(path, record, config)
    if changed := differences(record):
        progress.warn(f"not as when the run began: {', '.join(changed)}. The last bits of its numbers may differ.")
    remove_partial(path / CHECKPOINTS)
    snapshot = newest_good(path / CHECKPOINTS, progress.warn)
    if snapshot is None:
        progress.say(f"{path} holds no checkpoint yet; the run begins again.")
    else:
        progress.say(f"{path}: going on after step {snapshot.step}.")
    return Start(record, snapshot)


def check_free(path: Path) -> None:
    """Raises InputError where a run has left metrics in the folder; one that ended before its first step has not."""
    metrics = path / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size > 0:
        raise InputError(
            f"{path} already holds a run; go on with it by --resume {path}, or choose another folder with "
            "--run.directory."
        )
