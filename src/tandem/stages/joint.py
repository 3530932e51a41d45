"""The joint step: measure what was sampled, estimate advantages, update policy and value model.

A policy is asked only for log-probabilities of given tokens and a value model only for values, so the same code
trains a transformer and a table, and the table is how it is held against closed forms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tandem import algo
from tandem.config import AdvantageSection
from tandem.types import Batch, Rollout, Scores, Tokens, Trajectories, pad_tokens, split_by_tokens


class Policy(Protocol):
    def prepare(self, tokens: Tokens, tokens_per_microbatch: int) -> Tokens:
        """The tokens on the model's device, with whatever all later passes over them can share."""
        ...

    def logprobs(self, tokens: Tokens) -> Tensor:
        """[B, T], zero where masked."""
        ...


class ValueModel(Protocol):
    def values(self, tokens: Tokens) -> Tensor:
        """[B, T + 1]: of the states before each response token and after the last one."""
        ...


class Engine(Protocol):
    @property
    def lr(self) -> float: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> float:
        """Returns the gradient's norm before clipping."""
        ...


@dataclass(frozen=True)
class PolicyLearner:
    """A policy and how it learns."""

    model: Policy
    engine: Engine
    epochs: int
    sequences_per_minibatch: int
    clip_low: float
    clip_high: float


@dataclass(frozen=True)
class ValueLearner:
    """A value model and how it learns."""

    model: ValueModel
    engine: Engine
    epochs: int
    sequences_per_minibatch: int


@torch.no_grad()
def evaluate(
    rollouts: Sequence[Rollout],
    scores: Scores,
    policy: Policy,
    reference: Policy,
    value: ValueModel,
    tokens_per_microbatch: int,
) -> Trajectories:
    """Measure rollouts under the models as they are before the updates."""
    tokens = pad_tokens([rollout.prompt.ids for rollout in rollouts], [rollout.ids for rollout in rollouts])
    tokens = policy.prepare(tokens, tokens_per_microbatch)
    device = tokens.ids.device
    behaviour = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(rollout.logprobs) for rollout in rollouts], batch_first=True
    )
    values = in_parts(value.values, tokens, tokens_per_microbatch, extra_columns=1)
    after_last = tokens.response_lengths[:, None]
    return Trajectories(
        tokens=tokens,
        behaviour_logprobs=behaviour.to(device),
        logprobs=in_parts(policy.logprobs, tokens, tokens_per_microbatch),
        reference_logprobs=in_parts(reference.logprobs, tokens, tokens_per_microbatch),
        values=torch.where(tokens.mask, values[:, :-1], 0.0),
        final_values=values.gather(1, after_last).squeeze(1),
        ended=torch.tensor([rollout.ended for rollout in rollouts], device=device),
        scores=scores.total.to(device),
    )


def in_parts(
    function: Callable[[Tokens], Tensor], tokens: Tokens, tokens_per_microbatch: int, extra_columns: int = 0
) -> Tensor:
    """A per-token function over all rows, a micro-batch at a time: [B, T + extra_columns]."""
    out: Tensor | None = None
    for rows in split_by_tokens(tokens.lengths, tokens_per_microbatch):
        part = function(tokens.select(rows))
        if out is None:
            out = part.new_zeros(len(tokens), tokens.mask.shape[1] + extra_columns)
        out[rows, : part.shape[1]] = part
    assert out is not None
    return out


def estimate_advantages(trajectories: Trajectories, settings: AdvantageSection, kl_coefficient: float) -> Batch:
    """Rewards with the KL inside them, advantages for the policy, targets for the value model.

    A response cut at the length limit either is paid its score as at an end (`score`), or is paid nothing and
    the value of its last state stands for what would follow (`bootstrap`); paying both would count the end twice.
    """
    scores, final_values = trajectories.scores, torch.zeros_like(trajectories.final_values)
    if settings.at_limit == "bootstrap":
        scores = torch.where(trajectories.ended, scores, torch.zeros_like(scores))
        final_values = torch.where(trajectories.ended, final_values, trajectories.final_values)
    mask, values = trajectories.mask, trajectories.values
    rewards = algo.token_rewards(scores, trajectories.logprobs, trajectories.reference_logprobs, mask, kl_coefficient)

    def advantages(lam: float) -> Tensor:
        return algo.gae(rewards, values, mask, gamma=settings.gamma, lam=lam, final_values=final_values)

    for_policy = advantages(settings.lambda_policy)
    return Batch(
        tokens=trajectories.tokens,
        logprobs=trajectories.logprobs,
        values=values,
        rewards=rewards,
        advantages=algo.whiten(for_policy, mask) if settings.whiten else for_policy,
        returns=advantages(settings.lambda_value) + values,
    )


