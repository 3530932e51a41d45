"""Which of two models is better, from comparisons of their responses to the same prompts.

Outcomes are [P, R]: R comparisons for each of P prompts, 1 where the first model's response is the better one, 1/2 for
a tie, 0 where it is the worse one, NaN where nobody judged. Prompts are independent of each other, the comparisons of
one prompt are not: an interval that took them for independent would be too narrow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_NORMAL_QUANTILE = 1.959964
_NEWTON_STEPS = 100


@dataclass(frozen=True)
class Interval:
    """An estimate within its 95% confidence interval; all three are NaN where nothing can be said."""

    value: float
    low: float
    high: float


UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class ClusteredMean:
    """A mean over all numbers, and its standard error; NaN where there is none."""

    mean: float
    standard_error: float


def clustered_mean(values: Tensor) -> ClusteredMean:
    """The mean of values [P, R], NaN where missing, with the standard error that knows rows for clusters.

        variance = P / (P - 1) * sum_p (sum_r (v_pr - mean))^2 / n^2

    Source: Liang and Zeger 1986, the sandwich for a mean.
    """
    values = values.double()
    known = ~values.isnan()
    clusters, count = int(known.any(1).sum()), int(known.sum())
    if count == 0:
        return ClusteredMean(math.nan, math.nan)
    mean = float(values[known].mean())
    if clusters < 2:
        return ClusteredMean(mean, math.nan)
    sums = torch.where(known, values - mean, 0.0).sum(1)
    variance = clusters / (clusters - 1) * float(sums.square().sum()) / count**2
    return ClusteredMean(mean, math.sqrt(variance))


def effective_comparisons(outcomes: Tensor) -> float:
    """How many independent comparisons would tell as much as outcomes [P, R] do.

        p (1 - p) / variance of the mean, at least the number of prompts and at most that of comparisons

    The variance is that of `clustered_mean`. Source: Kish 1965, the design effect. The lower bound is what there would
    be if all comparisons of a prompt had one outcome; it also holds where every outcome is the same, and the variance
    says nothing.
    """
    found = clustered_mean(outcomes)
    known = ~outcomes.isnan()
    prompts, count = float(known.any(1).sum()), float(known.sum())
    if not found.standard_error > 0:
        return prompts
    return min(max(found.mean * (1 - found.mean) / found.standard_error**2, prompts), count)


def win_rate(outcomes: Tensor) -> Interval:
    """The share of comparisons [P, R] that were won, ties as half, with Wilson's interval on the effective number.

        (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n)

    With one comparison a prompt it is Wilson's own; ties make it wider than it need be, never too narrow. Unlike the
    bootstrap it does not shrink to a point where all comparisons were won.
    Source: Wilson 1927; Franco et al. 2019 for the effective number in it.
    """
    known = ~outcomes.isnan()
    if not bool(known.any()):
        return UNKNOWN
    rate, count, squared = float(outcomes[known].double().mean()), effective_comparisons(outcomes), _NORMAL_QUANTILE**2
    middle = (rate + squared / (2 * count)) / (1 + squared / count)
    reach = _NORMAL_QUANTILE * math.sqrt(rate * (1 - rate) / count + squared / (4 * count**2)) / (1 + squared / count)
    return Interval(rate, max(0.0, middle - reach), min(1.0, middle + reach))


def length_controlled_win_rate(outcomes: Tensor, longer_by: Tensor) -> Interval:
    """What the win rate would be if both responses were of one length, with its interval.

        P(win) = sigmoid(a + b * tanh(longer_by / std(longer_by))), read at longer_by = 0: sigmoid(a)

    outcomes [P, R]; longer_by [P, R], how much longer the first model's response is, in any unit. Fitted by Newton's
    method on the likelihood with Firth's penalty, which keeps a and b finite where one model wins everything. The
    variance of a is that of the model, scaled by comparisons to effective comparisons. NaN where all differences are
    one number other than zero: length cannot be told from the model then.
    Source: Dubois et al. 2024 (length-controlled AlpacaEval), without their term for an instruction's difficulty,
    which takes many models to estimate; Firth 1993.
    """
    known = ~outcomes.isnan()
    won, difference = outcomes[known].double(), longer_by[known].double()
    if won.numel() == 0:
        return UNKNOWN
    spread = float(difference.std(correction=0))
    if spread == 0.0 and bool(difference.any()):
        return UNKNOWN
    length = torch.tanh(difference / spread) if spread > 0 else torch.zeros_like(difference)
    weights, covariance = fit_logistic(torch.stack([torch.ones_like(length), length], 1), won)
    inflation = won.numel() / effective_comparisons(outcomes)
    reach = _NORMAL_QUANTILE * math.sqrt(float(covariance[0, 0]) * inflation)
    middle = float(weights[0])
    return Interval(_sigmoid(middle), _sigmoid(middle - reach), _sigmoid(middle + reach))


def fit_logistic(inputs: Tensor, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [K] of a logistic regression of outcomes [N] in [0, 1] on inputs [N, K], and their covariance [K, K].

    With Firth's penalty, half the logarithm of the information's determinant, the score is

        sum_i (y_i - p_i + h_i (1/2 - p_i)) x_i,  h_i the leverage of i

    so that every estimate is finite; of a constant alone it adds half a win and half a loss. A column that the others
    determine gets the weight 0. Source: Firth 1993; Heinze and Schemper 2002.
    """
    weights = inputs.new_zeros(inputs.shape[1])
    for _ in range(_NEWTON_STEPS):
        chance = torch.sigmoid(inputs @ weights)
        variance = chance * (1 - chance)
        covariance = torch.linalg.pinv(inputs.T @ (variance[:, None] * inputs), hermitian=True)
        leverage = variance * ((inputs @ covariance) * inputs).sum(1)
        score = inputs.T @ (outcomes - chance + leverage * (0.5 - chance))
        # A step of at most 1 in every weight: the likelihood is flat far out, and a full one could leap there.
        step = (covariance @ score).clamp(-1.0, 1.0)
        weights = weights + step
        if float(step.abs().max()) < 1e-10:
            break
    return weights, covariance


def best_of_n_kl_bound(n: int) -> float:
    """The most that choosing the best of n responses can move away from the model that gave them, in nats a sequence.

        KL(best of n, reference) <= log n - (n - 1) / n

    It is nearly reached where every single response is improbable and no two have one score, as with long texts.
    Source: Beirami et al. 2024, theorem 3.1; before them often stated as an equality (Stiennon et al. 2020).
    """
    return math.log(n) - (n - 1) / n


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
