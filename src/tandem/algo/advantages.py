"""From rewards and values to what the policy and the value model learn from."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.algo.masked import masked_mean, masked_sum


def token_rewards(
    scores: Tensor, logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, kl_coefficient: float
) -> Tensor:
    """r_t = -beta * (log pi_old(y_t|s_t) - log pi_ref(y_t|s_t)) + [t is last] * score.

    scores [B] paid at the last response token; the others [B, T] -> [B, T].
    Source: Ziegler et al. 2019, equation 2, taken apart over tokens as in Stiennon et al. 2020.
    """
    if not logprobs.shape == reference_logprobs.shape == mask.shape:
        raise ValueError(f"shapes differ: {logprobs.shape}, {reference_logprobs.shape}, {mask.shape}")
    penalty = -kl_coefficient * (logprobs - reference_logprobs)
    rewards = torch.where(mask, penalty, torch.zeros_like(penalty))
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    final_values: Tensor | None = None,
) -> Tensor:
    """Generalised advantage estimation, [B, T] -> [B, T], zero where masked.

    delta_t = r_t + gamma * V(s_{t+1}) - V(s_t);  A_t = delta_t + gamma * lam * A_{t+1}

    The value after the last token is `final_values` [B] (zero after an end; V(s_T) where the response was cut
    and its continuation should count). lam = 0 is the TD error, lam = 1 the return minus the value.
    Source: Schulman et al. 2015, equation 16.
    """
    if not rewards.shape == values.shape == mask.shape:
        raise ValueError(f"shapes differ: {rewards.shape}, {values.shape}, {mask.shape}")
    following_value = torch.zeros_like(values[:, 0]) if final_values is None else final_values.to(values.dtype)
    following_advantage = torch.zeros_like(following_value)
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        advantage = delta + gamma * lam * following_advantage
        advantages[:, t] = torch.where(here, advantage, 0.0)
        following_advantage = torch.where(here, advantage, following_advantage)
        following_value = torch.where(here, values[:, t], following_value)
    return advantages


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, T] with mean 0 and variance 1 over the tokens of the mask, zero elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), torch.zeros_like(x))


def explained_variance(values: Tensor, outcomes: Tensor, mask: Tensor) -> float:
    """1 - Var(outcome - value) / Var(outcome) over all tokens [B, T] of the mask.

    1 is a perfect critic, 0 one no better than a constant; NaN where the outcomes do not vary. Held against
    Monte-Carlo outcomes it does not contain the values themselves.
    """

    def variance(x: Tensor) -> Tensor:
        return masked_sum((x - masked_mean(x, mask)).square(), mask)

    spread = variance(outcomes)
    return float("nan") if spread <= 0 else float(1 - variance(outcomes - values) / spread)