def update(
    policy: PolicyLearner,
    value: ValueLearner,
    batch: Batch,
    tokens_per_microbatch: int,
    random: torch.Generator,
) -> dict[str, float]:
    """Train the policy and the value model on a batch; the only place where gradients are made."""
    sums = algo.Sums()
    sums.add("policy/lr", policy.engine.lr, 1)
    sums.add("value/lr", value.engine.lr, 1)
    for minibatch in minibatches(batch, policy.epochs, policy.sequences_per_minibatch, random):
        update_policy(policy, minibatch, tokens_per_microbatch, sums)
    for minibatch in minibatches(batch, value.epochs, value.sequences_per_minibatch, random):
        update_value(value, minibatch, tokens_per_microbatch, sums)
    return dict(sums.means())


def update_policy(policy: PolicyLearner, minibatch: Batch, tokens_per_microbatch: int, sums: algo.Sums) -> None:
    """One optimiser step of the policy."""
    count = minibatch.tokens.mask.sum()
    for part in microbatches(minibatch, tokens_per_microbatch):
        mask = part.tokens.mask
        loss = algo.ppo_policy_loss(
            policy.model.logprobs(part.tokens),
            part.logprobs,
            part.advantages,
            mask,
            clip_low=policy.clip_low,
            clip_high=policy.clip_high,
        )
        policy.engine.backward(loss.total / count)
        tokens = mask.sum()
        sums.add("policy/loss", loss.total.detach(), tokens)
        sums.add("policy/clipfrac", loss.clipped, tokens)
        sums.add("policy/approx_kl", loss.approx_kl, tokens)
        sums.add_largest("policy/ratio_max", loss.ratio_max)
    sums.add("policy/grad_norm", policy.engine.step(), 1)


def update_value(value: ValueLearner, minibatch: Batch, tokens_per_microbatch: int, sums: algo.Sums) -> None:
    """One optimiser step of the value model."""
    count = minibatch.tokens.mask.sum()
    for part in microbatches(minibatch, tokens_per_microbatch):
        mask = part.tokens.mask
        loss = algo.value_loss(value.model.values(part.tokens)[:, :-1], part.returns, mask)
        value.engine.backward(loss / count)
        sums.add("value/loss", loss.detach(), mask.sum())
    sums.add("value/grad_norm", value.engine.step(), 1)


def minibatches(batch: Batch, epochs: int, size: int, random: torch.Generator) -> Iterator[Batch]:
    """The batch in a new random order for each epoch, `size` sequences at a time."""
    for _ in range(epochs):
        order = torch.randperm(len(batch), generator=random).to(batch.tokens.ids.device)
        for rows in order.split(size):
            yield batch.select(rows)


def microbatches(batch: Batch, tokens_per_microbatch: int) -> Iterator[Batch]:
    """A minibatch in parts that fit in memory; the gradient of their sum does not depend on how it was split."""
    for rows in split_by_tokens(batch.tokens.lengths, tokens_per_microbatch):
        yield batch.select(rows)


def measure(
    trajectories: Trajectories, batch: Batch, scores: Scores, settings: AdvantageSection, kl_coefficient: float
) -> dict[str, float]:
    """What a step's rollouts say about the run, in the field's names; means over all sequences or tokens."""
    mask = trajectories.mask
    kl = algo.kl_estimate(trajectories.logprobs, trajectories.reference_logprobs)
    kl_a_sequence = torch.where(mask, kl, 0.0).sum(1).mean().item()
    score = trajectories.scores.mean().item()
    outcomes, known = monte_carlo_outcomes(trajectories, batch, settings)
    mismatch = (trajectories.behaviour_logprobs - trajectories.logprobs).abs()
    return {
        "objective/kl": kl_a_sequence,
        "objective/kl_coefficient": kl_coefficient,
        "objective/score": score,
        "objective/rlhf_reward": score - kl_coefficient * kl_a_sequence,
        **{f"objective/score/{name}": part.mean().item() for name, part in scores.parts.items()},
        "policy/entropy": -algo.masked_mean(trajectories.logprobs, mask).item(),
        "value/explained_variance": algo.explained_variance(batch.values, outcomes, known),
        "value/mean": algo.masked_mean(batch.values, mask).item(),
        "advantage/std": (batch.advantages[mask]).std(unbiased=False).item(),
        "rollout/length": mask.sum(1).float().mean().item(),
        "rollout/eos_rate": trajectories.ended.float().mean().item(),
        "rollout/logprob_mismatch": algo.masked_mean(mismatch, mask).item(),
        "rollout/logprob_mismatch_max": torch.where(mask, mismatch, 0.0).max().item(),
    }


def monte_carlo_outcomes(trajectories: Trajectories, batch: Batch, settings: AdvantageSection) -> tuple[Tensor, Tensor]:
    """What was earned from each token on, [B, T], free of any value, and the mask [B, T] of where it is known.

    Where a cut response would have gone on (`bootstrap`), what it would have earned is not known.
    """
    mask = trajectories.mask
    outcomes = algo.gae(batch.rewards, torch.zeros_like(batch.values), mask, gamma=settings.gamma, lam=1.0)
    return outcomes, mask & trajectories.ended[:, None] if settings.at_limit == "bootstrap" else mask
