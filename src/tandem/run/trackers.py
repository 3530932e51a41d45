"""Where metrics go besides metrics.jsonl."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tandem.errors import InputError


class Tracker(Protocol):
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Place:
    """Where a run is kept, what trackers know it by, and the step that it goes on from, if it does."""

    folder: Path
    identity: str
    resumed_at: int | None


class TensorBoard:
    """Event files. What an interrupted run wrote beyond the step that it goes on from is no longer shown."""

    def __init__(self, place: Place) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if place.resumed_at is None else place.resumed_at + 1
        self._writer = SummaryWriter(str(place.folder / "tensorboard"), purge_step=purge)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class HostedTracker:
    """Weights & Biases, which knows a run by its id, or trackio, which has the same interface and goes by the name."""

    def __init__(self, module: str, place: Place, config: Mapping[str, Any]) -> None:
        try:
            library = importlib.import_module(module)
        except ModuleNotFoundError:
            raise InputError(f"run.trackers names {module!r}, which is not installed: pip install {module}.") from None
        known_by: dict[str, Any] = {"id": place.identity} if module == "wandb" else {}
        if place.resumed_at is not None:
            known_by["resume"] = "allow"
        name = f"{place.folder.name}-{place.identity}"
        self._run = library.init(project="tandem", name=name, config=dict(config), **known_by)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def open_trackers(names: Sequence[str], place: Place, config: Mapping[str, Any]) -> list[Tracker]:
    """Raises InputError where a tracker's library is not installed."""
    return [TensorBoard(place) if name == "tensorboard" else HostedTracker(name, place, config) for name in names]
