"""Distance to the reference: its estimators and the coefficient that weighs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: KlEstimator = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled, in nats.

    With d = log pi - log pi_ref (any shape, kept):
    k1 = d is unbiased, of high variance and may be negative; k2 = d^2 / 2 is biased, and its *gradient* is the
    unbiased one when it is used as a loss; k3 = exp(-d) - 1 + d is unbiased and never negative.
    Source: Schulman, Approximating KL divergence (2020).
    """
    difference = logprobs - reference_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return (-difference).exp() - 1 + difference
    raise ValueError(f"estimator must be k1, k2 or k3, not {estimator!r}")


@dataclass(frozen=True)
class AdaptiveKl:
    """The KL coefficient, fixed where `target` is None, else adapted to hold the KL a sequence at the target.

    beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * min(1, sequences / horizon))

    Source: Ziegler et al. 2019, section 2.2.
    """

    coefficient: float
    target: float | None
    horizon: float

    def after(self, kl: float, sequences: int) -> Self:
        """The controller after a step whose `sequences` had this mean KL, in nats a sequence."""
        if self.target is None:
            return self
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return replace(self, coefficient=self.coefficient * (1.0 + error * min(1.0, sequences / self.horizon)))
