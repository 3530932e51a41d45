"""Joint training of tables through the project's own `evaluate`, `estimate_advantages` and `update`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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
from tandem.config import KlSection, PpoConfig
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.models.sharing import histogram_of
from tandem.stages.joint import evaluate
from tandem.stages.state import start_state
from tandem.stages.step import judge, learn
from tandem.stages.update import Course, PolicyLearner, ValueLearner, update
from tandem.types import Batch, Rollout, Scores, Trajectories

BUDGET = 10**9


@dataclass(frozen=True)
class Setup:
    """How tables are trained: a recipe's settings, and what a recipe cannot say."""

    episodes: int
    steps: int = 300
    settings: Mapping[str, Any] = field(default_factory=dict)
    unchecked: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings by section that a recipe refuses, to see what it refuses them for."""
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
    config = PpoConfig.model_validate(nested(tree | dict(setup.settings)))
    unchecked = {name: getattr(config, name).model_copy(update=fields) for name, fields in setup.unchecked.items()}
    return config.model_copy(update=unchecked)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in flat.items():
        node, *path = name.split(".")[::-1]
        here = out
        for key in reversed(path):
            here = here.setdefault(key, {})
        here[node] = value
    return out


@dataclass(frozen=True)
class OracleModels:
    """Policy, reference and value model with their learners, as a joint step needs them; tables, or transformers."""

    learners: tuple[PolicyLearner, ValueLearner]
    policy: Any
    reference: Any
    value: Any
    random: torch.Generator

    def evaluate(self, rollouts: Sequence[Rollout], scores: Scores) -> Trajectories:
        return evaluate(rollouts, scores, self.policy, self.reference, self.value, BUDGET)

    def update(self, batch: Batch, kl: KlSection, course: Course, value_epochs: int) -> dict[str, float]:
        return update(*self.learners, batch, kl, BUDGET, self.random, course, value_epochs)

    def rescale_values(self, mean: float, std: float) -> None:
        self.value.rescale(mean, std)


def table_models(task: Task, setup: Setup, config: PpoConfig, seed: int) -> OracleModels:
    policy = TablePolicy(task.reference, task)
    value = TableValue(task, setup.value_start, histogram_of(config.value))
    learners = (
        PolicyLearner(policy, _engine(policy, config.policy), config.policy),
        ValueLearner(value, _engine(value, config.value), config.value),
    )
    reference = policy if setup.anchor_moves else TablePolicy(task.reference, task)
    return OracleModels(learners, policy, reference, value, torch.Generator().manual_seed(seed))


def train(task: Task, setup: Setup, seed: int) -> Result:
    """Sample, judge, learn: `steps` times, after a value warm-up where the settings have one.

    With a staleness of 1 a step learns from what was sampled before the step before it learnt.
    """
    config = recipe(task, setup)
    models = table_models(task, setup, config, seed)
    policy, value = models.policy, models.value
    values, best = optimum(task)
    state, metrics, start_gap = start_state(config), [], gap_of(policy, task, values[0])
    ahead: list[Rollout] | None = None
    while not state.finished:
        rollouts = ahead or sample_rollouts(policy, setup.episodes, models.random)
        if config.rollout.staleness:
            ahead = sample_rollouts(policy, setup.episodes, models.random)
        scores = score_rollouts(rollouts, task)
        state = state.with_scores(scores)
        state, found = learn(models, config, state, judge(models, config, state, rollouts, scores))
        metrics.append(found | {"oracle/gap": gap_of(policy, task, values[0])})
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


@torch.no_grad()
def gap_of(policy: TablePolicy, task: Task, best: Tensor) -> float:
    """(J* - J(pi)) / beta, which is KL(pi || pi*)."""
    return float(best - objective(policy.table(), task)) / task.beta


def _engine(model: torch.nn.Module, settings: Any) -> LocalEngine:
    return LocalEngine([ParameterGroup(list(model.parameters()), settings.lr)], settings)
