"""Preference pairs a micro-batch at a time; an answer that stands in several pairs of it is read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.data.examples import Answered, Pair
from tandem.types import Tokens, whole_texts
from tandem.world import world


@dataclass(frozen=True)
class Together:
    """Pairs that pass through a model together: their distinct answers, and the rows [n] of those where each pair's
    chosen and rejected one stand, with by how much the chosen one is better [n], and longer in tokens [n]."""

    answers: Sequence[Answered]
    chosen: Tensor
    rejected: Tensor
    margins: Tensor
    longer_by: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def tokens(self) -> Tokens:
        return answer_tokens(self.answers)


def answer_tokens(answers: Sequence[Answered]) -> Tokens:
    return whole_texts([answer.ids for answer in answers], [answer.prompt_length for answer in answers])


def micro_batches(pairs: Sequence[Pair], budget: int) -> Iterator[Together]:
    """Pairs in their order, as many at a time as have distinct answers that fit the budget of tokens when padded."""
    part: list[Pair] = []
    answers: set[Answered] = set()
    width = 0
    for pair in pairs:
        both = {pair.chosen, pair.rejected}
        longest = max(len(answer.ids) for answer in both)
        if part and (len(answers) + len(both - answers)) * max(width, longest) > budget:
            yield _together(part)
            part, answers, width = [], set(), 0
        part.append(pair)
        answers |= both
        width = max(width, longest)
    if part:
        yield _together(part)


def own_parts(pairs: Sequence[Pair], budget: int) -> Iterator[tuple[Together, float]]:
    """This process's share of the pairs as `micro_batches`, each with its weight: 1, or 0 where it only goes along."""
    if pairs:
        shares = [list(micro_batches(share, budget)) for share in world().in_order(pairs)]
        yield from world().in_step(shares, _together(pairs[:1]))


def _together(pairs: Sequence[Pair]) -> Together:
    answers = list(dict.fromkeys(answer for pair in pairs for answer in (pair.chosen, pair.rejected)))
    row = {answer: number for number, answer in enumerate(answers)}
    chosen, rejected = ([row[getattr(pair, side)] for pair in pairs] for side in ("chosen", "rejected"))
    margins = torch.tensor([pair.margin for pair in pairs])
    longer_by = torch.tensor([pair.chosen.length - pair.rejected.length for pair in pairs])
    return Together(answers, torch.tensor(chosen), torch.tensor(rejected), margins, longer_by)
