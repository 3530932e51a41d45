"""What is paid for a response: shaping, penalties, centring, process rewards."""

from __future__ import annotations

import pytest
import torch

from tandem.algo import RunningMoments
from tandem.config import ScoreSection
from tandem.rewards.composition import Earned, Term, WeightedSum
from tandem.rewards.function import FunctionReward
from tandem.rewards.shaping import shape_scores
from tandem.types import Prompt, Rollout, Scores

PROMPT = Prompt((1,), "p", None, {})


def rollout(length: int, ended: bool = True, text: str = "") -> Rollout:
    return Rollout(PROMPT, tuple(range(length)), (0.0,) * length, text, ended)


def shaped(totals, lengths=(4, 4), ended=(True, True), process=None, moments=None, **settings) -> Scores:
    rollouts = [rollout(length, end) for length, end in zip(lengths, ended, strict=True)]
    scores = Scores(torch.tensor(totals), {}, process)
    return shape_scores(scores, rollouts, ScoreSection(**settings), moments or RunningMoments(), max_new_tokens=10)


def test_scores_are_scaled_and_then_clipped():
    assert shaped([1.0, -4.0], scale=2.0, clip=3.0).total.tolist() == [2.0, -3.0]


def test_running_normalisation_is_by_all_that_was_earned():
    process = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    scores = Scores(torch.tensor([2.0, 6.0]), {}, process)
    moments = RunningMoments().after(scores.whole)
    found = shaped([2.0, 6.0], process=process, moments=moments, normalize="running")
    assert found.total.tolist() == pytest.approx([(2 - 6) / 3, (6 - 6) / 3])
    assert found.process.flatten().tolist() == pytest.approx([1 / 3, 0.0, 0.0, 1.0])


def test_scores_that_do_not_vary_are_not_blown_up():
    moments = RunningMoments().after(torch.zeros(2))
    found = shaped([0.0, 0.0], process=torch.full((2, 2), 0.5), moments=moments, normalize="running")
    assert found.process.max() == 0.5


def test_penalties_come_after_the_clip():
    found = shaped([9.0, 9.0], ended=(True, False), clip=1.0, missing_eos_penalty=2.0)
    assert found.total.tolist() == [1.0, -1.0]


def test_overlong_responses_lose_in_proportion():
    found = shaped([0.0, 0.0, 0.0], lengths=(5, 8, 10), ended=(True,) * 3, overlong_from=6, overlong_penalty=3.0)
    assert found.total.tolist() == [0.0, -1.5, -3.0]


def test_centring_takes_off_the_mean_on_the_reference():
    term = Term(lambda rollouts: Earned(torch.tensor([float(len(r.ids)) for r in rollouts])), weight=2.0)
    reward = WeightedSum({"length": term, "other": term}).centred(["length"], [rollout(3), rollout(5)])
    found = reward.score([rollout(6)])
    assert found.total.tolist() == [2.0 * (6 - 4) + 2.0 * 6]
    assert found.parts["length"].tolist() == [6.0]


def process_reward(answers, texts, pieces):
    """A process reward of a function that gives these answers, on rollouts of one token a piece."""

    def decode(_, ids):
        return b"".join(pieces[ids[0]][: len(ids)]).decode(errors="replace")

    rollouts = [
        Rollout(PROMPT, (row,) * len(piece), (0.0,) * len(piece), text, True)
        for row, (text, piece) in enumerate(zip(texts, pieces, strict=True))
    ]
    return FunctionReward(lambda *_: answers, "f", decode)(rollouts)


def test_process_rewards_are_paid_at_the_token_that_completes_their_text():
    pieces = [[b"ab", b"c", b"de"], ["é".encode()[:1], "é".encode()[1:], b"x"]]
    found = process_reward([[(1, 1.0), (3, 2.0), (5, 4.0)], [(1, 1.0), (2, 2.0)]], ["abcde", "éx"], pieces)
    assert found.process.tolist() == [[1.0, 2.0, 4.0], [0.0, 1.0, 2.0]]
    assert found.final.tolist() == [0.0, 0.0]
    assert found.whole.tolist() == [7.0, 3.0]
