"""The joint step held against closed forms, with tables in the place of transformers."""

from __future__ import annotations

import pytest
import torch

from oracles.reward_then_policy import draw_pairs, exact_curve, fit_error, fit_reward, gold_on_curve, trained_point
from oracles.settings import COUNTER_ROWS, TREE_ROWS, Row
from oracles.tabular import (
    PROMPT,
    TablePolicy,
    TableValue,
    all_rollouts,
    counter,
    divergence,
    objective,
    occupancy,
    optimum,
    score_rollouts,
    states_of,
    tree,
    value_of,
)
from oracles.training import BUDGET, Setup, train
from oracles.transformer import train_transformer
from tandem import algo
from tandem.config import AdvantageSection, KlSection, OptimizerSection, PolicySection
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.stages.joint import estimate_advantages, evaluate
from tandem.stages.measure import measure
from tandem.stages.update import PolicyLearner, policy_loss_sum, update_policy
from tandem.types import Batch, Rollout, Scores, Trajectories


@pytest.fixture
def task():
    return tree(seed=0)


def exact_value(table, task) -> TableValue:
    value = TableValue(task)
    with torch.no_grad():
        value.answers.copy_(value_of(table, task))
    return value


def everything(table, value, task) -> tuple[Trajectories, Scores]:
    rollouts = all_rollouts(task)
    policy, reference = TablePolicy(table, task), TablePolicy(task.reference, task)
    scores = score_rollouts(rollouts, task)
    return evaluate(rollouts, scores, policy, reference, value, BUDGET), scores


def batch_of(table, value, task, **settings) -> Batch:
    trajectories, _ = everything(table, value, task)
    return estimate_advantages(trajectories, AdvantageSection(**settings), KlSection(coefficient=task.beta))


def sequence_probabilities(table, task) -> torch.Tensor:
    rollouts = all_rollouts(task)
    scores = score_rollouts(rollouts, task)
    policy = TablePolicy(table, task)
    return evaluate(rollouts, scores, policy, policy, TableValue(task), BUDGET).logprobs.sum(1).exp()


def a_policy(task) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn_like(task.reference).log_softmax(-1)


def test_dynamic_programming_is_the_closed_form(task):
    values, policy = optimum(task)
    rewards = score_rollouts(all_rollouts(task), task).total
    weights = sequence_probabilities(task.reference, task).log() + rewards / task.beta
    assert torch.allclose(values[0], task.beta * weights.logsumexp(0), atol=1e-10)
    assert torch.allclose(sequence_probabilities(policy, task).log(), weights.log_softmax(0), atol=1e-10)


def test_td_errors_and_certificate_vanish_at_the_optimum(task):
    values, policy = optimum(task)
    best = TableValue(task)
    with torch.no_grad():
        best.answers.copy_(values)
    assert batch_of(policy, best, task, lambda_policy=0.0).advantages.abs().max() < 1e-10
    trajectories, scores = everything(policy, best, task)
    kl = KlSection(coefficient=task.beta)
    batch = estimate_advantages(trajectories, AdvantageSection(), kl)
    found = measure(trajectories, batch, scores, AdvantageSection(), kl)
    assert found["objective/certificate"] < 1e-10
    elsewhere, value = a_policy(task), exact_value(a_policy(task), task)
    trajectories, _ = everything(elsewhere, value, task)
    found = [
        measure(trajectories, estimate_advantages(trajectories, AdvantageSection(), kl), scores, AdvantageSection(), kl)
        for kl in (kl, KlSection(coefficient=task.beta, placement="loss", estimator="k2"))
    ]
    assert found[0]["objective/certificate"] == found[1]["objective/certificate"]
    td_errors = batch_of(elsewhere, value, task, lambda_policy=0.0).advantages
    assert found[0]["objective/certificate"] == pytest.approx(td_errors.square().mean().sqrt().item())


@pytest.mark.parametrize("which", [tree(seed=0), counter()], ids=["tree", "counter"])
def test_value_of_the_optimal_policy_is_the_optimal_value(which):
    values, policy = optimum(which)
    assert torch.allclose(value_of(policy, which)[0], values[0], atol=1e-10)


@pytest.mark.parametrize("which", [tree(seed=0), counter()], ids=["tree", "counter"])
def test_gap_of_any_policy_is_beta_times_its_divergence(which):
    values, policy = optimum(which)
    other = a_policy(which)
    gap = values[0] - objective(other, which)
    assert torch.allclose(gap, which.beta * divergence(other, policy, which), atol=1e-9)


def test_the_counter_is_the_published_one():
    task = counter()
    assert optimum(task)[0][0].item() == pytest.approx(0.7539, abs=1e-4)
    assert objective(task.reference, task).item() == pytest.approx(-0.1084, abs=1e-4)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("loss", ["ppo", "a2c"])
