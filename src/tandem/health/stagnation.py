"""Rules on a score that stays where it is: no signal, no steps, or a leash that is too short.

A value model that lags is the fourth reason; that rule is with the value model's.
"""

from __future__ import annotations

from statistics import fmean

from tandem.config import PpoConfig
from tandem.health import thresholds as at
from tandem.health.history import History
from tandem.health.remedies import line, times
from tandem.health.rule import Rule

PAGE = "docs/diagnosis/stagnation.md"
SCORE, SPREAD, WITHIN = "objective/score", "objective/score_std", "objective/score_std_within_prompts"
KL, APPROX_KL = "objective/kl", "policy/approx_kl"


def no_signal(history: History, _config: PpoConfig) -> str | None:
    size = max(1.0, abs(history.latest(SCORE)))
    of_all, within = history.recent(SPREAD, at.WINDOW), history.recent(WITHIN, at.WINDOW)
    if len(of_all) == at.WINDOW and max(of_all) < at.NO_SPREAD * size:
        return (
            f"for {at.WINDOW} steps every response earned {history.latest(SCORE):.3g} (spread {max(of_all):.1g}): no "
            "token can be told to be better than another."
        )
    if len(within) == at.WINDOW and max(within) < at.NO_SPREAD * size:
        return (
            f"for {at.WINDOW} steps the responses to a prompt earned the same (spread {max(within):.1g} around their "
            "prompt's mean): what differs is the prompt, which the policy does not choose."
        )
    advantages = history.recent("advantage/std", at.WINDOW)
    if len(advantages) == at.WINDOW and max(advantages) < at.NO_SPREAD * size:
        return (
            f"for {at.WINDOW} steps the advantages differed by {max(advantages):.1g} while scores differed by "
            f"{of_all[-1]:.2g}: no token is better or worse than expected."
        )
    return None


def more_spread(_history: History, config: PpoConfig) -> str:
    """A clip that is wide enough; a temperature of 1; else more tries at each prompt, so that some come out."""
    if config.score.clip is not None:
        return line("score.clip", config.score.clip * 10)
    if config.rollout.temperature < 1:
        return line("rollout.temperature", 1.0)
    return line("rollout.responses_per_prompt", max(4, config.rollout.responses_per_prompt * 2))


def stands_still(history: History, _config: PpoConfig) -> str | None:
    recent = history.recent(APPROX_KL, at.WINDOW)
    if len(recent) < at.WINDOW or rate_is_low_by_schedule(history):
        return None
    if history.largest(APPROX_KL) == 0 and history.count(KL) < at.STILL_STEPS:
        return None
    distance = max(map(abs, history.recent(KL, at.WINDOW)))
    if history.largest(APPROX_KL) > at.STILL_APPROX_KL or distance > at.STILL_KL:
        return None
    rate = f" at the learning rate {history.latest('policy/lr'):.2g}" if history.holds("policy/lr") else ""
    return (
        f"an update moves the policy by {fmean(recent):.1g} nats a token{rate}, and after {history.count(KL)} steps it "
        f"is {distance:.2g} nats a sequence from where it began."
    )


def rate_is_low_by_schedule(history: History) -> bool:
    """Whether the schedule has the learning rate at the foot of its rise or the end of its fall."""
    return history.latest("policy/lr") < 0.5 * history.largest("policy/lr")


def held_too_tight(history: History, config: PpoConfig) -> str | None:
    price = history.latest("objective/kl_coefficient", config.kl.coefficient)
    spread = fmean(history.early(SPREAD, at.EARLY))
    if history.count(SPREAD) < at.WINDOW or price <= 0 or spread <= 0:
        return None
    possible, gained = spread / price, (fmean(history.recent(SCORE, at.EARLY)) - fmean(history.early(SCORE, at.EARLY)))
    if possible > at.HELD_GAIN or gained > at.GAINED * spread:
        return None
    return (
        f"at the KL coefficient {price:.3g} and a spread of scores of {spread:.2g}, even the best policy gains about "
        f"{possible:.2g} spreads (score {spread**2 / price:.2g}); it gained {gained:.2g} so far."
    )


def a_longer_leash(history: History, config: PpoConfig) -> str:
    """A coefficient at which the best policy gains some five spreads of the score; or a farther target."""
    if config.kl.target is not None:
        return line("kl.target", config.kl.target * 5)
    spread = fmean(history.early(SPREAD, at.EARLY) or [config.kl.coefficient])
    return line("kl.coefficient", min(spread / 5, config.kl.coefficient / 2))


RULES = (
    Rule(
        "no_signal",
        "all responses earn the same",
        f"spread of the scores, of all or within prompts, or of the advantages, under {at.NO_SPREAD:g} of the scores' "
        f"size for {at.WINDOW} steps",
        (SCORE, SPREAD),
        no_signal,
        more_spread,
        "Yu et al. 2025 (DAPO) on prompts whose responses all earn the same",
        PAGE,
    ),
    Rule(
        "learning_rate_too_small",
        "the policy stands still",
        f"no update over {at.STILL_APPROX_KL:g} nats a token in {at.WINDOW} steps or more at the schedule's height, "
        f"and the policy within {at.STILL_KL:g} nats a sequence of its start; for {at.STILL_STEPS} steps where one "
        "update a step reads 0",
        (APPROX_KL, KL),
        stands_still,
        times("policy.lr", 10.0),
        "reasoning: what does not move does not learn",
        PAGE,
    ),
    Rule(
        "kl_too_strong",
        "the KL coefficient leaves nothing to gain",
        f"the first steps' spread of scores under {at.HELD_GAIN:g} of the KL coefficient, and no gain of "
        f"{at.GAINED:g} spreads",
        (SCORE, SPREAD, KL),
        held_too_tight,
        a_longer_leash,
        "the optimum pi_ref exp(R / beta) gains Var(R) / beta to first order",
        PAGE,
    ),
)
