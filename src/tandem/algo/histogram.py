"""A value as a distribution over bins: regression by classification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.algo.masked import masked_sum


@dataclass(frozen=True)
class Histogram:
    """`bins` bins of equal width from `low` to `high`; `sigma` is the smoothing of a target, in bin widths.

    Source: Imani and White 2018 (HL-Gauss); Farebrother et al. 2024, who recommend sigma = 0.75.
    """

    low: float
    high: float
    bins: int
    sigma: float

    @property
    def width(self) -> float:
        return (self.high - self.low) / self.bins

    def mean(self, logits: Tensor) -> Tensor:
        """The value that logits [..., K] stand for: the mean of the bins' centres, [...]."""
        edges = self._edges(logits)
        return logits.softmax(-1) @ ((edges[:-1] + edges[1:]) / 2)

    def probabilities(self, targets: Tensor) -> Tensor:
        """A Gaussian around each target [...], integrated over the bins: [..., K], summing to 1.

        A target beyond the range is taken to lie at its edge.
        """
        edges = self._edges(targets)
        inside = targets.clamp(self.low, self.high)
        cumulative: Tensor = torch.special.ndtr((edges - inside[..., None]) / (self.sigma * self.width))
        return cumulative.diff(dim=-1) / (cumulative[..., -1:] - cumulative[..., :1])

    def outside(self, targets: Tensor, mask: Tensor) -> Tensor:
        """How many targets [B, T] of the mask the range does not hold."""
        return ((targets < self.low) | (targets > self.high)).logical_and(mask).sum()

    def _edges(self, like: Tensor) -> Tensor:
        return torch.linspace(self.low, self.high, self.bins + 1, dtype=like.dtype, device=like.device)


def histogram_value_loss(logits: Tensor, returns: Tensor, mask: Tensor, histogram: Histogram) -> Tensor:
    """Cross-entropy between the smoothed target and the predicted bins, summed over tokens.

    logits [B, T, K]; returns, mask [B, T].
    Source: Farebrother et al. 2024, equation 6.
    """
    targets = histogram.probabilities(returns.detach().masked_fill(~mask, histogram.low))
    return masked_sum(-(targets * logits.log_softmax(-1)).sum(-1), mask)
