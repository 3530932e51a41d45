"""A run's folder: its configuration, metrics, samples, models and summary, under names that never change."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import tomli_w

from tandem.errors import InputError, NotFinite
from tandem.recipe import RECORD, without_none
from tandem.run.disk import finite_or_none, write_json, write_whole, writing
from tandem.run.keeper import Keeper
from tandem.run.record import Recipe
from tandem.run.start import CHECKPOINTS, Start
from tandem.run.trackers import Place, Tracker, open_trackers
from tandem.world import world


class RunFolder:
    """`config.toml`, `metrics.jsonl` (an object a step), `rollouts/`, `model/`, `summary.json`, `tensorboard/`.

    A run that goes on finds what was written after the snapshot that it goes on from cut off again. Where several
    processes train together the first one's folder is the run's; the others write theirs where nobody looks, and it
    goes when they do.
    """

    def __init__(self, path: Path, config: Recipe, start: Start) -> None:
        """Raises InputError where the folder cannot be written, or a tracker is not installed."""
        settings, snapshot = without_none(config.model_dump()), start.snapshot
        checkpoints, trackers = path / CHECKPOINTS, config.run.trackers
        self._aside = None if world().first else TemporaryDirectory(prefix="tandem-")
        if self._aside is not None:
            path, trackers = Path(self._aside.name), []
        try:
            write_whole(path / "config.toml", tomli_w.dumps(settings))
            write_json(start.record, path / RECORD)
            (path / "summary.json").unlink(missing_ok=True)
            self._metrics = (path / "metrics.jsonl").open("ab")
            self._metrics.truncate(snapshot.state["metrics_bytes"] if snapshot else 0)
            self._metrics.seek(0, os.SEEK_END)
            remove_later_samples(path, snapshot.step if snapshot else 0)
        except OSError as error:
            raise InputError(f"run.directory = {str(path)!r} cannot be written: {error.strerror}.") from error
        self.path = path
        place = Place(path, str(start.record["identity"]), snapshot.step if snapshot else None)
        self._trackers: list[Tracker] = open_trackers(trackers, place, settings)
        self.keeper = Keeper(checkpoints, config.checkpoints, self.sync)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keeper.close()
        self._metrics.close()
        for tracker in self._trackers:
            tracker.close()
        if self._aside is not None:
            self._aside.cleanup()

    @property
    def model(self) -> Path:
        """Where the final model goes."""
        return self.path / "model"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row of metrics; a value that is not finite is kept as null.

        Raises RunError where the disk does not take it.
        """
        finite = finite_or_none(metrics)
        with writing(self.path / "metrics.jsonl"):
            self._metrics.write((json.dumps({"step": step} | finite) + "\n").encode())
            self._metrics.flush()
        for tracker in self._trackers:
            tracker.log({name: value for name, value in finite.items() if value is not None}, step)

    def save_rollouts(self, name: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """Samples of a step, one JSON object a line."""
        self._write_lines(self.path / "rollouts" / f"{name}.jsonl", samples)

    def keep_fault(self, step: int, fault: NotFinite, samples: Sequence[Mapping[str, Any]]) -> None:
        """What a skipped step worked on: first why it was skipped, then a sample a line."""
        why = {"step": step, "where": fault.where, "remedy": fault.remedy}
        self._write_lines(self.path / "faults" / f"step_{step:06d}.jsonl", [why, *samples])

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        with writing(self.path / "summary.json"):
            write_json(summary, self.path / "summary.json")

    @property
    def metrics_bytes(self) -> int:
        """How much of metrics.jsonl is written; a checkpoint remembers it."""
        return self._metrics.tell()

    def sync(self) -> None:
        """Have the metrics on the disk."""
        os.fsync(self._metrics.fileno())

    def _write_lines(self, path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
        lines = (json.dumps(finite_or_none(sample), ensure_ascii=False) for sample in samples)
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def remove_later_samples(path: Path, step: int) -> None:
    """Take away samples of steps after this one, which the run that goes on will write anew."""
    for name in ("rollouts", "faults"):
        for file in (path / name).glob("*.jsonl"):
            number = file.stem.rpartition("_")[2]
            if file.stem == "heldout_after" or (number.isdigit() and int(number) > step):
                file.unlink()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
