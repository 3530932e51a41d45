"""Rules on the distance to the reference: whether it is held, and whether it is measured."""

from __future__ import annotations

import math
from statistics import fmean

from tandem.config import PpoConfig
from tandem.health import thresholds as at
from tandem.health.history import History
from tandem.health.remedies import hold_nearer, line
from tandem.health.rule import Rule

PAGE = "docs/diagnosis/kl.md"
KL, LENGTH, SCORE = "objective/kl", "rollout/length", "objective/score"


def does_not_bite(history: History, config: PpoConfig) -> str | None:
    kl = fmean(history.recent(KL, 2))
    a_token = kl / max(1.0, history.latest(LENGTH))
    if a_token < at.FAR_A_TOKEN:
        return None
    price = history.latest("objective/kl_coefficient", config.kl.coefficient)
    gained = history.latest(SCORE) - fmean(history.early(SCORE, 1))
    if price * kl >= at.BITING * max(gained, 0.0) and not blind_penalty(config):
        return None
    return (
        f"the policy is {kl:.3g} nats a sequence from the reference, {a_token:.2g} a token, and pays {price * kl:.2g} "
        f"for it (coefficient {price:.2g}) where the score gained {gained:.2g}: nothing holds it back."
    )


def blind_penalty(config: PpoConfig) -> bool:
    """A penalty whose gradient is zero on average, as in the textbook's form."""
    return config.kl.placement == "loss" and config.kl.estimator == "k1"


def reads_zero(history: History, _config: PpoConfig) -> str | None:
    recent = history.recent(KL, at.WINDOW)
    moved = sum(history.recent("policy/approx_kl", 10 * at.WINDOW)) * history.latest(LENGTH)
    if len(recent) < at.WINDOW or max(map(abs, recent)) > at.ZERO_KL or moved < at.MOVED:
        return None
    return (
        f"the KL to the reference reads {recent[-1]:.1g} for {at.WINDOW} steps, while the updates moved the policy by "
        f"{moved:.2g} nats a sequence in all: the reference moves with the policy, or the two are the same weights."
    )


def a_reference_apart(_history: History, config: PpoConfig) -> str:
    """Models that share nothing; in float32 where they must share."""
    return line("sharing.mode", "separate") if config.adapters is None else line("compute.precision", "float32")


def negative(history: History, _config: PpoConfig) -> str | None:
    recent = history.recent(KL, at.EARLY)
    errors = history.recent("objective/kl_standard_error", at.EARLY)
    if len(recent) < at.EARLY:
        return None
    error = math.sqrt(sum(one**2 for one in errors)) / len(recent) if len(errors) == len(recent) else 0.0
    if fmean(recent) > -max(at.NEGATIVE_KL, at.NEGATIVE_ERRORS * error):
        return None
    return (
        f"the KL is {fmean(recent):.3g} nats a sequence over {len(recent)} steps (standard error {error:.2g}), and no "
        "KL is below 0: the responses were not sampled from the policy whose log-probabilities are used."
    )


def sample_from_the_policy(_history: History, config: PpoConfig) -> str:
    """Correct for the sampler; where that is done, compute as exactly as the trainer."""
    if config.importance_cap is None:
        return line("policy.importance_cap", 2.0)
    return line("compute.precision", "float32")


RULES = (
    Rule(
        "kl_does_not_bite",
        "nothing holds the policy near the reference",
        f"over {at.FAR_A_TOKEN:g} nats a token from the reference, and the penalty under {at.BITING:g} of the score's "
        "gain, or of a form that has no gradient",
        (KL, LENGTH, SCORE),
        does_not_bite,
        hold_nearer,
        "Gao et al. 2023 on over-optimisation; docs/book.md on a penalty without a gradient",
        PAGE,
        lower_rate_helps=True,
    ),
    Rule(
        "kl_reads_zero",
        "the reference is not apart from the policy",
        f"KL within {at.ZERO_KL:g} of 0 for {at.WINDOW} steps, while updates moved the policy by {at.MOVED:g} nats",
        (KL, "policy/approx_kl", LENGTH),
        reads_zero,
        a_reference_apart,
        "docs/results/oracles.md: one theta_ref for all holds nothing",
        PAGE,
    ),
    Rule(
        "kl_negative",
        "the KL estimate is negative",
        f"mean of {at.EARLY} steps under -{at.NEGATIVE_KL:g} nats and {at.NEGATIVE_ERRORS:g} standard errors below 0",
        (KL,),
        negative,
        sample_from_the_policy,
        "reasoning: the mean of log(pi / pi_ref) under pi is a KL, under another sampler it is none",
        PAGE,
        holds=1,
    ),
)
