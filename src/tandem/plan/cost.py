"""Seconds by what they are spent on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Cost:
    """Seconds on one GPU: multiplying, moving memory, calling layers, and waiting for what other processes send."""

    products: float = 0.0
    memory: float = 0.0
    calls: float = 0.0
    network: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.memory + self.calls + self.network

    @property
    def mostly(self) -> str:
        """What most of it is spent on."""
        parts = asdict(self)
        return max(parts, key=lambda name: parts[name])

    def times(self, factor: float) -> Cost:
        return Cost(*(factor * part for part in asdict(self).values()))


def added(costs: Iterable[Cost]) -> Cost:
    parts = [list(asdict(cost).values()) for cost in costs]
    return Cost(*map(sum, zip(*parts, strict=True)))
