"""Joint training of tables through the project's own `evaluate`, `estimate_advantages` and `update`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from oracles.tabular import (
    TablePolicy,
    TableValue,
    Task,
    divergence,
    objective,
    occupancy,
    optimum,
    sample_rollouts,
    score_rollouts,
)
from tandem.algo import Histogram
from tandem.config import PpoConfig
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.stages.joint import estimate_advantages, evaluate
from tandem.stages.measure import measure
from tandem.stages.state import start_state
from tandem.stages.update import PolicyLearner, ValueLearner, update

BUDGET = 10**9


@dataclass(frozen=True)
class Setup:
    """How tables are trained: a recipe's settings, and what a recipe cannot say."""

    episodes: int
    steps: int = 300
    settings: Mapping[str, Any] = field(default_factory=dict)
    value_start: float = 0.0
    anchor_moves: bool = False
    """The reference is the sampling policy of each step, as where one theta_ref stands for both."""


@dataclass(frozen=True)
class Result:
    """Where training ended, held against the exact solution.

    gap: KL(pi || pi*) in nats; value_rmse: of V against V*, weighted by how often the policy comes by, over the
    states before the last token; start_error: |V(start) - V*(start)|; certificates: of each step; policy: its
    log-probabilities [S, V] at the end.
    """

    start_gap: float
    gap: float
    value_rmse: float
    start_error: float
    certificates: list[float]
    metrics: list[dict[str, float]]
    policy: torch.Tensor


def recipe(task: Task, setup: Setup) -> PpoConfig:
    """The settings as a checked recipe: those of the oracles where `setup` is silent."""
    tree: dict[str, Any] = {
        "steps": setup.steps,
        "data.prompts": "none",
        "rewards": [{"function": "none:none"}],
        "policy.model": "table",
        "policy.lr": 0.05,
        "value.lr": 0.1,
        "value.start": "policy",
        "kl.coefficient": task.beta,
    }
    for side in ("policy", "value"):
        tree |= {f"{side}.schedule": "linear", f"{side}.max_grad_norm": 1e9, f"{side}.epochs": 4}
        tree[f"{side}.sequences_per_minibatch"] = setup.episodes
    return PpoConfig.model_validate(nested(tree | dict(setup.settings)))


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in flat.items():
        node, *path = name.split(".")[::-1]
        here = out
        for key in reversed(path):
            here = here.setdefault(key, {})
        here[node] = value
    return out


def train(task: Task, setup: Setup, seed: int) -> Result:
    """Sample, evaluate, estimate, update: `steps` times, after a value warm-up where the settings have one."""
    config = recipe(task, setup)
    random = torch.Generator().manual_seed(seed)
    histogram = None if config.value.histogram is None else Histogram(**config.value.histogram.model_dump())
    policy, value = TablePolicy(task.reference, task), TableValue(task, setup.value_start, histogram)
    fixed_reference = TablePolicy(task.reference, task)
    learners = (
        PolicyLearner(policy, _engine(policy, config.policy), config.policy),
        ValueLearner(value, _engine(value, config.value), config.value),
    )
    values, best = optimum(task)
    start_gap = gap_of(policy, task)
    state, metrics = start_state(config), []
    while not state.finished:
        rollouts = sample_rollouts(policy, setup.episodes, random)
        scores = score_rollouts(rollouts, task)
        reference = policy if setup.anchor_moves else fixed_reference
        trajectories = evaluate(rollouts, scores, policy, reference, value, BUDGET)
        kl = state.kl_section(config.kl)
        batch = estimate_advantages(trajectories, config.advantage, kl, config.policy.importance_cap)
        found = measure(trajectories, batch, scores, config.advantage, kl)
        if config.value.normalize:
            state = state.with_returns(batch)
            value.rescale(state.returns.mean, state.returns.std)
        found |= update(*learners, batch, kl, BUDGET, random, state.course, state.value_epochs.epochs)
        state = state.after(found, len(rollouts))
        metrics.append(found | {"oracle/gap": gap_of(policy, task), "value/epochs": float(state.value_epochs.epochs)})
    reached = occupancy(policy.table().detach(), task)[~task.final]
    errors = (value.table().detach() - values)[~task.final]
    return Result(
        start_gap=start_gap,
        gap=float(divergence(policy.table().detach(), best, task)),
        value_rmse=float(((reached * errors.square()).sum() / reached.sum()).sqrt()),
        start_error=float(errors[0].abs()),
        certificates=[row["objective/certificate"] for row in metrics],
        metrics=metrics,
        policy=policy.table().detach(),
    )


def gap_of(policy: TablePolicy, task: Task) -> float:
    """(J* - J(pi)) / beta, which is KL(pi || pi*)."""
    with torch.no_grad():
        return float(optimum(task)[0][0] - objective(policy.table(), task)) / task.beta


def _engine(model: torch.nn.Module, settings: Any) -> LocalEngine:
    return LocalEngine([ParameterGroup(list(model.parameters()), settings.lr)], settings)
