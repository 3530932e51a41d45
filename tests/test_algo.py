"""The pure functions, each against hand-made or naive answers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem import algo


@pytest.mark.parametrize(
    ("advantage", "ratio", "gradient"),
    [
        (1.0, 0.5, 1.0),
        (1.0, 0.9, 1.0),
        (1.0, 1.1, 1.0),
        (1.0, 1.5, 0.0),
        (-1.0, 0.5, 0.0),
        (-1.0, 0.9, -1.0),
        (-1.0, 1.1, -1.0),
        (-1.0, 1.5, -1.0),
    ],
)
def test_clip_stops_the_right_gradients(advantage, ratio, gradient):
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(1, 1, dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss = algo.ppo_policy_loss(logprobs, old, torch.full((1, 1), advantage), mask, clip_low=0.2, clip_high=0.2)
    loss.total.backward()
    assert -logprobs.grad.item() / ratio == pytest.approx(gradient)
    assert loss.clipped.item() == (gradient == 0.0)


def naive_gae(rewards, values, length, gamma, lam, final):
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < length else final) - values[t] for t in range(length)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t)) for t in range(length)]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    gamma=st.sampled_from([1.0, 0.9]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    padding=st.integers(0, 3),
    truncated=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gae_equals_the_double_loop(lengths, gamma, lam, padding, truncated, seed):
    random = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + padding)
    rewards, values = (torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(2))
    final = torch.randn(len(lengths), generator=random, dtype=torch.float64) * truncated
    mask = torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]
    found = algo.gae(rewards, values, mask, gamma=gamma, lam=lam, final_values=final if truncated else None)
    for row, length in enumerate(lengths):
        expected = naive_gae(rewards[row].tolist(), values[row].tolist(), length, gamma, lam, final[row].item())
        assert found[row, :length].tolist() == pytest.approx(expected, abs=1e-12)
        assert (found[row, length:] == 0).all()


def test_gae_at_the_ends_of_lambda():
    rewards, values = torch.randn(2, 3, 5, dtype=torch.float64).unbind(0)
    mask = torch.ones(3, 5, dtype=torch.bool)
    returns = rewards.flip(1).cumsum(1).flip(1)
    following = torch.cat([values[:, 1:], torch.zeros(3, 1, dtype=torch.float64)], 1)
    monte_carlo = algo.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert torch.allclose(monte_carlo, returns - values, atol=1e-12)
    td = algo.gae(rewards, values, mask, gamma=1.0, lam=0.0)
    assert torch.allclose(td, rewards + following - values, atol=1e-12)


def test_score_is_paid_at_the_last_token_and_kl_at_every_one():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    penalties, process = torch.full((2, 3), 0.05), torch.tensor([[1.0, 0.0, 9.0], [0.0, 2.0, 0.0]])
    rewards = algo.token_rewards(torch.tensor([3.0, 4.0]), mask, penalties=penalties)
    assert torch.allclose(rewards, torch.tensor([[-0.05, 2.95, 0.0], [-0.05, -0.05, 3.95]]))
    rewards = algo.token_rewards(torch.tensor([3.0, 4.0]), mask, penalties=penalties, process_rewards=process)
    assert torch.allclose(rewards, torch.tensor([[0.95, 2.95, 0.0], [-0.05, 1.95, 3.95]]))


@pytest.mark.parametrize(("ratio", "gradient"), [(0.5, 0.0), (1.5, -1.0), (2.9, -1.0), (3.1, 0.0)])
def test_dual_clip_bounds_what_a_bad_token_can_cost(ratio, gradient):
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    clip = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}
    loss = algo.ppo_policy_loss(logprobs, old, -torch.ones(1, 1, dtype=torch.float64), mask, **clip)
    loss.total.backward()
    assert -logprobs.grad.item() / ratio == pytest.approx(gradient)
    assert loss.total.item() == pytest.approx(min(max(ratio, 0.8), 3.0))
    assert loss.clipped.item() == (gradient == 0.0)


@pytest.mark.parametrize(
    ("advantage", "ratio", "gradient"), [(1.0, 0.5, 1.0), (1.0, 1.5, 0.0), (-1.0, 0.5, -1.0), (-1.0, 1.5, 0.0)]
)
def test_the_textbooks_clip_is_wrong_for_negative_advantages(advantage, ratio, gradient):
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    loss = algo.book_policy_loss(logprobs, old, torch.full((1, 1), advantage), mask, clip_low=0.2, clip_high=0.2)
    loss.total.backward()
    assert -logprobs.grad.item() / ratio == pytest.approx(gradient)


def test_clipped_value_loss_takes_the_larger_error():
    values = torch.tensor([[1.0, 1.0, 0.3]], requires_grad=True)
    old, mask = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[True, True, True]])
    loss = algo.clipped_value_loss(values, old, torch.tensor([[2.0, 0.0, 0.0]]), mask, clip=0.5)
    assert loss.total.item() == pytest.approx((1.5**2 + 1.0**2 + 0.3**2) / 2)
    loss.total.backward()
    assert values.grad.tolist()[0] == pytest.approx([0.0, 1.0, 0.3])
    assert loss.clipped.item() == 1


def test_importance_weights_are_truncated():
    mask = torch.tensor([[True, True, False]])
    found = algo.importance_weights(torch.tensor([[0.0, 0.0, 5.0]]), torch.tensor([[-2.0, 1.0, 0.0]]), mask, cap=2.0)
    assert found.tolist()[0] == pytest.approx([2.0, math.exp(-1), 1.0])


def test_histogram_says_what_it_is_told():
    histogram = algo.Histogram(low=-2.0, high=3.0, bins=50, sigma=0.75)
    targets = torch.tensor([-1.0, 0.0, 1.234, 2.5], dtype=torch.float64)
    probabilities = histogram.probabilities(targets)
    assert torch.allclose(probabilities.sum(-1), torch.ones(4, dtype=torch.float64))
    assert torch.allclose(histogram.mean(probabilities.log()), targets, atol=1e-2)
    assert histogram.outside(torch.tensor([[-3.0, 0.0, 4.0]]), torch.tensor([[True, True, False]])) == 1


def test_histogram_loss_is_least_at_the_target():
    histogram = algo.Histogram(low=-2.0, high=2.0, bins=20, sigma=0.75)
    targets, mask = torch.tensor([[0.7]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    logits = histogram.probabilities(targets).log().requires_grad_()
    algo.histogram_value_loss(logits, targets, mask, histogram).backward()
    assert logits.grad.abs().max() < 1e-12


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_running_moments_are_those_of_the_whole(sizes, seed):
    random = torch.Generator().manual_seed(seed)
    parts = [3 + 2 * torch.randn(size, generator=random, dtype=torch.float64) for size in sizes]
    moments = algo.RunningMoments()
    for part in parts:
        moments = moments.after(part)
    whole = torch.cat(parts)
    assert moments.mean == pytest.approx(float(whole.mean()))
    assert moments.variance == pytest.approx(float(whole.var(correction=0)), abs=1e-12)


def test_moments_with_a_memory_follow_a_drift():
    moments = algo.RunningMoments(memory=100.0)
    for scale in (1.0,) * 20 + (50.0,) * 20:
        moments = moments.after(scale * torch.tensor([-1.0, 1.0]).repeat(25))
    assert moments.std == pytest.approx(50.0, rel=0.05)


def test_epochs_follow_the_explained_variance():
    schedule = algo.AdaptiveEpochs(epochs=2, least=1, most=7, raise_below=0.3, lower_above=0.7)
    course = []
    for explained in (0.1, -5.0, 0.5, float("nan"), 0.9, 0.9, 0.9):
        schedule = schedule.after(explained)
        course.append(schedule.epochs)
    assert course == [4, 7, 7, 7, 3, 1, 1]


def test_length_adaptive_lambda():
    found = algo.length_adaptive_lambda(torch.tensor([1, 20, 40, 2000]), alpha=0.05)
    assert found.tolist() == pytest.approx([0.0, 0.0, 0.5, 0.99])


def test_gae_takes_a_lambda_for_each_sequence():
    rewards, values = torch.randn(2, 3, 5, dtype=torch.float64).unbind(0)
    mask = torch.ones(3, 5, dtype=torch.bool)
    found = algo.gae(rewards, values, mask, gamma=1.0, lam=torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    for row, lam in enumerate((0.0, 0.5, 1.0)):
        assert torch.allclose(found[row], algo.gae(rewards, values, mask, gamma=1.0, lam=lam)[row])


def test_critic_quality_by_position_and_decile():
    random = torch.Generator().manual_seed(0)
    values = torch.randn(50, 8, generator=random)
    mask = torch.arange(8)[None] < torch.tensor([8, 4]).repeat(25)[:, None]
    outcomes = values.clone()
    outcomes[:, 4:] = torch.randn(50, 4, generator=random)
    outcomes[1::2, 2:4] = torch.randn(25, 2, generator=random)
    first, second, third, fourth = algo.explained_variance_by_position(values, outcomes, mask, 4)
    assert first == pytest.approx(1.0)
    assert second == pytest.approx(1.0)
    assert third < 0.1
    assert fourth < 0.1
    groups = algo.calibration(values, 2 * values + 1, mask)
    assert sum(group.tokens for group in groups) == int(mask.sum())
    for group in groups:
        assert group.earned == pytest.approx(2 * group.predicted + 1, abs=1e-5)
    assert [group.predicted for group in groups] == sorted(group.predicted for group in groups)
    assert algo.calibration_error(algo.calibration(values, values, mask)) == 0.0
    assert math.isnan(algo.calibration_error([]))


@pytest.mark.parametrize("outcome", [0.0, 0.3, 1e6])
def test_outcomes_that_do_not_vary_explain_nothing(outcome):
    values, mask = torch.randn(1, 7), torch.ones(1, 7, dtype=torch.bool)
    assert math.isnan(algo.explained_variance(values, torch.full((1, 7), outcome), mask))
    assert algo.RunningMoments().after(torch.full((7,), outcome)).std == 1.0


def test_kl_estimators_agree_in_expectation():
    random = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 6, generator=random, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        found = (policy.exp() * algo.kl_estimate(policy, reference, estimator)).sum()
        assert torch.allclose(found, exact)
    assert (algo.kl_estimate(policy, reference, "k3") >= 0).all()
    assert torch.allclose(algo.kl_estimate(policy, reference, "k2"), (policy - reference) ** 2 / 2)
    with pytest.raises(ValueError, match="k4"):
        algo.kl_estimate(policy, reference, "k4")


def test_gradient_of_k2_is_the_gradient_of_the_kl():
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    k2 = algo.kl_estimate(logprobs, reference, "k2")
    (found,) = torch.autograd.grad((logprobs.exp().detach() * k2).sum(), logits)
    assert torch.allclose(found, exact)


def test_adaptive_kl_moves_toward_its_target():
    controller = algo.AdaptiveKl(0.1, target=6.0, horizon=1000.0)
    assert controller.after(12.0, 100).coefficient == pytest.approx(0.1 * 1.02)
    assert controller.after(5.4, 100).coefficient == pytest.approx(0.1 * 0.99)
    assert algo.AdaptiveKl(0.1, target=None, horizon=1000.0).after(99.0, 100).coefficient == 0.1


def test_whitening_ignores_padding():
    x = torch.tensor([[1.0, 2.0, float("nan")], [3.0, 4.0, 5.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    white = algo.whiten(x, mask)
    assert white[0, 2] == 0
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].var(unbiased=False).item() == pytest.approx(1, abs=1e-5)


def test_explained_variance():
    outcomes = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert algo.explained_variance(outcomes, outcomes, mask) == 1.0
    assert algo.explained_variance(torch.full((1, 4), 7.0), outcomes, mask) == 0.0
    assert math.isnan(algo.explained_variance(outcomes, torch.ones(1, 4), mask))


def test_means_over_parts_are_means_over_the_whole():
    sums = algo.Sums()
    sums.add("x", 2.0, 1)
    sums.add("x", 4.0, 3)
    sums.add_largest("most", 3.0)
    sums.add_largest("most", 1.0)
    assert sums.means() == {"x": 1.5, "most": 3.0}


def test_preference_loss_is_bradley_terry():
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    expected = -math.log(1 / (1 + math.exp(-1))) + math.log(2)
    assert algo.preference_loss(chosen, rejected).item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="shapes differ"):
        algo.preference_loss(chosen, rejected[:1])


def test_losses_ignore_what_is_masked():
    mask = torch.tensor([[True, False]])
    values = torch.tensor([[1.0, float("nan")]], requires_grad=True)
    algo.value_loss(values, torch.zeros(1, 2), mask).backward()
    assert values.grad.tolist() == [[1.0, 0.0]]
    assert algo.a2c_policy_loss(torch.tensor([[-2.0, 9.0]]), torch.tensor([[3.0, 9.0]]), mask).item() == 6.0


@pytest.mark.parametrize("vocabulary", [5, 256, 1000])
def test_sampling_follows_the_distribution(vocabulary):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(vocabulary, generator=random) * 3
    logits[::3] = -math.inf
    draws = 200_000
    many = logits.expand(draws // 20, -1)
    tokens, logprobs = algo.sample(many, torch.rand(len(many), generator=random))
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    expected = logits.softmax(-1).double() * len(tokens)
    assert (counts[::3] == 0).all()
    likely = expected > 20
    chi_square = ((counts - expected)[likely].square() / expected[likely]).sum()
    assert chi_square < 2 * likely.sum() + 30
    assert torch.allclose(logprobs, algo.token_logprobs(logits.expand(len(tokens), -1), tokens), atol=1e-5)


def test_truncation_keeps_the_likeliest():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    finite = lambda x: x.isfinite()[0].tolist()  # noqa: E731
    assert finite(algo.truncate(logits, 2, 1.0)) == [True, True, False, False]
    assert finite(algo.truncate(logits, None, 0.6)) == [True, True, False, False]
    assert finite(algo.truncate(logits, None, 1e-9)) == [True, False, False, False]
    assert finite(algo.truncate(logits, 1, 1.0, keep=torch.tensor([3]))) == [True, False, False, True]
    assert algo.truncate(logits, None, 1.0) is logits


def test_margins_ask_for_more_and_centring_draws_to_zero():
    chosen, rejected, margins = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.5]), torch.tensor([0.25, 0.0])
    expected = algo.preference_loss(chosen - margins, rejected).item()
    assert algo.preference_loss(chosen, rejected, margins).item() == pytest.approx(expected)
    assert algo.centring_loss(chosen, rejected).item() == pytest.approx(1.0 + 2.5**2)


def test_accuracy_by_length_finds_a_score_that_is_length():
    torch.manual_seed(0)
    longer_by = torch.randint(-9, 10, (400,))
    zero = torch.zeros(400)
    of_length = algo.accuracy_by_length(longer_by.float(), zero, longer_by)
    assert (of_length.longer, of_length.shorter) == (1.0, 0.0)
    assert of_length.longer_pairs + of_length.shorter_pairs == int((longer_by != 0).sum())
    assert of_length.only_length()
    assert algo.accuracy_by_length(-longer_by.float(), zero, longer_by).only_length()
    assert not algo.accuracy_by_length(torch.ones(400), zero, longer_by).only_length()
    assert not algo.accuracy_by_length(torch.randn(400), zero, longer_by).only_length()
    assert not algo.accuracy_by_length(torch.ones(3), torch.zeros(3), torch.ones(3)).only_length()


def test_calibration_of_preferences():
    torch.manual_seed(0)
    difference = 2 * torch.randn(20_000)
    chosen_wins = torch.rand(20_000) < torch.sigmoid(difference)
    scores = torch.where(chosen_wins, difference, -difference)
    zero = torch.zeros(20_000)
    assert algo.preference_calibration_error(scores, zero) < 0.02
    assert algo.preference_calibration_error(5 * scores, zero) > 0.1


def test_repeated_ngrams_are_counted_within_each_response():
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 9], [5, 5, 5, 5, 5, 5, 0, 0, 0]])
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    assert algo.repeated_ngrams(ids, mask, 4) == (1 + 2, 6 + 3)
    assert algo.repeated_ngrams(ids[:1], mask[:1], 4) == (1, 6)
    assert algo.repeated_ngrams(ids, mask, 10) == (0, 0)
    assert algo.repeated_ngrams(torch.tensor([[7, 8, 7, 8]]), torch.ones(1, 4, dtype=torch.bool), 2) == (1, 3)


def test_repeated_ngrams_are_those_of_a_count_by_hand():
    torch.manual_seed(0)
    ids, lengths = torch.randint(0, 3, (20, 30)), torch.randint(1, 31, (20,))
    mask = torch.arange(30) < lengths[:, None]
    runs = [
        [tuple(row[start : start + 4].tolist()) for start in range(int(length) - 3)]
        for row, length in zip(ids, lengths, strict=True)
    ]
    expected = sum(len(row) - len(set(row)) for row in runs), sum(map(len, runs))
    assert algo.repeated_ngrams(ids, mask, 4) == expected


def test_credit_is_whole_with_lambda_1_and_lost_early_with_td_errors():
    torch.manual_seed(0)
    mask, values = torch.ones(500, 16, dtype=torch.bool), 0.01 * torch.randn(500, 16)
    rewards = torch.zeros(500, 16)
    rewards[:, -1] = torch.randn(500)
    outcomes = algo.gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
    by_lambda = {
        lam: algo.credit_by_position(
            algo.gae(rewards, values, mask, gamma=1.0, lam=lam), values, outcomes, mask, parts=4
        )
        for lam in (0.0, 1.0)
    }
    assert by_lambda[1.0] == pytest.approx([1.0] * 4)
    assert max(map(abs, by_lambda[0.0][:3])) < 0.1
    assert by_lambda[0.0][3] > 0.4


def test_correlation_knows_what_does_not_vary():
    mask = torch.ones(2, 3, dtype=torch.bool)
    rising = torch.arange(6.0).view(2, 3)
    assert algo.correlation(rising, -2 * rising, mask) == pytest.approx(-1.0)
    assert math.isnan(algo.correlation(rising, torch.ones(2, 3), mask))
    assert algo.masked_std(rising, mask).item() == pytest.approx(rising.std(correction=0).item())
