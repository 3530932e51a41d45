"""Where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by phase since they were last read, as a timer tells them."""

    def __init__(self, timer: Callable[[], float] = time.monotonic) -> None:
        self._timer = timer
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._timer()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + self._timer() - start

    def read(self, tokens: int) -> dict[str, float]:
        """`time/*` in seconds and the step's throughput in response tokens a second; the clock starts anew."""
        total = sum(self._seconds.values())
        seconds = {f"time/{phase}": value for phase, value in self._seconds.items()}
        self._seconds = {}
        return seconds | {"time/step": total, "throughput/tokens_per_second": tokens / max(total, 1e-9)}
