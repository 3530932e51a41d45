"""Several rewards as one: a weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tandem.errors import RewardError
from tandem.types import Rollout, Scores


@dataclass(frozen=True)
class Earned:
    """What one reward says: `final` [B] at the last token; `process` [B, T] at others, or None.

    Rows in `missing` have no score; their `final` is NaN, and `fault` says why the first of them has none.
    """

    final: Tensor
    process: Tensor | None = None
    missing: frozenset[int] = frozenset()
    fault: str | None = None

    @property
    def whole(self) -> Tensor:
        return self.final if self.process is None else self.final + self.process.sum(1)

    @property
    def scored(self) -> list[int]:
        """The rows that have a score."""
        return [row for row in range(len(self.final)) if row not in self.missing]


@dataclass(frozen=True)
class Term:
    """One reward less an offset, times its weight. A weight of 0 measures without training on it."""

    score: Callable[[Sequence[Rollout]], Earned]
    weight: float
    offset: float = 0.0


class WeightedSum:
    """sum_i weight_i * (score_i - offset_i)."""

    def __init__(self, terms: Mapping[str, Term]) -> None:
        self.terms = terms

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Raises RewardError where a term fails. A sample is missing where a term that weighs has no score for it."""
        earned = {name: term.score(rollouts) for name, term in self.terms.items()}
        total, process = torch.zeros(len(rollouts)), None
        missing, fault = frozenset[int](), None
        for name, term in self.terms.items():
            if term.weight != 0.0:
                total += term.weight * (earned[name].final - term.offset)
                part = earned[name].process
                if part is not None:
                    process = term.weight * part if process is None else process + term.weight * part
                missing |= earned[name].missing
                fault = fault or earned[name].fault
        return Scores(total, {name: part.whole for name, part in earned.items()}, process, missing, fault)

    @property
    def offsets(self) -> dict[str, float]:
        """What is taken off each term."""
        return {name: term.offset for name, term in self.terms.items()}

    def with_offsets(self, offsets: Mapping[str, float]) -> WeightedSum:
        """The same rewards with other offsets; a term that has none keeps its own."""
        return WeightedSum(
            {name: replace(term, offset=offsets.get(name, term.offset)) for name, term in self.terms.items()}
        )

    def centred(self, names: Sequence[str], rollouts: Sequence[Rollout]) -> WeightedSum:
        """The same rewards, with the named ones less their mean over those of these rollouts that they score.

        Raises RewardError where there is no such mean.
        """
        return self.with_offsets({name: _mean(name, self.terms[name].score(rollouts)) for name in names})


def _mean(name: str, earned: Earned) -> float:
    scores = earned.whole[earned.scored]
    if not len(scores) or not scores.isfinite().all():
        why = earned.fault or "it returned a score that is not finite"
        raise RewardError(f"the reward {name!r} has no mean on responses of the reference to be centred on: {why}.")
    return float(scores.mean())
