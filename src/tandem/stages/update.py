"""The joint step's gradients: the policy and the value model learn from a batch; nothing else makes a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tandem import algo
from tandem.config import KlSection, PolicySection, ValueSection
from tandem.types import Batch, Tokens, split_by_tokens


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

    def set_progress(self, done: float, total: float) -> None: ...

    def backward(self, loss: Tensor) -> None: ...

    def gradient(self) -> Tensor:
        """What was added up so far, in one piece."""
        ...

    def discard(self) -> None:
        """Forget it."""
        ...

    def step(self) -> float:
        """Returns the gradient's norm before clipping."""
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


@dataclass(frozen=True)
class Course:
    """Where a run stands: `done` of `total` joint steps, after at most `warmup_total` value-only ones.

    While `warming_up`, `warmup_done` of those are done and the policy rests.
    """

    done: int
    total: int
    warmup_done: int = 0
    warmup_total: int = 0
    warming_up: bool = False

    @property
    def value_done(self) -> int:
        """Steps of the value model's schedule that are behind; a warm-up that ended early counts in full."""
        return self.warmup_done if self.warming_up else self.warmup_total + self.done

    @property
    def value_total(self) -> int:
        return self.warmup_total + self.total


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
        planned = updates_in(batch, policy.settings.epochs, policy.settings.sequences_per_minibatch)
        minibatches = shuffled(batch, policy.settings.epochs, policy.settings.sequences_per_minibatch, random)
        for number, minibatch in enumerate(minibatches):
            policy.engine.set_progress(course.done * planned + number, course.total * planned)
            if not update_policy(policy, minibatch, kl, tokens_per_microbatch, sums):
                break
    epochs = value_epochs or value.settings.epochs
    planned = updates_in(batch, epochs, value.settings.sequences_per_minibatch)
    for number, minibatch in enumerate(shuffled(batch, epochs, value.settings.sequences_per_minibatch, random)):
        value.engine.set_progress(course.value_done * planned + number, course.value_total * planned)
        update_value(value, minibatch, tokens_per_microbatch, sums)
    return dict(sums.means())


def update_shared(
    learner: SharedLearner,
    batch: Batch,
    kl: KlSection,
    tokens_per_microbatch: int,
    random: torch.Generator,
    course: Course,
) -> dict[str, float]:
    """Train policy and value head by one gradient; while the policy rests, the head alone."""
    sums = algo.Sums()
    settings = learner.policy
    planned = updates_in(batch, settings.epochs, settings.sequences_per_minibatch)
    for number, minibatch in enumerate(shuffled(batch, settings.epochs, settings.sequences_per_minibatch, random)):
        learner.engine.set_progress(course.value_done * planned + number, course.value_total * planned)
        if number == 0 and not learner.stop_gradient and not course.warming_up:
            sums.add("policy/value_gradient_cosine", gradient_cosine(learner, minibatch, kl, tokens_per_microbatch), 1)
        if not update_both(learner, minibatch, kl, tokens_per_microbatch, sums, train_policy=not course.warming_up):
            break
    return dict(sums.means())


def update_policy(
    policy: PolicyLearner, minibatch: Batch, kl: KlSection, tokens_per_microbatch: int, sums: algo.Sums
) -> bool:
    """One optimiser step of the policy; False where it was left out since the policy had moved too far already."""
    count, own = minibatch.tokens.mask.sum(), algo.Sums()
    sums.add("policy/lr", policy.engine.lr, 1)
    for part in microbatches(minibatch, tokens_per_microbatch):
        entropies: Tensor | None = None
        if policy.settings.entropy_coefficient > 0:
            logprobs, entropies = policy.model.logprobs_and_entropies(part.tokens)
        else:
            logprobs = policy.model.logprobs(part.tokens)
        policy.engine.backward(policy_objective(logprobs, entropies, part, policy.settings, kl, own) / count)
    return finish_policy(policy.engine, policy.settings, own, sums)


def finish_policy(engine: Engine, settings: PolicySection, own: algo.Sums, sums: algo.Sums) -> bool:
    """Take the optimiser's step, or leave it out where the minibatch's approximate KL is beyond what is allowed."""
    limit = settings.max_approx_kl
    sums.merge(own)
    go_on = limit is None or own.means()["policy/approx_kl"] <= limit
    sums.add("policy/stopped_early", float(not go_on), 1)
    if not go_on:
        engine.discard()
        return False
    sums.add("policy/grad_norm", engine.step(), 1)
    sums.add_total("policy/updates", 1)
    return True


