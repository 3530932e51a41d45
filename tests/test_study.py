"""What the study works out from measurements: the expected best of n, and points at equal KL."""

from itertools import combinations

import pytest
import torch

from study.best_of_n import CANDIDATES, course_of
from study.frontier import Point, at_distance, expected_best


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_expected_best_is_the_mean_over_all_choices_of_n(n: int) -> None:
    random = torch.Generator().manual_seed(0)
    chosen_by, scores = (torch.randn(3, 6, generator=random, dtype=torch.float64) for _ in range(2))
    by_hand = [
        scores[prompt, max(subset, key=lambda one: float(chosen_by[prompt, one]))]
        for prompt in range(3)
        for subset in combinations(range(6), n)
    ]
    assert expected_best(chosen_by, scores, n) == pytest.approx(float(torch.stack(by_hand).mean()))


def test_a_point_between_two_that_were_measured() -> None:
    course = [Point(0.0, 0.1, 1.0), Point(1.0, 0.3, 2.0), Point(0.5, 0.2, 1.5), Point(4.0, 0.5, 3.0)]
    assert at_distance(course, 0.25) == Point(0.25, pytest.approx(0.2), pytest.approx(1.5))
    assert at_distance(course, 1.0) == Point(1.0, pytest.approx(0.3), pytest.approx(2.0))
    root_half = 0.5**0.5
    share = (1.5 - root_half) / (2.0 - root_half)
    assert at_distance(course, 2.25) == Point(2.25, pytest.approx(0.2 + 0.3 * share), pytest.approx(1.5 + 1.5 * share))
    assert at_distance(course, 4.5) is None


def test_whoever_chooses_gets_the_better_of_its_own_score() -> None:
    random = torch.Generator().manual_seed(0)
    scores = {name: torch.randn(3, CANDIDATES, generator=random).tolist() for name in ("reward", "gold")}
    by_reward, by_gold = course_of(scores, "reward"), course_of(scores, "gold")
    assert by_reward[0] == by_gold[0], "the best of one is the mean, whoever chooses"
    for one, other in zip(by_reward[1:], by_gold[1:], strict=True):
        assert one.kl == other.kl
        assert one.reward > other.reward
        assert other.gold > one.gold
