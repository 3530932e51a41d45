"""The joint step up to the gradients: measure what was sampled, estimate advantages.

A policy is asked only for log-probabilities of given tokens and a value model only for values, so the same code
trains a transformer and a table, and the table is how it is held against closed forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tandem import algo
from tandem.config import AdvantageSection, KlSection
from tandem.types import Batch, Rollout, Scores, Tokens, Trajectories, pad_tokens, rows_tried
from tandem.world import world

SAME_LOGPROB = 1e-4


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


@torch.no_grad()
def evaluate(
    rollouts: Sequence[Rollout],
    scores: Scores,
    policy: Policy,
    reference: Policy,
    value: ValueModel,
    tokens_per_microbatch: int,
    *,
    recompute: bool = True,
) -> Trajectories:
    """Measure rollouts under the models as they are before the updates.

    Without `recompute`, an eighth of the rows, the longest, is run through the policy once more; where the sampler's
    log-probabilities are within 1e-4 nats of what that says, they stand for the policy's on the other rows.
    """
    tokens = policy.prepare(tokens_of(rollouts), tokens_per_microbatch)
    device = tokens.ids.device
    behaviour = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(rollout.logprobs) for rollout in rollouts], batch_first=True
    ).to(device)
    logprobs, recomputed = policy_logprobs(policy, tokens, behaviour, tokens_per_microbatch, recompute)
    values = in_parts(value.values, tokens, tokens_per_microbatch, extra_columns=1)
    after_last = tokens.response_lengths[:, None]
    width = tokens.mask.shape[1]
    process = torch.zeros(tokens.mask.shape) if scores.process is None else scores.process[:, :width]
    return Trajectories(
        tokens=tokens,
        behaviour_logprobs=behaviour,
        logprobs=logprobs,
        recomputed=recomputed,
        reference_logprobs=in_parts(reference.logprobs, tokens, tokens_per_microbatch),
        values=torch.where(tokens.mask, values[:, :-1], 0.0),
        final_values=values.gather(1, after_last).squeeze(1),
        ended=torch.tensor([rollout.ended for rollout in rollouts], device=device),
        scores=scores.total.to(device),
        process_rewards=process.to(device),
    )


def tokens_of(rollouts: Sequence[Rollout]) -> Tokens:
    """Prompts and responses side by side."""
    return pad_tokens([rollout.prompt.ids for rollout in rollouts], [rollout.ids for rollout in rollouts])


def policy_logprobs(
    policy: Policy, tokens: Tokens, behaviour: Tensor, tokens_per_microbatch: int, recompute: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, T] of the policy before the updates, and the rows [B] bool that were run for them."""
    if recompute:
        everything = torch.ones(len(tokens), dtype=torch.bool, device=tokens.ids.device)
        return in_parts(policy.logprobs, tokens, tokens_per_microbatch), everything
    logprobs, recomputed = behaviour.clone(), torch.zeros(len(tokens), dtype=torch.bool, device=tokens.ids.device)

    def run(rows: Tensor) -> None:
        found = in_parts(policy.logprobs, tokens.select(rows), tokens_per_microbatch)
        logprobs[rows, : found.shape[1]] = found.to(logprobs.dtype)
        recomputed[rows] = True

    longest_first = torch.argsort(tokens.lengths, descending=True, stable=True)
    tried = rows_tried(len(tokens))
    run(longest_first[:tried])
    same = bool((logprobs - behaviour).abs().max() <= SAME_LOGPROB)
    if not same and tried < len(tokens):
        run(longest_first[tried:])
    return logprobs, recomputed


def in_parts(
    function: Callable[[Tokens], Tensor], tokens: Tokens, tokens_per_microbatch: int, extra_columns: int = 0
) -> Tensor:
    """A per-token function over all rows, a micro-batch at a time: [B, T + extra_columns].

    Each process runs its share of the rows, and all of them get the whole.
    """
    out: Tensor | None = None
    for rows, weight in world().deal(tokens.lengths, tokens_per_microbatch):
        part = function(tokens.select(rows))
        if out is None:
            out = part.new_zeros(len(tokens), tokens.mask.shape[1] + extra_columns)
        if weight:
            out[rows, : part.shape[1]] = part
    assert out is not None
    return world().sum(out)


