"""The statistics of comparisons, against closed forms, other computations of the same, and simulation."""

from __future__ import annotations

import math

import pytest
import torch

from tandem import algo

WON, TIED, LOST = 1.0, 0.5, 0.0
UNJUDGED = math.nan


def outcomes(wins: int, losses: int, ties: int = 0) -> torch.Tensor:
    """[P, 1]"""
    return torch.tensor([WON] * wins + [LOST] * losses + [TIED] * ties)[:, None]


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def correlated(chance: torch.Tensor, together: float, random: torch.Generator) -> torch.Tensor:
    """Outcomes [P, R] that are won with this chance each [P, R], those of a prompt with one die for all with the chance
    `together`, else with one each."""
    own, shared = (torch.rand(shape, generator=random) for shape in (chance.shape, (len(chance), 1)))
    use_shared = torch.rand(chance.shape, generator=random) < together
    return (torch.where(use_shared, shared.expand_as(own), own) < chance).float()


@pytest.mark.parametrize(("wins", "losses", "low", "high"), [(8, 2, 0.4902, 0.9433), (10, 0, 0.7225, 1.0)])
def test_one_comparison_a_prompt_gives_wilsons_interval(wins, losses, low, high):
    found = algo.win_rate(outcomes(wins, losses))
    assert found.value == wins / (wins + losses)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_ties_count_half_and_what_nobody_judged_not_at_all():
    found = algo.win_rate(torch.cat([outcomes(3, 1, 4), torch.tensor([[UNJUDGED]])]))
    assert found.value == 5 / 8
    nothing = algo.win_rate(torch.full((3, 2), UNJUDGED))
    assert all(math.isnan(number) for number in vars(nothing).values())


def test_responses_that_say_the_same_count_once():
    one_each = outcomes(12, 8)
    copied = one_each.expand(-1, 5)
    assert algo.effective_comparisons(copied) == 20
    assert vars(algo.win_rate(copied)) == pytest.approx(vars(algo.win_rate(one_each)))


def test_independent_responses_count_each():
    random = torch.Generator().manual_seed(0)
    found = algo.effective_comparisons((torch.rand(2000, 5, generator=random) < 0.7).float())
    assert 9000 < found <= 10000


def test_a_clean_sweep_is_no_certainty():
    found = algo.win_rate(torch.ones(10, 4))
    assert found.high == pytest.approx(1.0)
    assert found.low == pytest.approx(0.7225, abs=5e-5)


def test_the_interval_holds_the_truth_as_often_as_it_says_where_responses_are_alike():
    random, truth, draws = torch.Generator().manual_seed(1), 0.7, 1500
    held = held_if_independent = 0
    for _ in range(draws):
        drawn = correlated(torch.full((40, 4), truth), 0.8, random)
        found, naive = algo.win_rate(drawn), algo.win_rate(drawn.reshape(-1, 1))
        held += found.low <= truth <= found.high
        held_if_independent += naive.low <= truth <= naive.high
    assert 0.935 <= held / draws <= 0.97
    assert held_if_independent / draws < 0.85


def test_a_clustered_mean_of_one_value_a_prompt_is_the_plain_one():
    values = torch.tensor([1.0, 4.0, 2.0, 7.0])
    found = algo.clustered_mean(values[:, None])
    assert found.mean == pytest.approx(3.5)
    assert found.standard_error == pytest.approx(float(values.double().std()) / 2)


def test_a_clustered_mean_passes_over_what_is_missing():
    values = torch.tensor([[1.0, UNJUDGED], [4.0, 2.0], [UNJUDGED, UNJUDGED]])
    assert algo.clustered_mean(values).mean == pytest.approx(7 / 3)
    assert math.isnan(algo.clustered_mean(torch.tensor([[2.0, 3.0]])).standard_error)


def test_without_differences_in_length_only_half_a_win_and_half_a_loss_are_added():
    found = algo.length_controlled_win_rate(outcomes(30, 10), torch.zeros(40, 1))
    assert found.value == pytest.approx(30.5 / 41, abs=1e-9)


def test_two_lengths_have_a_closed_form():
    """Each half of the pairs has a chance of its own, with half a win and half a loss added; the middle of their logits
    stands where the lengths are equal."""
    won = torch.cat([outcomes(45, 5), outcomes(20, 30)])
    longer_by = torch.tensor([10.0] * 50 + [-10.0] * 50)[:, None]
    found = algo.length_controlled_win_rate(won, longer_by)
    middle = (logit(45.5 / 51) + logit(20.5 / 51)) / 2
    assert logit(found.value) == pytest.approx(middle, abs=1e-8)
    variance = sum(1 / (51 * p * (1 - p)) for p in (45.5 / 51, 20.5 / 51)) / 4
    reach = (logit(found.high) - logit(found.low)) / 2
    assert reach == pytest.approx(1.96 * math.sqrt(variance), rel=0.02)