def test_expected_policy_gradient_is_the_objectives(task, lam, loss):
    table = a_policy(task)
    policy = TablePolicy(table, task)
    objective(policy.table(), task).backward()
    exact = policy.logits.grad.clone()
    policy.zero_grad()
    batch = batch_of(table, exact_value(table, task), task, lambda_policy=lam)
    weighted = weigh(batch, sequence_probabilities(table, task))
    settings = PolicySection(model="table", loss=loss)
    total = policy_loss_sum(policy.logprobs(batch.tokens), None, weighted, settings, KlSection(), algo.Sums())
    total.backward()
    assert torch.allclose(-policy.logits.grad, exact, atol=1e-8)


def weigh(batch: Batch, probabilities: torch.Tensor) -> Batch:
    """A batch of all responses in which each counts as often as it is sampled."""
    weights = probabilities[:, None].expand_as(batch.advantages)
    return Batch(**{**vars(batch), "weights": weights})


def kl_gradient(task, table, estimator: str) -> torch.Tensor:
    policy = TablePolicy(table, task)
    batch = weigh(batch_of(table, TableValue(task), task), sequence_probabilities(table, task))
    estimate = algo.kl_estimate(policy.logprobs(batch.tokens), batch.reference_logprobs, estimator)
    (estimate * batch.weights).sum().backward()
    return policy.logits.grad


def test_gradients_of_the_kl_estimators_are_what_their_docstring_says(task):
    table = a_policy(task)
    reached = torch.where(task.final, 0.0, occupancy(table, task))
    forward, backward = (TablePolicy(table, task) for _ in range(2))
    ours, reference = forward.table(), task.reference
    (reached * (ours.exp() * (ours - reference)).sum(-1)).sum().backward()
    theirs = backward.table()
    (reached * (reference.exp() * (reference - theirs)).sum(-1)).sum().backward()
    assert kl_gradient(task, table, "k1").abs().max() < 1e-10
    assert torch.allclose(kl_gradient(task, table, "k2"), forward.logits.grad, atol=1e-10)
    assert torch.allclose(kl_gradient(task, table, "k3"), backward.logits.grad, atol=1e-10)


def test_entropy_bonus_has_the_gradient_of_the_entropy(task):
    policy, exact = TablePolicy(a_policy(task), task), TablePolicy(a_policy(task), task)
    batch = batch_of(a_policy(task), TableValue(task), task)
    logprobs, entropies = policy.logprobs_and_entropies(batch.tokens)
    settings = PolicySection(model="table", entropy_coefficient=0.5)
    still = Batch(**{**vars(batch), "advantages": torch.zeros_like(batch.advantages)})
    policy_loss_sum(logprobs, entropies, still, settings, KlSection(), algo.Sums()).backward()
    table = exact.table()
    states = states_of(batch.tokens, task)[:, :-1]
    (-0.5 * -(table.exp() * table).sum(-1)[states]).sum().backward()
    assert torch.allclose(policy.logits.grad, exact.logits.grad, atol=1e-10)


def test_update_does_not_depend_on_the_micro_batch(task):
    results = []
    for budget in (6, 60, BUDGET):
        policy = TablePolicy(task.reference, task)
        optimizer = OptimizerSection(lr=0.1, max_grad_norm=1e9)
        engine = LocalEngine([ParameterGroup(list(policy.parameters()), 0.1)], optimizer)
        batch = batch_of(task.reference, TableValue(task), task)
        learner = PolicyLearner(policy, engine, PolicySection(model="table", entropy_coefficient=0.1))
        sums = algo.Sums()
        kl = KlSection(placement="loss", estimator="k2")
        assert update_policy(learner, batch.select(torch.arange(40)), kl, budget, sums)
        results.append((policy.logits.detach(), sums.means()))
    for weights, metrics in results[1:]:
        assert torch.allclose(weights, results[0][0], atol=1e-12)
        assert metrics == pytest.approx(results[0][1])


def test_bootstrap_pays_no_score_at_the_limit():
    task = tree(seed=3, horizon=2)
    rollouts = [Rollout(PROMPT, (0, 1), (0.0, 0.0), "", ended) for ended in (True, False)]
    policy, value = TablePolicy(task.reference, task), TableValue(task, start=0.25)
    trajectories = evaluate(rollouts, Scores(torch.tensor([1.0, 1.0]), {}), policy, policy, value, BUDGET)
    settings = AdvantageSection(at_limit="bootstrap", lambda_policy=0.0)
    batch = estimate_advantages(trajectories, settings, KlSection(coefficient=0.0))
    assert batch.rewards.tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert batch.advantages[0].tolist() == [0.0, 0.75]
    assert batch.advantages[1].tolist() == [0.0, 0.0]


