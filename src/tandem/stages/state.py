"""What a joint run carries from step to step besides weights, optimisers and random state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from tandem.algo import AdaptiveEpochs, AdaptiveKl, RunningMoments
from tandem.config import KlSection, PpoConfig, WarmupSection
from tandem.run.faults import Faults
from tandem.stages.update import Course
from tandem.types import Batch, Scores

RETURNS_MEMORY = 20_000.0


@dataclass(frozen=True)
class JointState:
    """The course of the run, the adaptive KL, the moments of scores and returns, the value model's epochs, and the
    steps that were skipped.

    The moments of returns remember about the latest 20,000 tokens, so that they follow a drift of scale.
    """

    course: Course
    warmup: WarmupSection | None
    kl: AdaptiveKl
    scores: RunningMoments
    returns: RunningMoments
    value_epochs: AdaptiveEpochs
    faults: Faults

    @property
    def finished(self) -> bool:
        return not self.course.warming_up and self.course.done >= self.course.total

    @property
    def at_last_step(self) -> bool:
        """Whether the step that comes next is known to be the last one."""
        return not self.course.warming_up and self.course.done + 1 >= self.course.total

    @property
    def step(self) -> int:
        """Steps of either kind that are done."""
        return self.course.warmup_done + self.course.done

    def kl_section(self, settings: KlSection) -> KlSection:
        """The settings with the coefficient as it is now."""
        return settings.model_copy(update={"coefficient": self.kl.coefficient})

    def with_scores(self, scores: Scores) -> Self:
        return replace(self, scores=self.scores.after(scores.whole))

    def with_returns(self, batch: Batch) -> Self:
        return replace(self, returns=self.returns.after(batch.returns[batch.tokens.mask]))

    def rehearsing(self) -> Self:
        """The same while the value model learns by itself, one pass at a time, from what was sampled before."""
        once = replace(self.value_epochs, epochs=1)
        return replace(self, course=replace(self.course, warming_up=True), warmup=None, value_epochs=once)

    def after(self, metrics: Mapping[str, float], sequences: int) -> Self:
        """The state after a step with these metrics."""
        explained = metrics["value/explained_variance"]
        resting = self.course.warming_up
        return replace(
            self,
            course=self._next(explained),
            kl=self.kl if resting else self.kl.after(metrics["objective/kl"], sequences),
            value_epochs=self.value_epochs.after(explained),
            faults=self.faults.after_good_step(),
        )

    def after_fault(self) -> Self:
        """The state after a step that was skipped: it counts, and changes nothing else."""
        return replace(self, course=self._next(float("nan")), faults=self.faults.after_fault())

    def as_record(self) -> dict[str, Any]:
        """For checkpoints and the summary: all that is not the recipe's."""
        return {
            "course": asdict(self.course),
            "kl_coefficient": self.kl.coefficient,
            "scores": asdict(self.scores),
            "returns": asdict(self.returns),
            "value_epochs": self.value_epochs.epochs,
            "faults": asdict(self.faults),
        }

    def _next(self, explained_variance: float) -> Course:
        course = self.course
        if not course.warming_up:
            return replace(course, done=course.done + 1)
        done = course.warmup_done + 1
        if self.warmup is None:
            return replace(course, warmup_done=done)
        wanted = self.warmup.explained_variance
        enough = wanted is not None and explained_variance >= wanted
        return replace(course, warmup_done=done, warming_up=not enough and done < self.warmup.steps)


def start_state(config: PpoConfig) -> JointState:
    """Where every run begins."""
    value, kl = config.value, config.kl
    adaptive = value.adaptive
    return JointState(
        course=Course(done=0, total=config.steps, warming_up=value.warmup is not None),
        warmup=value.warmup,
        kl=AdaptiveKl(kl.coefficient, kl.target, kl.horizon),
        scores=RunningMoments(),
        returns=RunningMoments(memory=RETURNS_MEMORY),
        value_epochs=AdaptiveEpochs(
            epochs=value.epochs,
            least=value.epochs,
            most=adaptive.max_epochs if adaptive else value.epochs,
            raise_below=adaptive.raise_below if adaptive else float("-inf"),
            lower_above=adaptive.lower_above if adaptive else float("inf"),
        ),
        faults=Faults(),
    )


def restored_state(config: PpoConfig, record: Mapping[str, Any]) -> JointState:
    """The state that `as_record` wrote down, under a recipe that may plan more steps than it did then."""
    fresh = start_state(config)
    epochs = min(max(record["value_epochs"], fresh.value_epochs.least), fresh.value_epochs.most)
    return replace(
        fresh,
        course=Course(**{**record["course"], "total": config.steps}),
        kl=replace(fresh.kl, coefficient=record["kl_coefficient"]) if fresh.kl.target else fresh.kl,
        scores=RunningMoments(**record["scores"]),
        returns=RunningMoments(**record["returns"]),
        value_epochs=replace(fresh.value_epochs, epochs=epochs),
        faults=Faults(**record["faults"]),
    )
