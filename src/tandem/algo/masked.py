"""Statistics over the tokens that exist, kept as sums and counts until they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x [...] where mask [...] is true; what is masked may be anything, NaN included.

    Raises ValueError where the shapes differ.
    """
    if x.shape != mask.shape:
        raise ValueError(f"x is {tuple(x.shape)}, its mask {tuple(mask.shape)}")
    return torch.where(mask, x, torch.zeros_like(x)).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [...] where mask [...] is true; NaN where nothing is."""
    return masked_sum(x, mask) / mask.sum()


def masked_std(x: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation of x [...] where mask [...] is true, over all of it; NaN where nothing is."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask).sqrt()


class Sums:
    """Named quantities as (sum, count), so that a mean over parts is the mean over the whole."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._largest: dict[str, float] = {}
        self._totals: dict[str, float] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add a part: its sum and how many things were summed."""
        self._sums[name] = self._sums.get(name, 0.0) + float(total)
        self._counts[name] = self._counts.get(name, 0.0) + float(count)

    def add_largest(self, name: str, value: Tensor | float) -> None:
        """Keep the largest value seen."""
        self._largest[name] = max(self._largest.get(name, float("-inf")), float(value))

    def add_total(self, name: str, amount: float) -> None:
        """Add to something that is counted, not averaged."""
        self._totals[name] = self._totals.get(name, 0.0) + amount

    def merge(self, other: Sums) -> None:
        """Take in all that another has gathered."""
        for name, total in other._sums.items():
            self.add(name, total, other._counts[name])
        for name, value in other._largest.items():
            self.add_largest(name, value)
        for name, amount in other._totals.items():
            self.add_total(name, amount)

    @classmethod
    def together(cls, parts: Iterable[Sums]) -> Sums:
        """All that several have gathered."""
        found = cls()
        for part in parts:
            found.merge(part)
        return found

    def means(self) -> Mapping[str, float]:
        """Every mean, every largest value and every total."""
        means = {name: self._sums[name] / count for name, count in self._counts.items() if count > 0}
        return means | self._largest | self._totals
