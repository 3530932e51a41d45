"""How often the value model learns: following its quality instead of a constant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True)
class AdaptiveEpochs:
    """Passes of the value model over a step's rollouts, doubled while it explains too little, halved when enough.

    explained variance < raise_below:  epochs <- min(2 * epochs, most)
    explained variance > lower_above:  epochs <- max(epochs / 2, least)
    """

    epochs: int
    least: int
    most: int
    raise_below: float
    lower_above: float

    def after(self, explained_variance: float) -> Self:
        """The schedule after a step; an explained variance that is not a number changes nothing."""
        if explained_variance < self.raise_below:
            return replace(self, epochs=min(2 * self.epochs, self.most))
        if explained_variance > self.lower_above:
            return replace(self, epochs=max(self.epochs // 2, self.least))
        return self
