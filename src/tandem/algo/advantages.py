"""From rewards and values to what the policy and the value model learn from."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.algo.masked import masked_mean


def token_rewards(
    scores: Tensor,
    mask: Tensor,
    *,
    penalties: Tensor | None = None,
    process_rewards: Tensor | None = None,
) -> Tensor:
    """r_t = process reward_t - penalty_t + [t is last] * score.

    scores [B] paid at the last response token; `penalties` and `process_rewards` [B, T] (none if unset) at their
    own tokens -> [B, T]. With penalty_t = beta * (log pi_old(y_t|s_t) - log pi_ref(y_t|s_t)) it is the reward of
    KL-regularised RLHF.
    Source: Ziegler et al. 2019, equation 2, taken apart over tokens as in Stiennon et al. 2020.
    """
    rewards = torch.zeros(mask.shape, dtype=scores.dtype if penalties is None else penalties.dtype, device=mask.device)
    for part in (process_rewards, None if penalties is None else -penalties):
        if part is not None:
            if part.shape != mask.shape:
                raise ValueError(f"shapes differ: {tuple(part.shape)}, mask {tuple(mask.shape)}")
            rewards = rewards + torch.where(mask, part, torch.zeros_like(part))
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    final_values: Tensor | None = None,
) -> Tensor:
    """Generalised advantage estimation, [B, T] -> [B, T], zero where masked.

    delta_t = r_t + gamma * V(s_{t+1}) - V(s_t);  A_t = delta_t + gamma * lam * A_{t+1}

    The value after the last token is `final_values` [B] (zero after an end; V(s_T) where the response was cut
    and its continuation should count). lam = 0 is the TD error, lam = 1 the return minus the value; [B] numbers
    give each sequence its own.
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


def length_adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """lambda = 1 - 1 / (alpha * length), at least 0, for lengths [B] in tokens -> [B].

    The weights of the TD errors then reach as far, in proportion, into a long response as into a short one.
    Source: Yue et al. 2025 (VAPO), equation 9, who use alpha = 0.05.
    """
    return (1 - 1 / (alpha * lengths.double())).clamp(min=0.0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, T] with mean 0 and variance 1 over the tokens of the mask, zero elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), torch.zeros_like(x))
