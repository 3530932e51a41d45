"""A run's folder: its configuration, metrics, samples, models and summary, under names that never change."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel

from tandem.errors import InputError
from tandem.recipe import without_none
from tandem.run.trackers import Tracker, open_trackers


class RunFolder:
    """`config.toml`, `metrics.jsonl` (an object a step), `rollouts/`, `model/`, `summary.json`, `tensorboard/`."""

    def __init__(self, path: Path, config: BaseModel, trackers: Sequence[str]) -> None:
        """Raises InputError where the folder holds another run or cannot be written."""
        check_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            text = tomli_w.dumps(without_none(config.model_dump()))
            (path / "config.toml").write_text(text, encoding="utf-8")
            self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"run.directory = {str(path)!r} cannot be written: {error.strerror}.") from error
        self.path = path
        self._trackers: list[Tracker] = open_trackers(trackers, path, without_none(config.model_dump()))

    @property
    def model(self) -> Path:
        """Where the final model goes."""
        return self.path / "model"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row of metrics; a value that is not finite is kept as null."""
        finite = finite_or_none(metrics)
        self._metrics.write(json.dumps({"step": step} | finite) + "\n")
        self._metrics.flush()
        for tracker in self._trackers:
            tracker.log({name: value for name, value in finite.items() if value is not None}, step)

    def save_rollouts(self, name: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """Samples of a step, one JSON object a line."""
        folder = self.path / "rollouts"
        folder.mkdir(exist_ok=True)
        lines = (json.dumps(finite_or_none(sample), ensure_ascii=False) for sample in samples)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(summary, self.path / "summary.json")

    def close(self) -> None:
        self._metrics.close()
        for tracker in self._trackers:
            tracker.close()


def write_json(content: Mapping[str, Any], path: Path) -> None:
    text = json.dumps(finite_or_none(content), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def finite_or_none(tree: Any) -> Any:
    """A tree that JSON can hold: a number that is not finite becomes null."""
    if isinstance(tree, Mapping):
        return {name: finite_or_none(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite_or_none(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def check_free(path: Path) -> None:
    """Raises InputError where a run has left metrics in the folder; one that ended before its first step has not."""
    metrics = path / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size > 0:
        raise InputError(f"{path} already holds a run; choose another folder with --run.directory.")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
