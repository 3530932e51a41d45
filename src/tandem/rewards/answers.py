"""From what a function or a server answers to what is earned: one reading for both.

The answer to a sample is a number; or a list of (end, reward) pairs, process rewards, each paid at the token that
completes the first `end` characters of the response; or nothing (None), where there is no score for it.
"""

from __future__ import annotations

import bisect
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tandem.rewards.composition import Earned
from tandem.rewards.faults import Fault, described, failure, not_finite, shown
from tandem.types import Rollout

Decode = Callable[[Sequence[int], Sequence[int]], str]
OnError = Literal["fail", "skip"]
NO_SCORE = Fault("returned no score (None)", "it must return a number, one a response")


@dataclass(frozen=True)
class Answer:
    """What one sample earned: at its last token, and at others, by their place in the response."""

    final: float
    process: tuple[tuple[int, float], ...] | None = None


class AnswerReader:
    """Reads the answers of the reward that messages call `name`; `decode` says which text tokens make."""

    def __init__(self, name: str, decode: Decode, on_error: OnError) -> None:
        self.name = name
        self.skips = on_error == "skip"
        self._decode = decode

    def earned(self, answers: Iterable[Any], rollouts: Sequence[Rollout]) -> Earned:
        """What the answers say, one a rollout in their order; a Fault in the place of an answer is one already found.

        Raises RewardError at the first sample without a score, unless such samples are to be skipped.
        """
        pairs = zip(answers, rollouts, strict=True)
        read = (answer if isinstance(answer, Fault) else self._read(answer, rollout) for answer, rollout in pairs)
        return side_by_side(read, rollouts, self.name, self.skips)

    def _read(self, answer: Any, rollout: Rollout) -> Answer | Fault:
        if answer is None:
            return NO_SCORE
        if isinstance(answer, list | tuple):
            return self._process(answer, rollout)
        number = self._number(answer)
        return number if isinstance(number, Fault) else Answer(number)

    def _number(self, answer: Any) -> float | Fault:
        """A number as float32 holds it: what is too large for that is infinite."""
        try:
            if isinstance(answer, str | bytes):
                raise TypeError(f"{shown(answer)} is text")
            return float(torch.tensor(float(answer), dtype=torch.float32))
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            return Fault(f"returned what is no number ({error})", "it must return numbers, one a response")

    def _process(self, pairs: Sequence[Any], rollout: Rollout) -> Answer | Fault:
        read: list[tuple[int, float]] = []
        for pair in pairs:
            token = self._token_at(pair, rollout)
            if isinstance(token, Fault):
                return token
            number = self._number(pair[1])
            if isinstance(number, Fault):
                return number
            read.append((token, number))
        return Answer(0.0, tuple(read))

    def _token_at(self, pair: Any, rollout: Rollout) -> int | Fault:
        """Which token completes the first `end` characters of the response."""
        try:
            end = operator.index(pair[0])
            fits = len(pair) == 2 and 0 <= end <= len(rollout.text)
        except (TypeError, IndexError, KeyError):
            fits = False
        if not fits:
            return Fault(
                f"returned {shown(pair)} among its process rewards",
                f"each must be a pair (end, reward) with 0 <= end <= {len(rollout.text)}, the response's length",
            )
        ids = rollout.ids

        def whole_characters(last: int) -> int:
            return len(self._decode(rollout.prompt.ids, ids[: last + 1]).rstrip("\ufffd"))

        return min(bisect.bisect_left(range(len(ids)), end, key=whole_characters), len(ids) - 1)


def side_by_side(answers: Iterable[Answer | Fault], rollouts: Sequence[Rollout], name: str, skips: bool) -> Earned:
    """What every sample earned, in their order, under the reward that messages call `name`.

    Raises RewardError at the first fault, and takes no further answer, unless samples with one are to be skipped. A
    number that is not finite is a fault where it can be skipped, and passes where it cannot.
    """
    read: list[Answer] = []
    missing, said = set[int](), None
    for row, (answer, rollout) in enumerate(zip(answers, rollouts, strict=True)):
        found = _finite(answer) if skips else answer
        if isinstance(found, Fault):
            if not skips:
                raise failure(found, name, rollout)
            said = said or described(found, name, rollout)
            missing.add(row)
            found = Answer(math.nan)
        read.append(found)
    return Earned(torch.tensor([one.final for one in read]), _process(read, rollouts), frozenset(missing), said)


def _finite(answer: Answer | Fault) -> Answer | Fault:
    if isinstance(answer, Fault):
        return answer
    numbers = [answer.final, *(paid for _, paid in answer.process or ())]
    bad = [number for number in numbers if not math.isfinite(number)]
    return not_finite(bad[0]) if bad else answer


def _process(answers: Sequence[Answer], rollouts: Sequence[Rollout]) -> Tensor | None:
    if all(answer.process is None for answer in answers):
        return None
    process = torch.zeros(len(rollouts), max(len(rollout.ids) for rollout in rollouts))
    for row, answer in enumerate(answers):
        for token, number in answer.process or ():
            process[row, token] += number
    return process
