"""How well scores order pairs, beyond how often: by the answers' lengths, and whether their sureness is earned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.algo.critic import calibration, calibration_error


def right_order(chosen: Tensor, rejected: Tensor) -> Tensor:
    """How many pairs [n] are in the order of the preference, a number; a tie counts as half."""
    return (chosen > rejected).sum() + (chosen == rejected).sum() / 2


@dataclass(frozen=True)
class ByLength:
    """Accuracy where the chosen answer is the longer one, and where it is the shorter one, each over so many pairs;
    NaN over none. Pairs of equal length are in neither."""

    longer: float
    longer_pairs: int
    shorter: float
    shorter_pairs: int

    def only_length(self) -> bool:
        """Whether the scores do no more than prefer length, or brevity: better than a coin by two standard errors on
        one side, and worse than one by as much on the other."""
        if not self.longer_pairs or not self.shorter_pairs:
            return False
        # Two standard errors of a coin over n pairs are 1 / sqrt(n).
        longer = (self.longer - 0.5) * math.sqrt(self.longer_pairs)
        shorter = (self.shorter - 0.5) * math.sqrt(self.shorter_pairs)
        return min(longer, shorter) < -1 and max(longer, shorter) > 1


def accuracy_by_length(chosen: Tensor, rejected: Tensor, longer_by: Tensor) -> ByLength:
    """Accuracy of scores [n] by the sign of `longer_by` [n], tokens of the chosen answer less those of the rejected.

    Source: Singhal et al. 2023, who find that much of what reward models learn is length.
    """

    def of(where: Tensor) -> tuple[float, int]:
        pairs = int(where.sum())
        return (float(right_order(chosen[where], rejected[where])) / pairs if pairs else float("nan")), pairs

    return ByLength(*of(longer_by > 0), *of(longer_by < 0))


def preference_calibration_error(chosen: Tensor, rejected: Tensor) -> float:
    """Mean gap between how sure the scores [n] are of their order, sigmoid |difference|, and how often it is right.

    Over ten groups of pairs of similar sureness; NaN for no pairs. Source: Guo et al. 2017, expected calibration error.
    """
    difference = chosen - rejected
    right = (difference > 0).to(difference.dtype) + (difference == 0).to(difference.dtype) / 2
    everywhere = torch.ones_like(difference, dtype=torch.bool)
    return calibration_error(calibration(torch.sigmoid(difference.abs()), right, everywhere))
