"""How good a value model is, held against what was earned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.algo.masked import masked_mean, masked_sum


def explained_variance(values: Tensor, outcomes: Tensor, mask: Tensor) -> float:
    """1 - Var(outcome - value) / Var(outcome) over all tokens [B, T] of the mask.

    1 is a perfect critic, 0 one no better than a constant; NaN where the outcomes do not vary. Held against
    Monte-Carlo outcomes it does not contain the values themselves.
    """
    values, outcomes = values.double(), outcomes.double()

    def variation(x: Tensor) -> Tensor:
        return masked_sum((x - masked_mean(x, mask)).square(), mask)

    spread = variation(outcomes)
    varies = spread > 1e-12 * masked_sum(outcomes.square(), mask)
    return float(1 - variation(outcomes - values) / spread) if varies else float("nan")


def explained_variance_by_position(values: Tensor, outcomes: Tensor, mask: Tensor, parts: int) -> list[float]:
    """The explained variance in each of `parts` equal stretches of the responses, first to last.

    Token t of a response of l tokens belongs to stretch floor(parts * t / l).
    """
    return [explained_variance(values, outcomes, stretch) for stretch in stretches(mask, parts)]


def stretches(mask: Tensor, parts: int) -> list[Tensor]:
    """The mask [B, T] taken apart into equal stretches of each response, first to last."""
    place = torch.arange(mask.shape[1], device=mask.device)[None, :] * parts
    stretch = place // mask.sum(1, keepdim=True).clamp(min=1)
    return [mask & (stretch == part) for part in range(parts)]


def credit_by_position(advantages: Tensor, values: Tensor, outcomes: Tensor, mask: Tensor, parts: int) -> list[float]:
    """In each of `parts` equal stretches of the responses, the correlation over tokens [B, T] between the advantage
    and what was earned beyond the value, outcome - value.

    1 where advantages are those of Monte Carlo (lambda = 1). Near 0 where nothing of what was earned at the end reaches
    the tokens of the stretch; that is no loss where the value model knows more than one outcome does, and a loss of the
    signal where it explains nothing. NaN where one of the two does not vary.
    """
    earned = outcomes - values
    return [correlation(advantages, earned, stretch) for stretch in stretches(mask, parts)]


def correlation(one: Tensor, other: Tensor, mask: Tensor) -> float:
    """Pearson's correlation over the entries of the mask; NaN where one of the two does not vary."""
    one, other = one.double(), other.double()
    one, other = one - masked_mean(one, mask), other - masked_mean(other, mask)
    spreads = masked_sum(one.square(), mask) * masked_sum(other.square(), mask)
    return float(masked_sum(one * other, mask) / spreads.sqrt()) if spreads > 0 else float("nan")


@dataclass(frozen=True)
class CalibrationGroup:
    """Tokens of similar predicted value: the mean of what was predicted, of what was earned, and their number."""

    predicted: float
    earned: float
    tokens: int


def calibration(values: Tensor, outcomes: Tensor, mask: Tensor, groups: int = 10) -> list[CalibrationGroup]:
    """Predicted value against outcome by quantile of the predicted value (deciles), lowest first.

    A calibrated critic earns in each group what it predicted there. There are fewer groups than asked for where
    there are fewer tokens.
    """
    predicted, order = values[mask].sort(stable=True)
    earned = outcomes[mask][order]

    def of_each_group() -> Iterator[CalibrationGroup]:
        for p, e in zip(predicted.tensor_split(groups), earned.tensor_split(groups), strict=True):
            if len(p) > 0:
                yield CalibrationGroup(float(p.mean()), float(e.mean()), len(p))

    return list(of_each_group())


def calibration_error(groups: list[CalibrationGroup]) -> float:
    """Mean over tokens of the gap between predicted and earned in their group, in units of the reward; NaN for none."""
    tokens = sum(group.tokens for group in groups)
    gaps = sum(abs(group.predicted - group.earned) * group.tokens for group in groups)
    return gaps / tokens if tokens else float("nan")


def optimality_certificate(
    rewards: Tensor,
    log_ratios: Tensor,
    values: Tensor,
    final_values: Tensor,
    mask: Tensor,
    *,
    kl_coefficient: float,
    gamma: float,
) -> float:
    """Root mean square over tokens of r_t - beta log(pi / pi_ref) + gamma V(s_{t+1}) - V(s_t), in units of the reward.

    `rewards` [B, T] are those without the KL; `log_ratios`, `values`, `mask` [B, T]; `final_values` [B] (zero after
    an end). At the optimum of the KL-regularised objective it is zero at every token, whatever was sampled, since
    log pi*(y_t|s_t) = log pi_ref(y_t|s_t) + (r_t + gamma V*(s_{t+1}) - V*(s_t)) / beta. So under a fixed coefficient
    it must shrink as policy and value model approach the optimum together.
    Source: the Bellman equation of entropy-regularised control; Nachum et al. 2017, theorem 1.
    """
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    last = mask.sum(1, keepdim=True) - 1
    following = following.scatter(1, last, final_values[:, None].to(values.dtype))
    gap = rewards - kl_coefficient * log_ratios + gamma * following - values
    return float(masked_mean(gap.square(), mask).sqrt())
