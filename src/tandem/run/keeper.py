"""When a run's state is saved, what of it is kept, and what there is to go back to."""

from __future__ import annotations

import errno
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from tandem.config import CheckpointSection
from tandem.errors import InputError, Interrupted, RunError
from tandem.recipe import command_to_resume
from tandem.run.checkpoints import Kept, Snapshot, damage, kept_checkpoints, read_checkpoint, write_checkpoint
from tandem.run.signals import Terminated
from tandem.run.space import check_space
from tandem.world import world

SLOW_UPDATE_SECONDS = 10.0


class Keeper:
    """Saves snapshots of a run when they are due, in a thread of its own, and removes those that are too many.

    `sync` puts on disk whatever else must be there before a checkpoint is, so that no power cut can leave a checkpoint
    that is ahead of the run's metrics. Several processes that train together write a checkpoint together, each its own
    part, while they wait; and after an error of one of them there is only the last one.
    """

    def __init__(self, folder: Path, settings: CheckpointSection, sync: Callable[[], None]) -> None:
        self._folder, self._settings, self._sync = folder, settings, sync
        self._kept = world().from_first(lambda: kept_checkpoints(folder))
        measured = folder.parent / "metrics.jsonl"
        self._measured = world().from_first(lambda: measured_so_far(measured, settings.best_metric))
        self._saved_at, self._saved_step = time.monotonic(), self._kept[-1].step if self._kept else 0
        self._marked: Snapshot | None = None
        self._update_seconds = float("inf")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Kept] | None = None

    def boundary(self, snapshot: Snapshot, metrics: Mapping[str, float]) -> None:
        """Between two steps: remember the state to go back to, and save it where that is due.

        Raises RunError where the disk does not take a checkpoint.
        """
        self._marked = snapshot
        best = self._if_best(snapshot.step, metrics)
        if snapshot.step > self._saved_step and (best is not None or self._due(snapshot.step)):
            self._save(snapshot)

    def mark(self, snapshot: Snapshot) -> None:
        """Remember a state to go back to."""
        self._marked = snapshot

    @contextmanager
    def updating(self) -> Iterator[None]:
        """While weights change there is nothing to go back to but the last checkpoint, or a copy.

        A copy is made where the update may outlast the time that a SIGTERM leaves, as far as the last one tells.
        """
        slow = self._update_seconds > SLOW_UPDATE_SECONDS and self._settings.spare_copy
        self._marked = self._marked.copied() if self._marked is not None and slow else None
        began = time.monotonic()
        yield
        self._update_seconds = time.monotonic() - began

    @contextmanager
    def safe(self, stage: str) -> Iterator[None]:
        """Whatever ends the run in it, the state to go back to is saved first, and the person is told.

        Raises Interrupted for SIGTERM; an error goes on its way, a RunError with how to go on, and so an InputError
        that steps were done before.
        """
        try:
            yield
        except Terminated:
            self.save_marked()
            raise Interrupted(f"ended by SIGTERM. {self._way_back(stage)}") from None
        except RunError as error:
            self._save_after_error()
            raise RunError(f"{error} {self._way_back(stage)}") from error
        except InputError as error:
            if self._marked is None or self._marked.step == 0:
                raise
            self._save_after_error()
            raise InputError(f"{error} {self._way_back(stage)}") from error
        except Exception:
            self._save_after_error()
            raise

    def _save_after_error(self) -> None:
        if world().alone:
            with suppress(RunError):
                self.save_marked()

    def _way_back(self, stage: str) -> str:
        again = command_to_resume(stage, self._folder.parent)
        if self._saved_step == 0:
            return f"No step is saved yet; begin again with: {again}"
        return f"The state after step {self._saved_step} is saved; go on with: {again}"

    def save_marked(self) -> None:
        """Save the state to go back to, if there is one, and wait until it is on disk.

        Raises RunError where the disk does not take it.
        """
        if self._marked is not None and self._marked.step > self._saved_step:
            self._save(self._marked)
        self.wait()

    def wait(self) -> None:
        """Until everything that was saved is on disk. Raises RunError where it could not be written."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            self._kept = [*(one for one in self._kept if one.path.exists()), writing.result()]
        except OSError as error:
            failed, self._saved_step = self._saved_step, self._kept[-1].step if self._kept else 0
            shutil.rmtree(self._folder / f".partial_step_{failed:06d}", ignore_errors=True)
            raise RunError(
                f"the checkpoint of step {failed} could not be written to {self._folder}: {error.strerror}; "
                f"{_remedy(error)}."
            ) from error
        self._prune()

    def close(self) -> None:
        """Let the writing thread end."""
        self._writer.shutdown()

    def check_space(self, snapshot: Snapshot) -> None:
        """Raises InputError where the disk has no room for the checkpoints that the run will write."""
        copies = self._settings.keep + 1 + (self._settings.best_metric is not None)
        # An optimiser that has not stepped has no moments yet; AdamW has two for each weight.
        weights = sum(tensor.nbytes for name, tensor in snapshot.tensors.items() if name.endswith(".weight"))
        there = sum(_bytes(one.path) for one in self._kept)
        needed = 3 * weights * copies - there
        world().from_first(lambda: check_space(self._folder.parent, needed, f"{copies} checkpoints at a time"))

    def _due(self, step: int) -> bool:
        every = self._settings.every_steps
        waited = world().from_first(lambda: time.monotonic() - self._saved_at)
        return (every is not None and step % every == 0) or waited >= 60 * self._settings.every_minutes

    @property
    def best_step(self) -> int | None:
        """The first step at which the best value of the metric that counts was measured."""
        pick = max if self._settings.best_is == "highest" else min
        return pick(self._measured, key=lambda step: self._measured[step]) if self._measured else None

    @property
    def out_of_patience(self) -> bool:
        """Whether so many evaluations in a row failed to better the best one that training should end."""
        best, patience = self.best_step, self._settings.patience
        return patience is not None and best is not None and sum(step > best for step in self._measured) >= patience

    def best_snapshot(self) -> Snapshot:
        """The checkpoint of the best step. Raises RunError where it is damaged."""
        self.wait()
        path = self._folder / f"step_{self.best_step or 0:06d}"
        if (problem := world().from_first(lambda: damage(path))) is not None:
            raise RunError(f"the best checkpoint {path} is damaged ({problem}).")
        return read_checkpoint(path)

    def _if_best(self, step: int, metrics: Mapping[str, float]) -> float | None:
        """The metric that counts, where it was measured now and is better than ever.

        Raises InputError where no metric of that name is measured.
        """
        name = self._settings.best_metric
        if name is None or not metrics:
            return None
        evaluated = any(key.startswith("heldout/") for key in metrics)
        if name not in metrics and (evaluated or not name.startswith("heldout/")):
            known = ", ".join(key for key in metrics if not key.startswith(("time/", "calibration/")))
            raise InputError(f"checkpoints.best_metric = {name!r} is no metric of this run; those are {known}.")
        value = metrics.get(name, math.nan)
        if not math.isfinite(value):
            return None
        self._measured[step] = value
        return value if self.best_step == step else None

    def _save(self, snapshot: Snapshot) -> None:
        self.wait()
        self._saved_at, self._saved_step = time.monotonic(), snapshot.step
        if world().alone:
            self._writing = self._writer.submit(self._write, snapshot.copied())
            return
        self._writing = Future()
        try:
            self._writing.set_result(self._write(snapshot))
        except OSError as error:
            self._writing.set_exception(error)

    def _write(self, snapshot: Snapshot) -> Kept:
        if world().first:
            self._folder.mkdir(exist_ok=True)
        self._sync()
        return write_checkpoint(self._folder, snapshot)

    def _prune(self) -> None:
        newest = sorted(self._kept, key=lambda one: one.step)[-self._settings.keep :]
        staying = [one for one in self._kept if one in newest or one.step == self.best_step]
        for one in self._kept:
            if one not in staying and world().first:
                shutil.rmtree(one.path, ignore_errors=True)
        self._kept = staying


def measured_so_far(metrics: Path, name: str | None) -> dict[int, float]:
    """The values of a metric by step, as a run has written them down."""
    if name is None or not metrics.exists():
        return {}
    rows = (json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines())
    return {row["step"]: row[name] for row in rows if row.get(name) is not None}


def _remedy(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "make room on the disk, or lower checkpoints.keep" if full else "see to it that the folder can be written"


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
