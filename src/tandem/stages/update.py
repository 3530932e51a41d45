"""The joint step's gradients: the policy and the value model learn from a batch; nothing else makes a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tandem import algo
from tandem.config import KlSection, PolicySection, ValueSection
from tandem.stages.finite import check_losses
from tandem.stages.together import of_all
from tandem.types import Batch, Tokens
from tandem.world import world


class Policy(Protocol):
    def logprobs(self, tokens: Tokens) -> Tensor:
        """[B, T], zero where masked."""
        ...

    def logprobs_and_entropies(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """[B, T] each, zero where masked; asked for only where the entropy earns a bonus."""
        ...


class ValueModel(Protocol):
    @property
    def scale(self) -> float:
        """What one unit of the head's answer is in units of the reward."""
        ...

    def values(self, tokens: Tokens) -> Tensor:
        """[B, T + 1]: of the states before each response token and after the last one."""
        ...

    def bin_logits(self, tokens: Tokens) -> Tensor:
        """[B, T + 1, K]: of a categorical head; asked for only where the loss is that of one."""
        ...


class SharedModel(Protocol):
    """A policy and a value model on the same trunk: one pass answers for both."""

    @property
    def scale(self) -> float: ...

    def logprobs_and_values(
        self, tokens: Tokens, *, entropies: bool, stop_gradient: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """[B, T], [B, T] or None, and [B, T + 1] values, or [B, T + 1, K] logits of a categorical head.

        With `stop_gradient` the values send none into the trunk.
        """
        ...


class Engine(Protocol):
    @property
    def lr(self) -> float: ...

    def set_progress(self, done: float, total: float) -> None:
        """Set the learning rate to where its schedule stands."""
        ...

    def set_peak(self) -> None:
        """Set it to its peak, where no schedule runs."""
        ...

    def set_share(self, share: float) -> None:
        """Let it be this share of what the schedule says from the next update on."""
        ...

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Add the loss's gradient to what the next step will use."""
        ...

    def take(self) -> list[Tensor | None]:
        """What was added up so far, a tensor a parameter; the engine forgets it."""
        ...

    def put(self, gradients: Sequence[Tensor | None]) -> None:
        """Add gradients, a tensor a parameter, to what the next step will use."""
        ...

    def product(self, one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> float:
        """The inner product of two gradients as `take` gives them, over the parameters that both reach."""
        ...

    def discard(self) -> None:
        """Forget what was added up."""
        ...

    def step(self) -> float:
        """Returns the gradient's norm before clipping; raises NotFinite, with the weights as they were, for one that
        is not finite."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Weights and the optimiser's state by name, no copies."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        ...


@dataclass(frozen=True)
class PolicyLearner:
    """A policy and how it learns."""

    model: Policy
    engine: Engine
    settings: PolicySection


@dataclass(frozen=True)
class ValueLearner:
    """A value model and how it learns."""

    model: ValueModel
    engine: Engine
    settings: ValueSection


@dataclass(frozen=True)
class SharedLearner:
    """A policy with a value head on its trunk, and how they learn: one gradient for both losses."""

    model: SharedModel
    engine: Engine
    policy: PolicySection
    value: ValueSection
    stop_gradient: bool
    cosine_every: int


@dataclass(frozen=True)
class Course:
    """Where a run stands: `done` of `total` joint steps, after `warmup_done` value-only ones.

    While `warming_up` the policy rests, and the value model learns at its peak rate: schedules span the joint steps.
    """

    done: int
    total: int
    warmup_done: int = 0
    warming_up: bool = False


def update(
    policy: PolicyLearner,
    value: ValueLearner,
    batch: Batch,
    kl: KlSection,
    tokens_per_microbatch: int,
    random: torch.Generator,
    course: Course,
    value_epochs: int | None = None,
) -> dict[str, float]:
    """Train the policy, unless it rests, and then the value model; returns the step's metrics."""
    sums = algo.Sums()
    if not course.warming_up:
        settings = policy.settings
        for minibatch in scheduled(policy.engine, batch, settings.epochs, settings, random, course):
            if not update_policy(policy, minibatch, kl, tokens_per_microbatch, sums):
                break
    epochs = value_epochs or value.settings.epochs
    for minibatch in scheduled(value.engine, batch, epochs, value.settings, random, course):
        update_value(value, minibatch, tokens_per_microbatch, sums)
    return dict(sums.means())


def update_shared(
    learner: SharedLearner,
    batch: Batch,
    kl: KlSection,
    tokens_per_microbatch: int,
    random: torch.Generator,
    course: Course,
    value_epochs: int | None = None,
) -> dict[str, float]:
    """Train policy and value head by one gradient; while the policy rests, or has moved too far, the head alone."""
    sums = algo.Sums()
    resting = course.warming_up
    epochs = value_epochs if resting and value_epochs else learner.policy.epochs
    with_cosine = not resting and not learner.stop_gradient and course.done % learner.cosine_every == 0
    for minibatch in scheduled(learner.engine, batch, epochs, learner.policy, random, course):
        if not resting:
            resting = not update_both(learner, minibatch, kl, tokens_per_microbatch, sums, with_cosine=with_cosine)
            with_cosine = False
        if resting:
            update_head(learner, minibatch, tokens_per_microbatch, sums)
    return dict(sums.means())


def scheduled(
    engine: Engine,
    batch: Batch,
    epochs: int,
    settings: PolicySection | ValueSection,
    random: torch.Generator,
    course: Course,
) -> Iterator[Batch]:
    """The batch in a new random order for each epoch, a minibatch at a time, each at its own learning rate."""
    size = settings.sequences_per_minibatch
    planned = epochs * -(-len(batch) // size)
    number = 0
    for _ in range(epochs):
        order = torch.randperm(len(batch), generator=random).to(batch.tokens.ids.device)
        for rows in order.split(size):
            if course.warming_up:
                engine.set_peak()
            else:
                engine.set_progress(course.done * planned + number, course.total * planned)
            yield batch.select(rows)
            number += 1


def update_policy(
    policy: PolicyLearner, minibatch: Batch, kl: KlSection, tokens_per_microbatch: int, sums: algo.Sums
) -> bool:
    """One optimiser step of the policy; False where it was left out since the policy had moved too far already."""
    count, own = minibatch.tokens.mask.sum(), algo.Sums()
    sums.add("policy/lr", policy.engine.lr, 1)
    for part, weight in microbatches(minibatch, tokens_per_microbatch):
        entropies: Tensor | None = None
        if policy.settings.entropy_coefficient > 0:
            logprobs, entropies = policy.model.logprobs_and_entropies(part.tokens)
        else:
            logprobs = policy.model.logprobs(part.tokens)
        counted = own if weight else algo.Sums()
        loss = policy_loss_sum(logprobs, entropies, part, policy.settings, kl, counted)
        policy.engine.backward(weight * loss / count)
    return finish_policy(policy.engine, policy.settings, of_all(own), sums)


def finish_policy(engine: Engine, settings: PolicySection, own: algo.Sums, sums: algo.Sums) -> bool:
    """Take the optimiser's step, or leave it out where the minibatch's approximate KL is beyond what is allowed."""
    check_losses(own, engine)
    limit, distance = settings.max_approx_kl, own.means()["policy/approx_kl"]
    go_on = limit is None or distance <= limit
    if limit is not None:
        sums.add_largest("policy/stopped_early", float(not go_on))
    if not go_on:
        engine.discard()
        sums.add_largest("policy/approx_kl_at_stop", distance)
        return False
    sums.merge(own)
    sums.add("policy/grad_norm", engine.step(), 1)
    sums.add_total("policy/updates", 1)
    return True


def policy_loss_sum(
    logprobs: Tensor, entropies: Tensor | None, part: Batch, settings: PolicySection, kl: KlSection, sums: algo.Sums
) -> Tensor:
    """The policy's loss, summed over tokens: surrogate, KL where it is placed in the loss, entropy bonus."""
    mask, tokens = part.tokens.mask, part.tokens.mask.sum()
    clipped = torch.zeros((), device=mask.device)
    if settings.loss == "a2c":
        total = algo.a2c_policy_loss(logprobs, part.advantages, mask, weights=part.weights)
    else:
        if settings.loss == "ppo":
            surrogate = algo.ppo_policy_loss(
                logprobs,
                part.logprobs,
                part.advantages,
                mask,
                clip_low=settings.clip_low,
                clip_high=settings.clip_high,
                dual_clip=settings.dual_clip,
                weights=part.weights,
            )
        else:
            surrogate = algo.book_policy_loss(
                logprobs,
                part.logprobs,
                part.advantages,
                mask,
                clip_low=settings.clip_low,
                clip_high=settings.clip_high,
                weights=part.weights,
            )
        total, clipped = surrogate.total, surrogate.clipped
    sums.add("policy/loss", total.detach(), tokens)
    sums.add("policy/clipfrac", clipped, tokens)
    if kl.placement == "loss":
        penalty = algo.masked_sum(algo.kl_estimate(logprobs, part.reference_logprobs, kl.estimator), mask)
        total = total + kl.coefficient * penalty
        sums.add("policy/kl_loss", penalty.detach(), tokens)
    if entropies is not None:
        bonus = algo.masked_sum(entropies, mask)
        total = total - settings.entropy_coefficient * bonus
        sums.add("policy/exact_entropy", bonus.detach(), tokens)
    with torch.no_grad():
        log_ratio = (logprobs - part.logprobs).masked_fill(~mask, 0.0)
        ratio = log_ratio.exp()
        sums.add("policy/approx_kl", algo.masked_sum(ratio - 1 - log_ratio, mask), tokens)
        sums.add("policy/ratio_mean", algo.masked_sum(ratio, mask), tokens)
        sums.add_largest("policy/ratio_max", ratio[mask].max())
    return total


def update_value(value: ValueLearner, minibatch: Batch, tokens_per_microbatch: int, sums: algo.Sums) -> None:
    """One optimiser step of the value model."""
    count, own = minibatch.tokens.mask.sum(), algo.Sums()
    own.add("value/lr", value.engine.lr, 1)
    for part, weight in microbatches(minibatch, tokens_per_microbatch):
        read = value.model.values if value.settings.loss == "mse" else value.model.bin_logits
        counted = own if weight else algo.Sums()
        loss = value_loss_sum(read(part.tokens), part, value.settings, value.model.scale, counted)
        value.engine.backward(weight * loss / count)
    own = of_all(own)
    check_losses(own, value.engine)
    sums.merge(own)
    sums.add("value/grad_norm", value.engine.step(), 1)
    sums.add_total("value/updates", 1)


def value_loss_sum(answers: Tensor, part: Batch, settings: ValueSection, scale: float, sums: algo.Sums) -> Tensor:
    """The value model's loss, summed over tokens, in units of its head; logged in units of the reward.

    `answers` are values [B, T + 1], or logits [B, T + 1, K] of a categorical head.
    """
    mask, answers = part.tokens.mask, answers[:, :-1]
    tokens = mask.sum()
    if settings.histogram is not None:
        histogram = algo.Histogram(**settings.histogram.model_dump())
        total = algo.histogram_value_loss(answers, part.returns, mask, histogram)
        sums.add("value/outside_range", histogram.outside(part.returns, mask), tokens)
    elif settings.clip is not None:
        held = algo.clipped_value_loss(answers, part.values, part.returns, mask, clip=settings.clip)
        total = held.total
        sums.add("value/clipfrac", held.clipped, tokens)
    else:
        total = algo.value_loss(answers, part.returns, mask)
    sums.add("value/loss", total.detach(), tokens)
    return total / scale**2


def update_both(
    learner: SharedLearner,
    minibatch: Batch,
    kl: KlSection,
    tokens_per_microbatch: int,
    sums: algo.Sums,
    *,
    with_cosine: bool = False,
) -> bool:
    """One optimiser step of policy and value head together; False where it was left out, as in `update_policy`.

    With `with_cosine`, the two losses go backward one after the other, and the angle between their gradients is
    logged.
    """
    count, own = minibatch.tokens.mask.sum(), algo.Sums()
    engine, cosine = learner.engine, GradientCosine(learner.engine)
    own.add("policy/lr", engine.lr, 1)
    for part, weight in microbatches(minibatch, tokens_per_microbatch):
        counted = own if weight else algo.Sums()
        by_policy, by_value = both_loss_sums(learner, part, kl, counted, stop_gradient=learner.stop_gradient)
        by_policy, by_value = weight * by_policy / count, weight * learner.value.coefficient * by_value / count
        if with_cosine:
            engine.backward(by_policy, retain_graph=True)
            cosine.of_policy(engine.take())
            engine.backward(by_value)
            cosine.of_value(engine.take())
        else:
            engine.backward(by_policy + by_value)
    if with_cosine:
        angle, ratio = cosine.values()
        sums.add("policy/value_gradient_cosine", angle, 1)
        sums.add("policy/value_gradient_ratio", ratio, 1)
        engine.put(cosine.total())
    return finish_policy(engine, learner.policy, of_all(own), sums)


def update_head(learner: SharedLearner, minibatch: Batch, tokens_per_microbatch: int, sums: algo.Sums) -> None:
    """One optimiser step of the value head alone."""
    count, own = minibatch.tokens.mask.sum(), algo.Sums()
    for part, weight in microbatches(minibatch, tokens_per_microbatch):
        answers = learner.model.logprobs_and_values(part.tokens, entropies=False, stop_gradient=True)[2]
        counted = own if weight else algo.Sums()
        by_value = value_loss_sum(answers, part, learner.value, learner.model.scale, counted)
        learner.engine.backward(weight * learner.value.coefficient * by_value / count)
    own = of_all(own)
    check_losses(own, learner.engine)
    sums.merge(own)
    sums.add("value/grad_norm", learner.engine.step(), 1)
    sums.add_total("value/updates", 1)


def both_loss_sums(
    learner: SharedLearner, part: Batch, kl: KlSection, sums: algo.Sums, *, stop_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The policy's and the value model's loss of a micro-batch from one pass, each summed over tokens."""
    logprobs, entropies, answers = learner.model.logprobs_and_values(
        part.tokens, entropies=learner.policy.entropy_coefficient > 0, stop_gradient=stop_gradient
    )
    by_value = value_loss_sum(answers, part, learner.value, learner.model.scale, sums)
    return policy_loss_sum(logprobs, entropies, part, learner.policy, kl, sums), by_value


class GradientCosine:
    """The angle between two losses' gradients over the parameters that both reach; below 0 they pull apart."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._policy: list[Tensor | None] = []
        self._value: list[Tensor | None] = []

    def of_policy(self, gradients: list[Tensor | None]) -> None:
        """Add a micro-batch's gradient of the policy loss, a tensor a parameter."""
        self._policy = _added(self._policy, gradients)

    def of_value(self, gradients: list[Tensor | None]) -> None:
        """Add a micro-batch's gradient of the value loss, a tensor a parameter."""
        self._value = _added(self._value, gradients)

    def total(self) -> list[Tensor | None]:
        """The gradient of both together."""
        return _added(self._policy, self._value)

    def values(self) -> tuple[float, float]:
        """The cosine, and how many times the policy's gradient the value's is, on what they share; NaN where one of the
        two is zero there, as with a head that answers 0."""
        product = self._engine.product
        shared = [one is not None and other is not None for one, other in zip(self._policy, self._value, strict=True)]
        of_policy, of_value = (
            [one if both else None for one, both in zip(side, shared, strict=True)]
            for side in (self._policy, self._value)
        )
        norms = [math.sqrt(product(side, side)) for side in (of_policy, of_value)]
        if min(norms) == 0:
            return float("nan"), float("nan")
        return product(of_policy, of_value) / (norms[0] * norms[1]), norms[1] / norms[0]


def _added(one: list[Tensor | None], other: list[Tensor | None]) -> list[Tensor | None]:
    if not one:
        return other
    return [b if a is None else a if b is None else a + b for a, b in zip(one, other, strict=True)]


def microbatches(batch: Batch, tokens_per_microbatch: int) -> Iterator[tuple[Batch, float]]:
    """This process's share of a minibatch in parts that fit in memory, each with the weight that its loss has: 1, or 0
    where it only goes along. The gradient of their sum does not depend on how the minibatch was split."""
    for rows, weight in world().deal(batch.tokens.lengths, tokens_per_microbatch):
        yield batch.select(rows), weight
