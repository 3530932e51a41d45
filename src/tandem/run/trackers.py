"""Where metrics go besides metrics.jsonl."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tandem.errors import InputError


class Tracker(Protocol):
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class HostedTracker:
    """Weights & Biases, or trackio, whose interface is the same."""

    def __init__(self, module: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            library = importlib.import_module(module)
        except ModuleNotFoundError:
            raise InputError(f"run.trackers names {module!r}, which is not installed: pip install {module}.") from None
        self._run = library.init(project="tandem", name=folder.name, config=dict(config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def open_trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Raises InputError where a tracker's library is not installed."""
    return [
        TensorBoard(folder / "tensorboard") if name == "tensorboard" else HostedTracker(name, folder, config)
        for name in names
    ]
