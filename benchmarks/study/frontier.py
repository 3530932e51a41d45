"""What is earned at which distance from the reference: points along a course, and what lies between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Point:
    """KL to the reference in nats a sequence, the mean gold score and the mean score of the reward model."""

    kl: float
    gold: float
    reward: float


def expected_best(chosen_by: Tensor, scores: Tensor, n: int) -> float:
    """Mean score of the best of n candidates, drawn without replacement from the [P, N] that there are.

    The best is the one that `chosen_by` [P, N] puts first. Each candidate, in the order of `chosen_by`, is the best of
    n with the probability C(rank, n - 1) / C(N, n), where rank candidates lie below it: unbiased, and of less variance
    than one draw.
    """
    count = chosen_by.shape[1]
    weights = torch.tensor([math.comb(rank, n - 1) / math.comb(count, n) for rank in range(count)], dtype=torch.float64)
    ordered = scores.double().gather(1, chosen_by.argsort(1))
    return float((ordered * weights).sum(1).mean())


def at_distance(course: Sequence[Point], kl: float) -> Point | None:
    """The point of a course where it first crosses a distance; None where it ends before it.

    Between two that were measured scores are taken to grow with the root of the KL, as they nearly do (Gao et al.
    2022): linearly in the KL itself, the gain of courses with few points would read too small.
    """
    for before, after in itertools.pairwise(course):
        if before.kl <= kl <= after.kl:
            share = _share(before.kl, kl, after.kl)
            return Point(
                kl,
                before.gold + share * (after.gold - before.gold),
                before.reward + share * (after.reward - before.reward),
            )
    return None


def _share(before: float, kl: float, after: float) -> float:
    roots = [math.sqrt(max(0.0, one)) for one in (before, kl, after)]
    return 0.0 if roots[2] == roots[0] else (roots[1] - roots[0]) / (roots[2] - roots[0])
