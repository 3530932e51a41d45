"""Mean and variance of a stream of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class RunningMoments:
    """Mean and variance of all numbers so far or, where `memory` is set, with that many of them counting at most.

    With a memory, old numbers lose weight as new ones come, so the moments follow a drift.
    Source: Chan, Golub and LeVeque 1983 for the merging of parts.
    """

    memory: float | None = None
    count: float = 0.0
    mean: float = 0.0
    variance: float = 1.0

    @property
    def std(self) -> float:
        """The standard deviation; 1 where the numbers do not vary, so that it can divide."""
        varies = self.variance > 1e-10 * max(self.mean**2, 1e-10)
        return math.sqrt(self.variance) if varies else 1.0

    def after(self, numbers: Tensor) -> Self:
        """The moments once these numbers, of any shape, have been seen too."""
        numbers = numbers.double()
        new, mean, variance = numbers.numel(), float(numbers.mean()), float(numbers.var(correction=0))
        old = self.count if self.memory is None else min(self.count, self.memory)
        share = new / (old + new)
        shift = mean - self.mean
        return replace(
            self,
            count=old + new,
            mean=self.mean + share * shift,
            variance=(1 - share) * self.variance + share * variance + share * (1 - share) * shift**2,
        )
