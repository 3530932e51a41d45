"""Scores as a stage needs them: a reward is tried before training, and samples without a score stay out of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from tandem.config import RewardSource
from tandem.errors import InputError, RewardError
from tandem.rewards.composition import WeightedSum
from tandem.rewards.faults import described, not_finite
from tandem.types import Rollout, Scores


@contextmanager
def refused_before_training() -> Iterator[None]:
    """Before training, a reward that fails is input that cannot be used: RewardError becomes InputError."""
    try:
        yield
    except RewardError as error:
        raise InputError(str(error)) from error


def try_rewards(reward: WeightedSum, rollouts: Sequence[Rollout]) -> None:
    """Let every term score these rollouts.

    Raises InputError where one fails, says of some that they earn what is not finite, or has a score for none.
    """
    for name, term in reward.terms.items():
        with refused_before_training():
            earned = term.score(rollouts)
        for row in earned.scored:
            if not earned.whole[row].isfinite():
                fault = not_finite(float(earned.whole[row]))
                raise InputError(f"{described(fault, f'the reward {name!r}', rollouts[row])}.")
        if not earned.scored:
            raise InputError(f"{earned.fault}; none of the {len(rollouts)} samples it was tried on has a score.")


def with_scores_only(rollouts: list[Rollout], scores: Scores) -> tuple[list[Rollout], Scores, int]:
    """The rollouts that have a score, their scores, and how many were left out for having none.

    Raises RewardError where none has one.
    """
    if not scores.missing:
        return rollouts, scores, 0
    kept = [row for row in range(len(rollouts)) if row not in scores.missing]
    if not kept:
        raise RewardError(f"none of the {len(rollouts)} samples has a score; the first: {scores.fault}.")
    return [rollouts[row] for row in kept], scores.select(torch.tensor(kept)), len(scores.missing)


def skipped_metric(sources: Sequence[RewardSource], skipped: int) -> dict[str, float]:
    """How many samples were left out, where a reward may leave some out."""
    return {"reward/skipped": float(skipped)} if any(source.on_error == "skip" for source in sources) else {}
