"""One joint step, between sampling and logging: what was earned is judged, and both models learn from it.

The same functions serve a run of the joint stage and the tables that are held against closed forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem.config import KlSection, PpoConfig
from tandem.rewards.shaping import shape_scores
from tandem.stages.finite import check_batch, check_trajectories
from tandem.stages.joint import estimate_advantages
from tandem.stages.measure import measure
from tandem.stages.state import JointState
from tandem.stages.update import Course
from tandem.types import Batch, Rollout, Scores, Trajectories


class Models(Protocol):
    """Policy, reference and value model with their learners, as a step needs them."""

    def evaluate(self, rollouts: Sequence[Rollout], scores: Scores) -> Trajectories: ...

    def update(self, batch: Batch, kl: KlSection, course: Course, value_epochs: int) -> dict[str, float]: ...

    def rescale_values(self, mean: float, std: float) -> None:
        """Let the value model's head speak in units of `std` around `mean`, every value staying as it was."""
        ...


@dataclass(frozen=True)
class Judged:
    """Rollouts as trajectories, as a batch to learn from, and what they say about the run."""

    trajectories: Trajectories
    batch: Batch
    metrics: dict[str, float]


def judge(models: Models, config: PpoConfig, state: JointState, rollouts: Sequence[Rollout], scores: Scores) -> Judged:
    """Shape the scores, evaluate, estimate, measure; nothing learns.

    Raises NotFinite where anything that would be learnt from is not finite.
    """
    shaped = shape_scores(scores, rollouts, config.score, state.scores, config.rollout.max_new_tokens)
    trajectories, kl = models.evaluate(rollouts, shaped), state.kl_section(config.kl)
    check_trajectories(trajectories)
    batch = estimate_advantages(trajectories, config.advantage, kl, config.importance_cap)
    check_batch(batch)
    return Judged(trajectories, batch, measure(trajectories, batch, scores, config.advantage, kl))


def learn(models: Models, config: PpoConfig, state: JointState, judged: Judged) -> tuple[JointState, dict[str, float]]:
    """Update the models; returns the state after the step and the step's metrics.

    Raises NotFinite where a loss or a gradient is not finite; what would have followed it is left out.
    """
    if config.value.normalize:
        state = state.with_returns(judged.batch)
        models.rescale_values(state.returns.mean, state.returns.std)
    epochs = state.value_epochs.epochs
    metrics = judged.metrics | models.update(judged.batch, state.kl_section(config.kl), state.course, epochs)
    metrics |= {"value/epochs": float(epochs), "value/warming_up": float(state.course.warming_up)}
    return state.after(metrics, len(judged.batch)), metrics
