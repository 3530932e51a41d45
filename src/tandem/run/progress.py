"""What a person sees while a run goes: the stage, the step, the time left, and the few numbers that matter."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A live bar for each stage on a terminal; elsewhere a line from time to time."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())
        self._bars = Bars(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A line that stays and is not overlooked."""
        self.console.print(f"WARNING: {text}", style="bold red", markup=False)

    @contextmanager
    def stage(self, name: str, steps: int, done: int = 0) -> Iterator[Stage]:
        """A stage of so many steps, of which `done` were done in an earlier life of the run."""
        stage = Stage(self, name, steps, done)
        yield stage
        stage.finish()


class Stage:
    """The progress of one stage."""

    def __init__(self, progress: Progress, name: str, steps: int, done: int) -> None:
        self._progress, self._name, self._steps = progress, name, steps
        self._done = self._done_before = done
        self._task = progress._bars.add_task(name, total=steps, completed=done, numbers="")
        self._started = self._said = time.monotonic()
        self._numbers = ""
        self._said_done = -1

    def advance(self, numbers: Mapping[str, float] | None = None, steps: int = 1, note: str = "") -> None:
        """So many steps further, with the numbers that matter by their short names, and what is to be noted."""
        self._done += steps
        if numbers:
            shown = [f"{name} {_short(value)}" for name, value in numbers.items()]
            self._numbers = "  ".join([*shown, note]).rstrip()
        self._progress._bars.update(self._task, completed=self._done, numbers=self._numbers)
        if self._progress._bars.disable and time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._say()

    def finish(self) -> None:
        if self._progress._bars.disable and self._said_done != self._done:
            self._say()

    def _say(self) -> None:
        self._said, self._said_done = time.monotonic(), self._done
        elapsed = self._said - self._started
        left = elapsed / max(1, self._done - self._done_before) * (self._steps - self._done)
        self._progress.say(
            f"{self._name}  {self._done}/{self._steps}  {elapsed:.0f} s, {left:.0f} s left  {self._numbers}".rstrip()
        )


def silent_console() -> Console:
    """For a process that is not the one to speak."""
    return Console(file=open(os.devnull, "w", encoding="utf-8"))


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
