"""Losses, minimised. Each returns the sum over tokens (or pairs); the caller divides by the global count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tandem.algo.masked import masked_sum


@dataclass(frozen=True)
class ClippedLoss:
    """`total` [] carries the gradient; `clipped` [] counts the tokens whose gradient the clip has stopped."""

    total: Tensor
    clipped: Tensor


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> ClippedLoss:
    """-sum w min(u A, clip(u, 1 - clip_low, 1 + clip_high) A), u = pi / pi_old.

    All [B, T]. `weights` are importance weights (1 if unset). With `dual_clip` = c > 1, where A < 0 the minimum is
    not let below c A, so that one token that has become likely cannot dominate.
    Source: Schulman et al. 2017, equation 7; different bounds on the two sides: Yu et al. 2025 (DAPO, clip-higher);
    dual clip: Ye et al. 2020, equation 5.
    """
    ratio = probability_ratio(logprobs, old_logprobs, mask)
    free, bounded = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    surrogate = torch.minimum(free, bounded)
    stopped = bounded < free
    if dual_clip is not None:
        floor = dual_clip * advantages
        stopped = stopped | ((advantages < 0) & (floor > surrogate))
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, floor), surrogate)
    return ClippedLoss(-masked_sum(_weighted(surrogate, weights), mask), _count(stopped, mask))


def book_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weights: Tensor | None = None,
) -> ClippedLoss:
    """-sum w min(u, clip(u, 1 - clip_low, 1 + clip_high)) A, u = pi / pi_old: for study, not for use.

    All [B, T]. The clip looks at the ratio alone. Where A < 0 it stops the gradient of a ratio that has grown,
    just where the token should be made less likely, and lets one that is already small shrink on.
    Source: Xiao and Zhu 2025, Foundations of Large Language Models, section 4.
    """
    ratio = probability_ratio(logprobs, old_logprobs, mask)
    bounded = torch.minimum(ratio, ratio.clamp(1 - clip_low, 1 + clip_high))
    stopped = (bounded < ratio) & (advantages != 0)
    return ClippedLoss(-masked_sum(_weighted(bounded * advantages, weights), mask), _count(stopped, mask))


def a2c_policy_loss(logprobs: Tensor, advantages: Tensor, mask: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """-sum w log pi(y_t|s_t) A_t, all [B, T]. Source: Mnih et al. 2016."""
    return -masked_sum(_weighted(logprobs * advantages, weights), mask)


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """u = pi / pi_old, [B, T], 1 where masked."""
    return torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs)).exp()


def importance_weights(logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_behaviour, cap), [B, T], 1 where masked: what corrects for a sampler that differs.

    Source: Yao et al. 2025, truncated importance sampling between the generator and the trainer; Munos et al. 2016
    for why the truncation is needed.
    """
    return probability_ratio(logprobs, behaviour_logprobs, mask).clamp(max=cap)


def _weighted(x: Tensor, weights: Tensor | None) -> Tensor:
    return x if weights is None else x * weights


def _count(where: Tensor, mask: Tensor) -> Tensor:
    return (where & mask).sum()


def value_loss(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """sum 1/2 (V(s_t) - G_t)^2, all [B, T]; the targets G are constants."""
    return _squares(values, returns, mask).sum() / 2


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float
) -> ClippedLoss:
    """sum 1/2 max((V - G)^2, (V_old + clip(V - V_old, -c, c) - G)^2), all [B, T].

    It keeps V within `clip` of what it was before the step's updates, in the units of the reward.
    Source: the PPO of Schulman et al. 2017 as published in code; see Huang et al. 2022, detail 9, and Andrychowicz
    et al. 2021, who find that it does not help.
    """
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    free, held = _squares(values, returns, mask), _squares(bounded, returns, mask)
    return ClippedLoss(torch.maximum(free, held).sum() / 2, _count(held > free, mask))


def _squares(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    return (values.masked_fill(~mask, 0.0) - returns.detach().masked_fill(~mask, 0.0)).square()


def preference_loss(chosen_scores: Tensor, rejected_scores: Tensor, margins: Tensor | None = None) -> Tensor:
    """-sum log sigmoid(R(x, y_w) - R(x, y_l) - m), scores [N] each.

    `margins` m [N], zero if left out, say by how much the chosen answer is the better one.
    Source: Bradley and Terry 1952; Stiennon et al. 2020; Touvron et al. 2023 (Llama 2), equation 2, for the margin.
    """
    difference = _margin(chosen_scores, rejected_scores)
    return -logsigmoid(difference if margins is None else difference - margins).sum()


def centring_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """sum (R(x, y_w) + R(x, y_l))^2, scores [N] each: it puts the zero, which preferences leave open, in the middle.

    Source: Eisenstein et al. 2023, section 3.
    """
    if chosen_scores.shape != rejected_scores.shape:
        raise ValueError(f"shapes differ: {tuple(chosen_scores.shape)}, {tuple(rejected_scores.shape)}")
    return (chosen_scores + rejected_scores).square().sum()


def prefix_preference_loss(chosen_scores: Tensor, rejected_scores: Tensor, mask: Tensor) -> Tensor:
    """-sum over pairs of the mean over t of log sigmoid(R(x, y_w up to t) - R(x, y_l up to t)).

    All [N, T]; the mask is true up to the longer answer's end. It teaches a reward model to know early what it
    will say at the end, which is what a value model started from it has to know.
    """
    if not chosen_scores.shape == rejected_scores.shape == mask.shape:
        raise ValueError(f"shapes differ: {chosen_scores.shape}, {rejected_scores.shape}, {mask.shape}")
    losses = -logsigmoid(torch.where(mask, chosen_scores - rejected_scores, torch.zeros_like(chosen_scores)))
    return (torch.where(mask, losses, torch.zeros_like(losses)).sum(1) / mask.sum(1)).sum()


def dpo_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-sum (1 - e) log sigmoid(h) + e log sigmoid(-h), h = beta [log pi/pi_ref (y_w) - log pi/pi_ref (y_l)].

    The ratios [N] are log pi(y|x) - log pi_ref(y|x) of whole answers, in nats. `label_smoothing` e is the chance that a
    preference is the wrong way round: with it, h has a finite optimum however sure the pairs look.
    Source: Rafailov et al. 2023, equation 7; Mitchell 2023 for the smoothing (cDPO).
    """
    margin = beta * _margin(chosen_ratios, rejected_ratios)
    return -((1 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin)).sum()


def ipo_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, *, beta: float) -> Tensor:
    """sum (log pi/pi_ref (y_w) - log pi/pi_ref (y_l) - 1 / (2 beta))^2, ratios [N] as in `dpo_loss`.

    The margin is drawn to a constant instead of without end, so that the reference holds even where every preference
    is sure. Source: Azar et al. 2023, equation 17.
    """
    return (_margin(chosen_ratios, rejected_ratios) - 1 / (2 * beta)).square().sum()


def _margin(chosen_ratios: Tensor, rejected_ratios: Tensor) -> Tensor:
    if chosen_ratios.shape != rejected_ratios.shape:
        raise ValueError(f"shapes differ: {tuple(chosen_ratios.shape)}, {tuple(rejected_ratios.shape)}")
    return chosen_ratios - rejected_ratios
