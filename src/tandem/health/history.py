"""What a run's metrics were, step by step: the only thing that rules look at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Self


class History:
    """Metrics by name over steps, with gaps: a row need not hold every metric, and a number may not be finite.

    Rows come in the order of their steps. Numbers that are not finite (in a file: null) are no numbers; which metrics
    had them, and where last, is remembered.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._values: dict[str, list[float]] = {}
        self._largest: dict[str, float] = {}
        self._last_row: dict[str, int] = {}
        self._not_finite: dict[str, int] = {}

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Self:
        """From rows as metrics.jsonl holds them, each with its `step`."""
        history = cls()
        for row in rows:
            history.append(int(row["step"]), row)
        return history

    def append(self, step: int, row: Mapping[str, Any]) -> None:
        """The metrics of a further step; what is neither a number nor null is passed over."""
        self.steps.append(step)
        for name, value in row.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float | None):
                continue
            if value is None or not math.isfinite(value):
                self._not_finite[name] = len(self.steps)
            else:
                self._values.setdefault(name, []).append(float(value))
                self._largest[name] = max(self._largest.get(name, -math.inf), float(value))
                self._last_row[name] = len(self.steps)

    @property
    def names(self) -> set[str]:
        """Every metric that had a number so far."""
        return set(self._values)

    def holds(self, name: str) -> bool:
        """Whether the latest row has a number of this name."""
        return bool(self.steps) and self._last_row.get(name) == len(self.steps)

    def latest(self, name: str, otherwise: float = math.nan) -> float:
        """The number in the latest row."""
        return self._values[name][-1] if self.holds(name) else otherwise

    def count(self, name: str) -> int:
        """How many rows had a number of this name."""
        return len(self._values.get(name, ()))

    def recent(self, name: str, count: int) -> list[float]:
        """The latest numbers, oldest first; fewer where there are not so many."""
        return self._values.get(name, [])[-count:]

    def early(self, name: str, count: int) -> list[float]:
        """The first numbers; fewer where there are not so many."""
        return self._values.get(name, [])[:count]

    def largest(self, name: str) -> float:
        """The largest number of this name so far; NaN where there was none."""
        return self._largest.get(name, math.nan)

    def not_finite_now(self) -> list[str]:
        """The metrics whose number in the latest row is not finite."""
        return sorted(name for name, row in self._not_finite.items() if row == len(self.steps))
