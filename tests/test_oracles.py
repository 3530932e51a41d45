"""The joint step held against closed forms, with tables in the place of transformers."""

from __future__ import annotations

import pytest
import torch

from table import (
    PROMPT,
    TablePolicy,
    TableValue,
    all_sequences,
    divergence,
    objective,
    optimum,
    prefixes,
    random_task,
    sample_rollouts,
    score_rollouts,
    sequence_logprobs,
)
from tandem import algo
from tandem.config import AdvantageSection, OptimizerSection
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.stages.joint import (
    PolicyLearner,
    ValueLearner,
    estimate_advantages,
    evaluate,
    update,
    update_policy,
)
from tandem.types import Batch, Rollout, Scores

BUDGET = 10**9


@pytest.fixture
def task():
    return random_task(seed=0)


def everything(task) -> list[Rollout]:
    return [Rollout(PROMPT, tuple(row), (0.0,) * task.horizon, "", True) for row in all_sequences(task).tolist()]


def exact_value(tables, task) -> TableValue:
    """V of a policy under the shaped reward, by dynamic programming."""
    value = TableValue(task)
    following = task.reward
    with torch.no_grad():
        for t in reversed(range(task.horizon)):
            shaped = following.view(-1, task.vocabulary) - task.beta * (tables[t] - task.reference[t])
            following = (tables[t].exp() * shaped).sum(-1)
            value.values_by_step[t].copy_(following)
    return value


def batch_of(tables, value, task, settings: AdvantageSection) -> Batch:
    rollouts = everything(task)
    policy, reference = TablePolicy(tables), TablePolicy(task.reference)
    scores = score_rollouts(rollouts, task)
    return estimate_advantages(evaluate(rollouts, scores, policy, reference, value, BUDGET), settings, task.beta)


def test_dynamic_programming_is_the_closed_form(task):
    values, policy = optimum(task)
    weights = sequence_logprobs(task.reference) + task.reward / task.beta
    assert torch.allclose(values[0], task.beta * weights.logsumexp(0), atol=1e-10)
    assert torch.allclose(sequence_logprobs(policy), weights.log_softmax(0), atol=1e-10)


def test_td_errors_vanish_at_the_optimum(task):
    values, policy = optimum(task)
    best = TableValue(task)
    with torch.no_grad():
        for parameter, exact in zip(best.values_by_step, values, strict=True):
            parameter.copy_(exact)
    td_errors = batch_of(policy, best, task, AdvantageSection(lambda_policy=0.0)).advantages
    assert td_errors.abs().max() < 1e-10


def test_value_of_the_optimal_policy_is_the_optimal_value(task):
    values, policy = optimum(task)
    assert torch.allclose(exact_value(policy, task).values_by_step[0].detach(), values[0], atol=1e-10)


def test_gap_of_any_policy_is_beta_times_its_divergence(task):
    values, policy = optimum(task)
    other = [torch.randn_like(table).log_softmax(-1) for table in policy]
    gap = values[0].item() - objective(other, task)
    assert torch.allclose(gap, task.beta * divergence(other, policy), atol=1e-10)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_expected_policy_gradient_is_the_objectives(task, lam):
    torch.manual_seed(1)
    tables = [torch.randn_like(table).log_softmax(-1) for table in task.reference]
    policy = TablePolicy(tables)
    objective(policy.tables(), task).backward()
    exact = [logits.grad.clone() for logits in policy.logits]
    batch = batch_of(tables, exact_value(tables, task), task, AdvantageSection(lambda_policy=lam))
    probabilities = sequence_logprobs(tables).exp()[:, None]
    policy.zero_grad()
    loss = algo.ppo_policy_loss(
        policy.logprobs(batch.tokens),
        batch.logprobs,
        batch.advantages * probabilities,
        batch.tokens.mask,
        clip_low=0.2,
        clip_high=0.2,
    )
    loss.total.backward()
    for logits, expected in zip(policy.logits, exact, strict=True):
        assert torch.allclose(-logits.grad, expected, atol=1e-8)


def test_update_does_not_depend_on_the_micro_batch(task):
    results = []
    for budget in (6, 60, BUDGET):
        policy = TablePolicy(task.reference)
        optimizer = OptimizerSection(lr=0.1, max_grad_norm=1e9)
        engine = LocalEngine([ParameterGroup(list(policy.parameters()), 0.1)], optimizer, 1)
        batch = batch_of(task.reference, TableValue(task), task, AdvantageSection())
        learner = PolicyLearner(policy, engine, 1, len(batch), 0.2, 0.2)
        sums = algo.Sums()
        update_policy(learner, batch.select(torch.arange(40)), budget, sums)
        results.append((torch.cat([p.detach().flatten() for p in policy.parameters()]), sums.means()))
    for weights, metrics in results[1:]:
        assert torch.allclose(weights, results[0][0], atol=1e-12)
        assert metrics == pytest.approx(results[0][1])


def test_joint_training_reaches_the_optimum(task):
    seed, steps, count = 0, 200, 768
    values, best = optimum(task)
    random = torch.Generator().manual_seed(seed)
    policy, value, reference = TablePolicy(task.reference), TableValue(task), TablePolicy(task.reference)
    epochs = 4

    def engine(model, lr):
        settings = OptimizerSection(lr=lr, schedule="linear", max_grad_norm=1e9)
        return LocalEngine([ParameterGroup(list(model.parameters()), lr)], settings, steps * epochs)

    learners = (
        PolicyLearner(policy, engine(policy, 0.05), epochs, count, 0.2, 0.2),
        ValueLearner(value, engine(value, 0.1), epochs, count),
    )
    start = divergence(policy.tables(), best).item()
    for _ in range(steps):
        rollouts = sample_rollouts(policy, task, count, random)
        trajectories = evaluate(rollouts, score_rollouts(rollouts, task), policy, reference, value, BUDGET)
        batch = estimate_advantages(trajectories, AdvantageSection(), task.beta)
        update(*learners, batch, BUDGET, random)
    assert start > 1.0
    assert divergence(policy.tables(), best).item() < 0.03
    assert abs(value.values_by_step[0].item() - values[0].item()) < 0.02
    occupancy = sequence_logprobs(policy.tables()).exp()
    rows = prefixes(all_sequences(task), task.vocabulary)
    errors = torch.stack(
        [(value.values_by_step[t][rows[:, t]] - values[t][rows[:, t]]).square() for t in range(task.horizon)],
        1,
    )
    assert (occupancy[:, None] * errors).sum(0).mean().sqrt() < 0.03


def test_bootstrap_pays_no_score_at_the_limit():
    task = random_task(seed=3, horizon=2)
    rollouts = [Rollout(PROMPT, (0, 1), (0.0, 0.0), "", ended) for ended in (True, False)]
    policy, value = TablePolicy(task.reference), TableValue(task, start=0.25)
    trajectories = evaluate(rollouts, Scores(torch.tensor([1.0, 1.0]), {}), policy, policy, value, BUDGET)
    batch = estimate_advantages(trajectories, AdvantageSection(at_limit="bootstrap", lambda_policy=0.0), 0.0)
    assert batch.rewards.tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert batch.advantages[0].tolist() == [0.0, 0.75]
    assert batch.advantages[1].tolist() == [0.0, 0.0]