def policy_objective(
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
        ratio = algo.probability_ratio(logprobs, part.logprobs, mask)
        sums.add("policy/approx_kl", algo.masked_sum(ratio - 1 - ratio.log(), mask), tokens)
        sums.add("policy/ratio_mean", algo.masked_sum(ratio, mask), tokens)
        sums.add_largest("policy/ratio_max", ratio[mask].max())
    return total


def update_value(value: ValueLearner, minibatch: Batch, tokens_per_microbatch: int, sums: algo.Sums) -> None:
    """One optimiser step of the value model."""
    count = minibatch.tokens.mask.sum()
    sums.add("value/lr", value.engine.lr, 1)
    for part in microbatches(minibatch, tokens_per_microbatch):
        read = value.model.values if value.settings.loss == "mse" else value.model.bin_logits
        loss = value_objective(read(part.tokens), part, value.settings, value.model.scale, sums)
        value.engine.backward(loss / count)
    sums.add("value/grad_norm", value.engine.step(), 1)
    sums.add_total("value/updates", 1)


def value_objective(answers: Tensor, part: Batch, settings: ValueSection, scale: float, sums: algo.Sums) -> Tensor:
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
    train_policy: bool,
) -> bool:
    """One optimiser step of policy and value head together."""
    count, own = minibatch.tokens.mask.sum(), algo.Sums()
    own.add("policy/lr", learner.engine.lr, 1)
    for part in microbatches(minibatch, tokens_per_microbatch):
        by_policy, by_value = both_objectives(learner, part, kl, own, train_policy)
        loss = by_policy + learner.value.coefficient * by_value if train_policy else by_value
        learner.engine.backward(loss / count)
    if train_policy:
        return finish_policy(learner.engine, learner.policy, own, sums)
    sums.merge(own)
    sums.add("value/grad_norm", learner.engine.step(), 1)
    return True


def both_objectives(
    learner: SharedLearner, part: Batch, kl: KlSection, sums: algo.Sums, train_policy: bool
) -> tuple[Tensor, Tensor]:
    """The two losses of a micro-batch from one pass; that of a policy that rests is 0."""
    logprobs, entropies, answers = learner.model.logprobs_and_values(
        part.tokens,
        entropies=learner.policy.entropy_coefficient > 0,
        stop_gradient=learner.stop_gradient or not train_policy,
    )
    by_value = value_objective(answers, part, learner.value, learner.model.scale, sums)
    if not train_policy:
        return torch.zeros_like(by_value), by_value
    return policy_objective(logprobs, entropies, part, learner.policy, kl, sums), by_value


def gradient_cosine(learner: SharedLearner, minibatch: Batch, kl: KlSection, tokens_per_microbatch: int) -> float:
    """Cosine between the gradients of the two losses where they share parameters; below 0 they pull apart.

    The head is reached by the value loss alone and the policy's output matrix by the policy loss alone, so over all
    parameters the inner product is that over the shared ones; the norms are taken over those that both reach.
    """
    gradients = []
    for which in (0, 1):
        for part in microbatches(minibatch, tokens_per_microbatch):
            learner.engine.backward(both_objectives(learner, part, kl, algo.Sums(), True)[which])
        gradients.append(learner.engine.gradient())
        learner.engine.discard()
    shared = (gradients[0] != 0) & (gradients[1] != 0)
    one, other = gradients[0][shared], gradients[1][shared]
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def updates_in(batch: Batch, epochs: int, size: int) -> int:
    """How many optimiser steps a batch makes."""
    return epochs * -(-len(batch) // size)


def shuffled(batch: Batch, epochs: int, size: int, random: torch.Generator) -> Iterator[Batch]:
    """The batch in a new random order for each epoch, `size` sequences at a time."""
    for _ in range(epochs):
        order = torch.randperm(len(batch), generator=random).to(batch.tokens.ids.device)
        for rows in order.split(size):
            yield batch.select(rows)


def microbatches(batch: Batch, tokens_per_microbatch: int) -> Iterator[Batch]:
    """A minibatch in parts that fit in memory; the gradient of their sum does not depend on how it was split."""
    for rows in split_by_tokens(batch.tokens.lengths, tokens_per_microbatch):
        yield batch.select(rows)