def row(rows: list[Row], name: str) -> Row:
    return next(row for row in rows if row.name.startswith(name))


def trained(rows: list[Row], name: str, steps: int, episodes: int, seed: int = 0):
    """A row of the full table, on fewer and smaller steps."""
    found = row(rows, name)
    setup = Setup(
        episodes=episodes,
        steps=steps,
        settings=found.setup.settings,
        value_start=found.setup.value_start,
        anchor_moves=found.setup.anchor_moves,
    )
    return train(found.task(), setup, seed)


def test_joint_training_reaches_the_optimum():
    found = trained(TREE_ROWS, "default", steps=150, episodes=768)
    assert found.start_gap > 1.0
    assert found.gap < 0.03
    assert found.start_error < 0.02
    assert found.value_rmse < 0.03
    assert found.certificates[-1] < 0.2 * found.certificates[0]


@pytest.mark.long
def test_sampling_one_update_behind_reaches_it_too():
    found = trained(TREE_ROWS, "staleness 1", steps=150, episodes=768)
    assert found.gap < 0.03
    assert found.value_rmse < 0.03
    assert min(row["rollout/importance_weight"] for row in found.metrics[1:]) < 1.0
    assert found.metrics[0]["rollout/importance_weight"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "A2C",
        "normalised returns",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("categorical value head", "adaptive baseline")),
    ],
)
def test_other_losses_reach_it_too(name):
    assert trained(TREE_ROWS, name, steps=80, episodes=512).gap < 0.08


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("KL as a loss, k2", 0.5),
        pytest.param("book preset", 1.0, marks=pytest.mark.long),
        ("one theta_ref", 1.0),
        pytest.param("k2 in", 0.04, marks=pytest.mark.long),
    ],
)
def test_wrong_settings_are_seen_to_fail(name, least):
    assert trained(TREE_ROWS, name, steps=80, episodes=512).gap > least


@pytest.mark.long
def test_a_biased_value_start_collapses_and_its_remedies_bring_it_back():
    steps, episodes = 60, 256
    default = trained(COUNTER_ROWS, "default", steps, episodes)
    collapsed = trained(COUNTER_ROWS, "V starts at 3, TD(0) / TD(0)", steps, episodes)
    assert default.gap < 1.0
    assert collapsed.gap > 5 * default.gap
    for remedy in ("the same, 12 value updates", "V starts at 3, TD(0), adaptive baseline", "V starts at 3, lambda"):
        assert trained(COUNTER_ROWS, remedy, steps, episodes).gap < 0.4 * collapsed.gap


def test_fitted_rewards_come_nearer_with_more_pairs_and_few_pairs_are_overoptimised(task):
    errors, lost = [], []
    for pairs in (2**12, 2**16):
        fitted = fit_reward(task, *draw_pairs(task, pairs, seed=0))
        curve = exact_curve(task, fitted)
        errors.append(fit_error(task, fitted))
        lost.append(max(point.gold for point in curve) - curve[-1].gold)
    assert 2.5 < errors[0] / errors[1] < 6.0
    assert lost[0] > 3 * lost[1]


@pytest.mark.long
def test_training_under_a_fitted_reward_ends_on_the_exact_curve(task):
    fitted = fit_reward(task, *draw_pairs(task, 2**12, seed=0))
    found = trained_point(task, fitted, beta=0.5, seed=0, steps=150)
    assert abs(found.gold - gold_on_curve(exact_curve(task, fitted), found.kl)) < 0.05


def test_a_real_transformer_nears_the_optimum():
    found = train_transformer(seed=0, steps=30, horizon=3, episodes=128)
    assert found.mass_error < 1e-4
    assert max(row["rollout/logprob_mismatch_max"] for row in found.metrics) < 1e-4
    assert found.gap < 0.2 * found.start_gap


def test_a_policy_that_rests_keeps_its_kl_coefficient_and_the_schedules():
    settings = {"kl.target": 1.0, "kl.horizon": 256.0, "value.warmup": {"steps": 3}}
    found = train(tree(seed=0, horizon=2), Setup(episodes=64, steps=2, settings=settings), seed=0).metrics
    assert [row["objective/kl_coefficient"] for row in found[:4]] == [0.5] * 4
    assert found[4]["objective/kl_coefficient"] < 0.5
    assert "policy/lr" not in found[2]
    assert found[2]["value/lr"] == pytest.approx(0.1)
    assert found[3]["value/lr"] == pytest.approx(0.1 * (1 + 0.875 + 0.75 + 0.625) / 4)