def test_a_judge_who_sees_only_length_finds_no_winner_at_equal_length():
    random = torch.Generator().manual_seed(2)
    longer_by = torch.randn(200, 1, generator=random) * 40 + 60
    won = (longer_by > 0).float()
    assert algo.win_rate(won).low > 0.85
    found = algo.length_controlled_win_rate(won, longer_by)
    assert found.low < 0.5 < found.high


def test_a_winner_at_every_length_stays_one():
    random = torch.Generator().manual_seed(3)
    longer_by = torch.randn(300, 1, generator=random) * 30 + 30
    won = (torch.rand(300, 1, generator=random) < 0.8).float()
    found = algo.length_controlled_win_rate(won, longer_by)
    assert found.low > 0.65
    assert found.value == pytest.approx(0.8, abs=0.08)


def test_the_length_controlled_interval_holds_the_truth_as_often_as_it_says():
    random, truth, draws, held = torch.Generator().manual_seed(4), 0.65, 600, 0
    for _ in range(draws):
        longer_by = torch.randn(40, 4, generator=random) * 20 + 15
        effect = torch.tanh(longer_by / longer_by.std(correction=0))
        drawn = correlated(torch.sigmoid(logit(truth) + 1.2 * effect), 0.8, random)
        found = algo.length_controlled_win_rate(drawn, longer_by)
        held += found.low <= truth <= found.high
    assert 0.92 <= held / draws <= 1.0


def test_the_other_sides_view_is_the_mirror_image():
    random = torch.Generator().manual_seed(5)
    longer_by = torch.randn(50, 2, generator=random)
    won = (torch.rand(50, 2, generator=random) < 0.6).float()
    ours = algo.length_controlled_win_rate(won, longer_by)
    theirs = algo.length_controlled_win_rate(1 - won, -longer_by)
    assert (theirs.value, theirs.low, theirs.high) == pytest.approx((1 - ours.value, 1 - ours.high, 1 - ours.low))


def test_a_clean_sweep_stays_finite_and_uncertain_at_equal_length():
    found = algo.length_controlled_win_rate(torch.ones(40, 1), torch.arange(40.0)[:, None])
    assert 0.5 < found.value < 1
    assert found.high - found.low > 0.03


def test_one_difference_in_length_for_all_cannot_be_told_from_the_model():
    found = algo.length_controlled_win_rate(outcomes(5, 5), torch.full((10, 1), 7.0))
    assert all(math.isnan(number) for number in vars(found).values())


def best_of_n_kl(responses: int, n: int) -> float:
    """Exactly, of `responses` equally likely responses with a score each: the best one is the k-th with the chance
    (k/m)^n - ((k-1)/m)^n."""
    chances = [(k / responses) ** n - ((k - 1) / responses) ** n for k in range(1, responses + 1)]
    return sum(p * math.log(p * responses) for p in chances)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_best_of_n_is_never_further_than_its_bound_and_nearly_there_with_many_responses(n):
    bound = algo.best_of_n_kl_bound(n)
    assert best_of_n_kl(3, n) < bound
    assert bound - 0.01 < best_of_n_kl(4000, n) <= bound


def test_distinct_ngrams_over_all_texts():
    assert algo.distinct_ngrams([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4
    assert algo.distinct_ngrams([[5, 5, 5, 5]], 1) == 1 / 4
    assert math.isnan(algo.distinct_ngrams([[1], []], 2))


def test_distance_between_texts():
    assert algo.distance_between([[1, 2, 3], [1, 2, 3]], 2) == 0
    assert algo.distance_between([[1, 2, 3], [4, 5, 6]], 2) == 1
    assert algo.distance_between([[1, 2, 3], [1, 2, 4], [1, 2, 3]], 2) == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert math.isnan(algo.distance_between([[1], [2]], 2))


def test_repeated_ngrams_within_texts():
    ids = torch.tensor([[1, 2, 1, 2, 1], [1, 2, 3, 4, 0]])
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    assert algo.repeated_ngrams(ids, mask, 2) == (2, 7)
    assert algo.repeated_ngrams(ids, mask, 6) == (0, 0)