def estimate_advantages(
    trajectories: Trajectories, settings: AdvantageSection, kl: KlSection, importance_cap: float | None = None
) -> Batch:
    """Rewards at tokens, advantages for the policy, targets for the value model.

    A response cut at the length limit either is paid its score as at an end (`score`), or is paid nothing and
    the value of its last state stands for what would follow (`bootstrap`); paying both would count the end twice.
    With an `importance_cap`, tokens are weighed by how much likelier the policy made them than the generator did.
    """
    mask, values = trajectories.mask, trajectories.values
    rewards = rewards_at_tokens(trajectories, settings, kl)
    final_values = bootstrapped_values(trajectories, settings)

    def advantages(lam: float | Tensor) -> Tensor:
        return algo.gae(rewards, values, mask, gamma=settings.gamma, lam=lam, final_values=final_values)

    lam: float | Tensor = settings.lambda_policy
    if settings.length_adaptive is not None:
        lam = algo.length_adaptive_lambda(mask.sum(1), settings.length_adaptive).to(values.dtype)
    outcomes, known = monte_carlo_outcomes(rewards, trajectories, settings)
    if value_is_baseline(values, outcomes, known, settings):
        for_policy = advantages(lam)
    else:
        earned = advantages(1.0) + values
        for_policy = torch.where(mask, earned - algo.masked_mean(earned, mask), torch.zeros_like(earned))
    weights = torch.ones_like(trajectories.logprobs)
    if importance_cap is not None:
        weights = algo.importance_weights(trajectories.logprobs, trajectories.behaviour_logprobs, mask, importance_cap)
    return Batch(
        tokens=trajectories.tokens,
        logprobs=trajectories.logprobs,
        reference_logprobs=trajectories.reference_logprobs,
        weights=weights,
        values=values,
        rewards=rewards,
        advantages=algo.whiten(for_policy, mask) if settings.whiten else for_policy,
        returns=advantages(settings.lambda_value) + values,
        outcomes=outcomes,
        known=known,
    )


def rewards_at_tokens(trajectories: Trajectories, settings: AdvantageSection, kl: KlSection | None) -> Tensor:
    """[B, T]: scores, process rewards and, where `kl` places it in the reward, the KL penalty."""
    penalties = None
    if kl is not None and kl.placement == "reward":
        estimate = algo.kl_estimate(trajectories.logprobs, trajectories.reference_logprobs, kl.estimator)
        penalties = kl.coefficient * estimate
    scores = trajectories.scores
    if settings.at_limit == "bootstrap":
        scores = torch.where(trajectories.ended, scores, torch.zeros_like(scores))
    return algo.token_rewards(
        scores.to(trajectories.values.dtype),
        trajectories.mask,
        penalties=penalties,
        process_rewards=trajectories.process_rewards.to(trajectories.values.dtype),
    )


def bootstrapped_values(trajectories: Trajectories, settings: AdvantageSection) -> Tensor:
    """[B]: the value of the state after the last token, where what would follow counts; else 0."""
    final_values = trajectories.final_values
    if settings.at_limit == "bootstrap":
        return torch.where(trajectories.ended, torch.zeros_like(final_values), final_values)
    return torch.zeros_like(final_values)


def monte_carlo_outcomes(
    rewards: Tensor, trajectories: Trajectories, settings: AdvantageSection
) -> tuple[Tensor, Tensor]:
    """What was earned from each token on, [B, T], free of any value, and the mask [B, T] of where it is known.

    Where a cut response would have gone on (`at_limit = "bootstrap"`), what it would have earned is not known.
    """
    mask = trajectories.mask
    outcomes = algo.gae(rewards, torch.zeros_like(rewards), mask, gamma=settings.gamma, lam=1.0)
    return outcomes, mask & trajectories.ended[:, None] if settings.at_limit == "bootstrap" else mask


def value_is_baseline(values: Tensor, outcomes: Tensor, known: Tensor, settings: AdvantageSection) -> bool:
    """Whether advantages are made with the value model.

    With `baseline = "adaptive"` they are while it explains more of what was earned than the batch's mean does.
    Source: Pan et al. 2026 (EVPO), who switch at an explained variance of zero.
    """
    if settings.baseline != "adaptive":
        return settings.baseline == "value"
    return algo.explained_variance(values, outcomes, known) > 0
