"""Rules on what the score is worth: whether it rises at the cost of what it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, variance

from tandem.config import PpoConfig, term_names
from tandem.health import thresholds as at
from tandem.health.history import History
from tandem.health.remedies import hold_nearer
from tandem.health.rule import Rule

PAGE = "docs/diagnosis/reward.md"
SCORE, FLUENCY = "objective/score", "rollout/reference_logprob"


def hacked(history: History, config: PpoConfig) -> str | None:
    early = history.early(SCORE, at.EARLY)
    spread = fmean(history.early("objective/score_std", at.EARLY) or [abs(fmean(early))])
    gained = fmean(history.recent(SCORE, 2)) - fmean(early)
    if history.count(SCORE) <= at.EARLY or spread <= 0 or gained < at.GAINED * spread:
        return None
    return next(
        (
            f"the score rose by {gained:.3g}, {gained / spread:.1f} spreads, while {what}."
            for what in fell(history, config)
        ),
        None,
    )


def fell(history: History, config: PpoConfig) -> Iterator[str]:
    """What went down of all that is measured and not trained on, with its numbers."""
    for name in gold_measures(history, config):
        before, now = history.early(name, at.WINDOW), history.recent(name, at.WINDOW)
        if history.count(name) < 2 * at.WINDOW:
            continue
        error = ((variance(before) + variance(now)) / at.WINDOW) ** 0.5
        if fmean(before) - fmean(now) > at.GOLD_FELL * error and error > 0:
            yield f"{name}, which is not trained on, fell from {fmean(before):.3g} to {fmean(now):.3g}"
    likely, likely_now = fmean(history.early(FLUENCY, at.EARLY) or [0.0]), fmean(history.recent(FLUENCY, 2) or [0.0])
    if likely - likely_now > at.FLUENCY_FELL:
        kl = f"; the KL is {history.latest('objective/kl'):.3g} nats" if history.holds("objective/kl") else ""
        yield (
            f"the reference finds the responses {likely - likely_now:.2g} nats a token less likely ({likely:.2f} to "
            f"{likely_now:.2f}){kl}"
        )


def gold_measures(history: History, config: PpoConfig) -> list[str]:
    """Rewards with weight 0, and the score on held-out prompts."""
    names = term_names(config.rewards)
    unpaid = [name for name, source in zip(names, config.rewards, strict=True) if source.weight == 0]
    measures = [f"objective/score/{name}" for name in unpaid] + [f"heldout/objective/score/{name}" for name in unpaid]
    return [name for name in [*measures, "heldout/objective/score"] if history.count(name) > 0]


RULES = (
    Rule(
        "reward_hacking",
        "the score rises at the cost of what it stands for",
        f"score up by {at.GAINED:g} spreads, while a measure that is not trained on falls by {at.GOLD_FELL:g} standard "
        f"errors or the reference's log-probability by {at.FLUENCY_FELL:g} nats a token",
        (SCORE,),
        hacked,
        hold_nearer,
        "Gao et al. 2023 on over-optimisation",
        PAGE,
    ),
)
