"""Several rewards as one: a weighted sum, less what a response loses for not ending."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.config import ScoreSection
from tandem.types import Rollout, Scores


@dataclass(frozen=True)
class Term:
    """One reward, times its weight. A weight of 0 measures without training on it."""

    score: Callable[[Sequence[Rollout]], Tensor]
    weight: float


class WeightedSum:
    """sum_i weight_i * score_i - missing_eos_penalty * [the response was cut]."""

    def __init__(self, terms: Mapping[str, Term], settings: ScoreSection) -> None:
        self._terms = terms
        self._settings = settings

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        parts = {name: term.score(rollouts) for name, term in self._terms.items()}
        total = torch.zeros(len(rollouts))
        for name, term in self._terms.items():
            if term.weight != 0.0:
                total += term.weight * parts[name]
        cut = torch.tensor([not rollout.ended for rollout in rollouts])
        return Scores(total - self._settings.missing_eos_penalty * cut, parts)
