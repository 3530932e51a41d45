"""Losses, minimised. Each returns the sum over tokens (or pairs); the caller divides by the global count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tandem.algo.masked import masked_sum


@dataclass(frozen=True)
class PolicyLoss:
    """`total` [] carries the gradient; the rest are detached sums over tokens, but for the largest ratio."""

    total: Tensor
    clipped: Tensor
    approx_kl: Tensor
    ratio_max: Tensor


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> PolicyLoss:
    """-sum min(u A, clip(u, 1 - clip_low, 1 + clip_high) A), u = pi / pi_old.

    All [B, T]. `clipped` counts tokens whose gradient the clip has stopped; `approx_kl` sums the k3 estimate of
    KL(pi_old || pi).
    Source: Schulman et al. 2017, equation 7; different bounds on the two sides: Yu et al. 2025 (DAPO).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = log_ratio.exp()
    free, bounded = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    with torch.no_grad():
        clipped = masked_sum((bounded < free).to(ratio.dtype), mask)
        approx_kl = masked_sum(ratio - 1 - log_ratio, mask)
        ratio_max = torch.where(mask, ratio, torch.zeros_like(ratio)).max()
    return PolicyLoss(-masked_sum(torch.minimum(free, bounded), mask), clipped, approx_kl, ratio_max)


def a2c_policy_loss(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """-sum log pi(y_t|s_t) A_t, all [B, T]. Source: Mnih et al. 2016."""
    return -masked_sum(logprobs * advantages, mask)


def value_loss(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """sum 1/2 (V(s_t) - G_t)^2, all [B, T]; the targets G are constants."""
    errors = values.masked_fill(~mask, 0.0) - returns.detach().masked_fill(~mask, 0.0)
    return errors.square().sum() / 2


def preference_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """-sum log sigmoid(R(x, y_w) - R(x, y_l)), scores [N] each.

    Source: Bradley and Terry 1952; Stiennon et al. 2020.
    """
    if chosen_scores.shape != rejected_scores.shape:
        raise ValueError(f"shapes differ: {tuple(chosen_scores.shape)}, {tuple(rejected_scores.shape)}")
    return -logsigmoid(chosen_scores - rejected_scores).sum()


def prefix_preference_loss(chosen_scores: Tensor, rejected_scores: Tensor, mask: Tensor) -> Tensor:
    """-sum over pairs of the mean over t of log sigmoid(R(x, y_w up to t) - R(x, y_l up to t)).

    All [N, T]; the mask is true up to the longer answer's end. It teaches a reward model to know early what it
    will say at the end, which is what a value model started from it has to know.
    """
    if not chosen_scores.shape == rejected_scores.shape == mask.shape:
        raise ValueError(f"shapes differ: {chosen_scores.shape}, {rejected_scores.shape}, {mask.shape}")
    losses = -logsigmoid(torch.where(mask, chosen_scores - rejected_scores, torch.zeros_like(chosen_scores)))
    return (torch.where(mask, losses, torch.zeros_like(losses)).sum(1) / mask.sum(1)).sum()
