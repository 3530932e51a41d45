"""What is paid for a response: shaping, penalties, centring, process rewards; and samples that get no score."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress

import pytest
import torch

from tandem.algo import RunningMoments
from tandem.config import RewardSource, ScoreSection
from tandem.errors import InputError, RewardError
from tandem.rewards.composition import Earned, Term, WeightedSum
from tandem.rewards.function import LATE_IN_A_ROW, FunctionReward
from tandem.rewards.model import ModelReward
from tandem.rewards.shaping import shape_scores
from tandem.stages.joint import evaluate
from tandem.stages.measure import means_of_parts
from tandem.stages.scoring import try_rewards, with_scores_only
from tandem.types import Prompt, Rollout, Scores
from tiny import make_tokenizer

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
    return FunctionReward(lambda *_: answers, RewardSource(function="m:f"), decode)(rollouts)


def test_process_rewards_are_paid_at_the_token_that_completes_their_text():
    pieces = [[b"ab", b"c", b"de"], ["é".encode()[:1], "é".encode()[1:], b"x"]]
    found = process_reward([[(1, 1.0), (3, 2.0), (5, 4.0)], [(1, 1.0), (2, 2.0)]], ["abcde", "éx"], pieces)
    assert found.process.tolist() == [[1.0, 2.0, 4.0], [0.0, 1.0, 2.0]]
    assert found.final.tolist() == [0.0, 0.0]
    assert found.whole.tolist() == [7.0, 3.0]


WORDS = ["one", "two", "three", "four"]
SAMPLES = [Rollout(PROMPT, (1,) * len(word), (0.0,) * len(word), word, True) for word in WORDS]


def score(function, samples=SAMPLES, **settings) -> Earned:
    """What a function gives to the samples under these settings of its source."""
    return FunctionReward(function, RewardSource(function="m:f", **settings), lambda _, ids: "." * len(ids))(samples)


def lengths(responses):
    return [float(len(response)) for response in responses]


def raises_at_two(_, responses, *__):
    if "two" in responses:
        raise ValueError("no two")
    return lengths(responses)


def test_a_function_that_raises_is_told_with_its_sample_and_its_line():
    calls = []

    def counted(prompts, responses, rows):
        calls.append(len(responses))
        return raises_at_two(prompts, responses, rows)

    with pytest.raises(RewardError, match="no two") as error:
        score(counted)
    said = str(error.value)
    assert "'m:f' raised ValueError('no two') at " in said
    assert f"{__file__}:" in said
    assert "the response 'two' to 'p'" in said
    assert calls == [4, 1, 1]
    assert isinstance(error.value.__cause__, ValueError)


def test_where_samples_are_skipped_the_others_keep_their_scores():
    found = score(raises_at_two, on_error="skip")
    assert found.missing == {1}
    assert found.final[found.scored].tolist() == [3.0, 5.0, 4.0]
    assert found.final[1].isnan()
    assert "'two'" in found.fault


def hangs_in_python():
    while True:
        pass


def hangs_in_sleep():
    time.sleep(60)


def hangs_and_catches():
    while True:
        with suppress(Exception):
            time.sleep(0.001)


@pytest.mark.parametrize("hang", [hangs_in_python, hangs_in_sleep, hangs_and_catches])
def test_a_function_that_hangs_is_stopped(hang):
    def function(_, responses, *__):
        if "two" in responses:
            hang()
        return lengths(responses)

    started = time.monotonic()
    found = score(function, on_error="skip", timeout_seconds=0.3)
    assert found.missing == {1}
    assert found.final[found.scored].tolist() == [3.0, 5.0, 4.0]
    with pytest.raises(RewardError, match=r"did not answer within 0.3 s at .*test_rewards.py:\d+ .*'two'"):
        score(function, timeout_seconds=0.3)
    assert time.monotonic() - started < 20


def test_an_answer_that_comes_after_the_limit_does_not_count():
    def catches_all(_, responses, *__):
        with suppress(BaseException):
            time.sleep(60)
        return lengths(responses)

    with pytest.raises(RewardError, match="did not answer within"):
        score(catches_all, timeout_seconds=0.1)


def test_a_function_that_hangs_for_all_is_given_up():
    calls = []

    def function(*_):
        calls.append(1)
        time.sleep(60)

    samples = SAMPLES * 3
    found = score(function, samples, on_error="skip", timeout_seconds=0.05)
    assert found.missing == set(range(len(samples)))
    assert len(calls) == 1 + LATE_IN_A_ROW


def test_the_limit_leaves_other_timers_alone():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(time.monotonic()))
    of_limit = signal.getsignal(signal.SIGVTALRM)

    def function(_, responses, *__):
        time.sleep(1.0)
        return lengths(responses)

    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        started = time.monotonic()
        assert score(function, timeout_seconds=30.0).final.tolist() == [3.0, 3.0, 5.0, 4.0]
        assert rang[0] - started < 0.9
        signal.setitimer(signal.ITIMER_REAL, 50.0)
        with pytest.raises(RewardError):
            score(function, timeout_seconds=0.1)
        assert 45 < signal.getitimer(signal.ITIMER_REAL)[0] < 50
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert signal.getsignal(signal.SIGVTALRM) is of_limit


def test_a_function_scores_on_other_threads_too():
    found = []
    thread = threading.Thread(target=lambda: found.append(score(lambda _, responses, *__: lengths(responses))))
    thread.start()
    thread.join()
    assert found[0].final.tolist() == [3.0, 3.0, 5.0, 4.0]


def test_an_interrupt_passes_through():
    def function(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(function, on_error="skip")


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ("1234", "returned a str, '1234',"),
        ({"one": 1.0}, "returned a dict"),
        (None, "returned None"),
        (5.0, "returned 5.0"),
        ([1.0], "returned 1 scores for 4 responses"),
        ([1.0, "x", 1.0, 1.0], "must return numbers"),
        ([1.0, "2.0", 1.0, 1.0], "'2.0' is text"),
        ([1.0, {}, 1.0, 1.0], "must return numbers"),
        ([1.0, None, 1.0, 1.0], "returned no score (None)"),
        ([1.0, 10**400, 1.0, 1.0], "must return numbers"),
        ([1.0, [(9, 1.0)], 1.0, 1.0], "returned (9, 1.0) among its process rewards"),
        ([1.0, [(1, "x")], 1.0, 1.0], "must return numbers"),
    ],
)
def test_a_function_that_returns_something_else(answers, said):
    with pytest.raises(RewardError) as error:
        score(lambda *_: answers)
    assert said in str(error.value)
    assert "the response '" in str(error.value)


@pytest.mark.parametrize("bad", ["x", None, float("nan"), float("inf"), 1e300, [(9, 1.0)], [(1, float("nan"))]])
def test_one_answer_that_is_no_score_costs_its_own_sample_alone(bad):
    found = score(lambda *_: [1.0, bad, [(1, 2.0)], 4.0], on_error="skip")
    assert found.missing == {1}
    assert found.whole[found.scored].tolist() == [1.0, 2.0, 4.0]


def test_a_function_that_fails_on_the_whole_batch_only():
    def in_ones(_, responses, *__):
        return lengths(responses[:1])

    with pytest.raises(RewardError, match="returned 1 scores for 4 responses, though it answers for each of the 4"):
        score(in_ones)
    found = score(in_ones, on_error="skip")
    assert found.final.tolist() == [3.0, 3.0, 5.0, 4.0]
    assert not found.missing


def test_numbers_that_are_not_finite_are_passed_on_where_nothing_is_skipped():
    assert str(score(lambda *_: [1.0, float("nan"), float("-inf"), 1e300]).final.tolist()) == "[1.0, nan, -inf, inf]"


class CountingScorer:
    """Gives each text its number of tokens, but NaN to those of three."""

    def score(self, texts):
        return torch.tensor([float("nan") if len(text) == 3 else float(len(text)) for text in texts])


def test_a_reward_model_skips_what_it_cannot_read_or_say():
    tokenizer = make_tokenizer()
    samples = [Rollout(Prompt((1,), "", None, {}), (1,), (0.0,), "z" * count, True) for count in (2, 3, 9)]
    tokens = [len(tokenizer(one.text).input_ids) for one in samples]
    assert tokens == [2, 3, 9]
    found = ModelReward(CountingScorer(), tokenizer, "m", 5, "skip")(samples)
    assert found.missing == {1, 2}
    assert found.final[0] == 2.0
    fails = ModelReward(CountingScorer(), tokenizer, "m", 5, "fail")
    assert fails(samples[:2]).final.isnan().tolist() == [False, True]
    with pytest.raises(RewardError, match="reads 5 tokens and was given 9 for the response 'zzzzzzzzz'"):
        fails(samples)


def earned_by(*numbers, missing=()):
    """A reward that gives these numbers, whatever the rollouts."""
    earned = Earned(torch.tensor(numbers), None, frozenset(missing), "it would not" if missing else None)
    return lambda _: earned


NAN = float("nan")


def test_a_sample_is_missing_where_a_term_that_weighs_has_no_score_for_it():
    terms = {
        "a": Term(earned_by(1.0, NAN, 3.0, 4.0, missing=[1]), 1.0),
        "b": Term(earned_by(1.0, 2.0, NAN, 4.0, missing=[2]), 2.0),
        "measured": Term(earned_by(5.0, 6.0, 7.0, NAN, missing=[3]), 0.0),
    }
    scores = WeightedSum(terms).score(SAMPLES)
    assert scores.missing == {1, 2}
    rollouts, kept, skipped = with_scores_only(SAMPLES, scores)
    assert [one.text for one in rollouts] == ["one", "four"]
    assert kept.total.tolist() == [3.0, 12.0]
    assert skipped == 2
    assert not kept.missing
    assert means_of_parts(kept) == {"a": 2.5, "b": 2.5, "measured": 5.0}


def test_selected_scores_know_which_of_them_are_missing():
    scores = Scores(torch.tensor([1.0, NAN, 3.0]), {}, None, frozenset([1]), "it would not")
    assert scores.select(torch.tensor([2, 1])).missing == {1}
    assert scores.select(torch.tensor([2, 0])).fault is None


def test_a_step_without_any_score_ends_the_run():
    scores = Scores(torch.tensor([NAN] * 4), {}, None, frozenset(range(4)), "it would not")
    with pytest.raises(RewardError, match="none of the 4 samples has a score; the first: it would not"):
        with_scores_only(SAMPLES, scores)


class Flat:
    """A policy and a value model that say 0 of everything."""

    def prepare(self, tokens, _):
        return tokens

    def logprobs(self, tokens):
        return torch.zeros(tokens.mask.shape)

    def values(self, tokens):
        return torch.zeros(len(tokens), tokens.mask.shape[1] + 1)


def test_process_rewards_fit_the_rollouts_that_are_left():
    found = score(lambda *_: [[(1, 1.0)], [(2, 2.0)], None, [(4, 4.0)]], on_error="skip")
    scores = WeightedSum({"f": Term(lambda _: found, 1.0)}).score(SAMPLES)
    rollouts, scores, _ = with_scores_only(SAMPLES[:3], scores.select(torch.tensor([0, 1, 2])))
    trajectories = evaluate(rollouts, scores, Flat(), Flat(), Flat(), 100)
    assert trajectories.process_rewards.tolist() == [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]


def test_centring_is_by_the_samples_that_have_a_score():
    centred = WeightedSum({"a": Term(earned_by(1.0, NAN, 3.0, 2.0, missing=[1]), 1.0)}).centred(["a"], SAMPLES)
    assert centred.terms["a"].offset == 2.0
    for unusable in (earned_by(NAN, NAN, missing=[0, 1]), earned_by(1.0, NAN)):
        with pytest.raises(RewardError, match="'a' has no mean"):
            WeightedSum({"a": Term(unusable, 1.0)}).centred(["a"], SAMPLES[:2])


@pytest.mark.parametrize(
    ("unusable", "said"),
    [
        (earned_by(1.0, NAN), "the reward 'a' returned nan for the response 'two' to 'p'; every score must be finite"),
        (earned_by(NAN, NAN, missing=[0, 1]), "it would not; none of the 2 samples"),
        (lambda samples: score(raises_at_two, samples), "raised ValueError"),
    ],
)
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_reward_that_does_not_work_is_refused_before_training(unusable, said, weight):
    with pytest.raises(InputError) as error:
        try_rewards(WeightedSum({"a": Term(unusable, weight)}), SAMPLES[:2])
    assert said in str(error.value)


def test_a_reward_may_skip_before_training():
    try_rewards(WeightedSum({"a": Term(earned_by(1.0, NAN, missing=[1]), 1.0)}), SAMPLES[:2])
