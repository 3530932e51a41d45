"""Rules on single updates: how far each goes, and whether the losses of a shared trunk pull together."""

from __future__ import annotations

from statistics import fmean

from tandem.config import PpoConfig
from tandem.health import thresholds as at
from tandem.health.history import History
from tandem.health.remedies import line, smaller_updates
from tandem.health.rule import Rule

PAGE = "docs/diagnosis/updates.md"
APPROX_KL, CLIPPED = "policy/approx_kl", "policy/clipfrac"
COSINE, RATIO = "policy/value_gradient_cosine", "policy/value_gradient_ratio"


def too_large(history: History, _config: PpoConfig) -> str | None:
    distance, clipped = fmean(history.recent(APPROX_KL, 2)), fmean(history.recent(CLIPPED, 2) or [0.0])
    if distance < at.LARGE_APPROX_KL and clipped < at.LARGE_CLIPFRAC:
        return None
    largest = history.latest("policy/ratio_max", 0.0)
    ratio = f", the largest ratio is {largest:.3g}" if largest > 0 else ""
    return (
        f"an update moves the policy by {distance:.2g} nats a token and the clip stops {clipped:.0%} of the tokens"
        f"{ratio}: the rollouts say nothing of a policy so far from the one that sampled them."
    )


def gradients_conflict(history: History, _config: PpoConfig) -> str | None:
    cosine, ratio = fmean(history.recent(COSINE, 2)), fmean(history.recent(RATIO, 2) or [0.0])
    if cosine > at.OPPOSED and ratio < at.DROWNED:
        return None
    return (
        f"on the shared trunk the value loss's gradient has the cosine {cosine:.2f} with the policy's and {ratio:.2g} "
        "times its norm: " + ("they undo each other's steps." if cosine <= at.OPPOSED else "it drowns the policy's.")
    )


def part_the_gradients(history: History, config: PpoConfig) -> str:
    """A smaller weight where the value's gradient is too large, else none of it into the trunk."""
    if config.sharing.mode != "head":
        return line("sharing.mode", config.sharing.mode)
    if history.latest(RATIO, 0.0) >= at.DROWNED:
        return line("value.coefficient", config.value.coefficient / history.latest(RATIO))
    return line("sharing.head_gradient", "stop")


RULES = (
    Rule(
        "updates_too_large",
        "updates go too far",
        f"mean approximate KL of 2 steps over {at.LARGE_APPROX_KL:g} nats a token, or over {at.LARGE_CLIPFRAC:.0%} of "
        "tokens clipped",
        (APPROX_KL,),
        too_large,
        smaller_updates,
        "Schulman et al. 2017; Huang et al. 2024 on the approximate KL of healthy runs",
        PAGE,
        lower_rate_helps=True,
    ),
    Rule(
        "gradient_conflict",
        "the two losses pull the shared trunk apart",
        f"cosine of their gradients under {at.OPPOSED:g}, or the value's over {at.DROWNED:g} times the policy's",
        (COSINE,),
        gradients_conflict,
        part_the_gradients,
        "Yu et al. 2020 (gradient surgery); Cobbe et al. 2021 (phasic policy gradient)",
        PAGE,
    ),
)
