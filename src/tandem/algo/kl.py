"""Distance to the reference: its estimators and the coefficient that weighs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: KlEstimator = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled, in nats.

    With d = log pi - log pi_ref (any shape, kept):

        k1 = d                 unbiased, of high variance, may be negative
        k2 = d^2 / 2           biased, small variance
        k3 = exp(-d) - 1 + d   unbiased and never negative

    As a *reward*, k1 is the right one: the policy gradient of its sum is that of the KL of whole sequences, since
    the mean of grad d is zero. k2 and k3 leave out a term that is not zero. As a *loss*, it is the gradient of the
    estimator that counts: that of k1 is zero on average; that of k2 is the gradient of KL(pi || pi_ref) token by
    token; that of k3 is the gradient of the other direction, KL(pi_ref || pi), token by token. Neither loss sees
    that a token leads to states where the KL will be larger, so their fixed point is not that of the reward.
    Source: Schulman, Approximating KL divergence (2020); Tang and Munos 2025 for the gradients.
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
