"""Rules on who sampled the responses: another arithmetic, or older weights."""

from __future__ import annotations

from statistics import fmean

from tandem.config import PpoConfig
from tandem.health import thresholds as at
from tandem.health.history import History
from tandem.health.kl import sample_from_the_policy
from tandem.health.remedies import line
from tandem.health.rule import Rule

PAGE = "docs/diagnosis/generator.md"
GAP = "rollout/logprob_mismatch"


def differs(history: History, _config: PpoConfig) -> str | None:
    first, now = history.early(GAP, 1)[0], fmean(history.recent(GAP, 2))
    if now < at.MISMATCH or now > at.STALE * first:
        return None
    return (
        f"the generator's log-probabilities are {now:.2g} nats a token from the trainer's, and were {first:.2g} at the "
        "first step: they compute differently, and every ratio carries that error."
    )


def is_stale(history: History, _config: PpoConfig) -> str | None:
    first, now = history.early(GAP, 1)[0], fmean(history.recent(GAP, 2))
    if now < at.MISMATCH or now <= at.STALE * first:
        return None
    return (
        f"the generator's log-probabilities are {now:.2g} nats a token from the trainer's, and were {first:.2g} at the "
        "first step: it samples with weights from before."
    )


def sample_from_newer_weights(history: History, config: PpoConfig) -> str:
    """Where the recipe asks for older weights, ask no more; else as for any other gap."""
    return line("rollout.staleness", 0) if config.rollout.staleness else sample_from_the_policy(history, config)


RULES = (
    Rule(
        "generator_mismatch",
        "generator and trainer do not agree on log-probabilities",
        f"mean gap over {at.MISMATCH:g} nats a token, from the first step on",
        (GAP,),
        differs,
        sample_from_the_policy,
        "Yao et al. 2025 on truncated importance sampling",
        PAGE,
    ),
    Rule(
        "stale_rollouts",
        "the generator samples with old weights",
        f"mean gap over {at.MISMATCH:g} nats a token, and over {at.STALE:g} times the first step's",
        (GAP,),
        is_stale,
        sample_from_newer_weights,
        "Fu et al. 2025 (AReaL) on staleness",
        PAGE,
    ),
)
