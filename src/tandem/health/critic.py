"""Rules on the value model: whether it is of use, and whether it hears of what the policy earns."""

from __future__ import annotations

from statistics import fmean, median

from tandem.config import PpoConfig
from tandem.health import thresholds as at
from tandem.health.history import History
from tandem.health.remedies import line, longer_warmup, more_value_learning
from tandem.health.rule import Rule

PAGE = "docs/diagnosis/value-model.md"
EXPLAINED, BY_QUARTER = "value/explained_variance", "value/explained_variance_by_position"
CREDIT = "advantage/credit_by_position"


def worse_than_a_baseline(history: History, _config: PpoConfig) -> str | None:
    if history.latest("advantage/from_value", 1.0) == 0 or warming_up(history):
        return None
    recent = history.recent(EXPLAINED, at.WINDOW)
    if len(recent) < at.WINDOW or median(recent) >= at.WORSE_EXPLAINED_VARIANCE or recent[-1] >= 0:
        return None
    return (
        f"it explains {median(recent):.2f} of the variance of what was earned (median of {at.WINDOW} steps, now "
        f"{recent[-1]:.2f}), and a constant explains 0, so the advantages carry more noise with it than without."
    )


def better_baseline(history: History, config: PpoConfig) -> str:
    """Leave the value model out while it is worse; where that is set already, let it learn more."""
    if config.advantage.baseline == "value":
        return line("advantage.baseline", "adaptive")
    return more_value_learning(history, config)


def dead(history: History, _config: PpoConfig) -> str | None:
    explained = history.recent(EXPLAINED, at.WINDOW)
    spreads = history.recent("value/std", at.WINDOW)
    outcomes = history.recent("value/return_std", at.WINDOW)
    if history.count("value/std") <= at.WINDOW or len(explained) < at.WINDOW or fmean(outcomes) <= 0:
        return None
    spread = fmean(spreads) / fmean(outcomes)
    if spread > at.DEAD_SPREAD or max(map(abs, explained)) > at.DEAD_EXPLAINED_VARIANCE:
        return None
    return (
        f"its values differ by {fmean(spreads):.2g} from token to token while what was earned differs by "
        f"{fmean(outcomes):.2g}, and it explains {explained[-1]:.3f} of it after {history.count('value/std')} steps: "
        "it says the same of every state."
    )


def livelier_head(_history: History, config: PpoConfig) -> str:
    """A faster head where it has a rate of its own, else a faster value model."""
    value = config.value
    return line("value.lr", value.lr * 10) if value.head_lr is None else line("value.head_lr", value.head_lr * 10)


def starts_biased(history: History, _config: PpoConfig) -> str | None:
    if history.count("value/return_std") > at.EARLY or warming_up(history):
        return None
    gap = distance_from_outcomes(history)
    if gap is None or abs(gap) < at.BIASED_START:
        return None
    return (
        f"in the first steps it says {history.latest('value/mean'):.3g} on average where "
        f"{history.latest('value/return_mean'):.3g} is earned, {abs(gap):.1f} times the spread of the outcomes "
        f"({history.latest('value/return_std'):.2g}): every advantage begins with that error."
    )


def lags(history: History, _config: PpoConfig) -> str | None:
    if history.count("value/return_std") <= at.EARLY or warming_up(history):
        return None
    gap = distance_from_outcomes(history)
    if gap is None or abs(gap) < at.LAGGING or not history.holds("policy/approx_kl"):
        return None
    return (
        f"it says {history.latest('value/mean'):.3g} on average where {history.latest('value/return_mean'):.3g} is "
        f"earned, {abs(gap):.1f} spreads of the outcomes away, {history.count('value/return_std')} steps into the run: "
        "the policy changes faster than the value model follows, and the advantages are those of an earlier policy."
    )


def distance_from_outcomes(history: History) -> float | None:
    """The mean outcome less the mean value, in spreads of the outcomes; None where those do not differ."""
    early = history.early("value/return_std", at.EARLY)
    spread = max(history.latest("value/return_std"), at.LAGGING_FLOOR * fmean(early))
    return (history.latest("value/return_mean") - history.latest("value/mean")) / spread if spread > 0 else None


def scale_drifts(history: History, _config: PpoConfig) -> str | None:
    if history.count("value/return_std") < at.EARLY + at.WINDOW:
        return None
    before = returns_size(history.early("value/return_mean", at.EARLY), history.early("value/return_std", at.EARLY))
    now = returns_size(history.recent("value/return_mean", at.EARLY), history.recent("value/return_std", at.EARLY))
    if min(before, now) <= 0 or 1 / at.SCALE_DRIFT < now / before < at.SCALE_DRIFT:
        return None
    return (
        f"returns were {before:.3g} in size in the first {at.EARLY} steps and are {now:.3g} now, {now / before:.2g} "
        "times as much: learning rates and clips that were right for one are wrong for the other."
    )


def returns_size(means: list[float], spreads: list[float]) -> float:
    """The root mean square of the returns over some steps."""
    return float(fmean([mean**2 + spread**2 for mean, spread in zip(means, spreads, strict=True)])) ** 0.5


def steady_returns(_history: History, config: PpoConfig) -> str:
    """Learn in units of the returns; where the loss cannot, hold the scores themselves to a scale."""
    if config.value.loss == "mse" and not config.value.normalize and config.value.clip is None:
        return line("value.normalize", True)
    if config.score.normalize == "none" and not any(source.center for source in config.rewards):
        return line("score.normalize", "running")
    return line("score.clip", config.score.clip / 2 if config.score.clip else 5.0)


def credit_is_lost(history: History, _config: PpoConfig) -> str | None:
    if history.latest("advantage/from_value", 1.0) == 0:
        return None
    first, last = (fmean(history.recent(f"{CREDIT}/{quarter}", at.WINDOW)) for quarter in (1, 4))
    known = fmean(history.recent(f"{BY_QUARTER}/1", at.WINDOW))
    enough = history.count(f"{CREDIT}/1") >= at.WINDOW
    if not enough or first > at.LOST_CREDIT or last < at.KEPT_CREDIT * max(first, 0.0) + 0.1 or known > at.KNOWN_EARLY:
        return None
    return (
        f"advantages in the first quarter of the responses correlate {first:.2f} with what was earned, in the last "
        f"quarter {last:.2f}, and the value model explains {known:.2f} of the first quarter: neither the reward nor "
        "the value model tells early tokens what they led to."
    )


def farther_credit(_history: History, config: PpoConfig) -> str:
    """A longer lambda for the policy; where it is whole already, for the value targets."""
    advantage = config.advantage
    if advantage.gamma < 1:
        return line("advantage.gamma", 1.0)
    if advantage.length_adaptive is not None:
        return line("advantage.length_adaptive", advantage.length_adaptive * 4)
    if advantage.baseline == "batch" or advantage.lambda_policy >= 1:
        return line("advantage.lambda_value", 1.0)
    return line("advantage.lambda_policy", 0.95 if advantage.lambda_policy < 0.9 else 1.0)


def warming_up(history: History) -> bool:
    """Whether the policy rests; the value model is being brought into shape."""
    return history.latest("value/warming_up", 0.0) > 0


RULES = (
    Rule(
        "critic_worse_than_baseline",
        "the value model is worse than no value model",
        f"median explained variance of {at.WINDOW} steps under {at.WORSE_EXPLAINED_VARIANCE:g}, the latest under 0",
        (EXPLAINED,),
        worse_than_a_baseline,
        better_baseline,
        "Pan et al. 2026 (EVPO) switch the baseline at an explained variance of 0",
        PAGE,
    ),
    Rule(
        "critic_dead",
        "the value model says the same of every state",
        f"spread of the values under {at.DEAD_SPREAD:g} of the outcomes' and explained variance within "
        f"{at.DEAD_EXPLAINED_VARIANCE:g} of 0 for {at.WINDOW} steps, from step {at.WINDOW + 1}",
        (EXPLAINED, "value/std", "value/return_std"),
        dead,
        livelier_head,
        "reasoning: a constant explains nothing of what differs",
        PAGE,
    ),
    Rule(
        "value_start_biased",
        "the value model starts far from what is earned",
        f"in the first {at.EARLY} steps the mean value is {at.BIASED_START:g} spreads of the outcomes off",
        ("value/mean", "value/return_mean", "value/return_std"),
        starts_biased,
        longer_warmup,
        "docs/results/oracles.md: a start at 3 lets TD(0) collapse; Yuan et al. 2025 (VC-PPO) on value initialisation",
        PAGE,
        holds=1,
    ),
    Rule(
        "critic_lags",
        "the value model lags behind the policy",
        f"after the first {at.EARLY} steps the mean value is {at.LAGGING:g} spreads of the outcomes off",
        ("value/mean", "value/return_mean", "value/return_std"),
        lags,
        more_value_learning,
        "docs/results/oracles.md: the value model's update frequency decides; Xiao and Zhu 2025, chapter 4",
        PAGE,
        holds=3,
        lower_rate_helps=True,
    ),
    Rule(
        "return_scale_drifts",
        "the scale of the returns drifts",
        f"root mean square of the returns {at.SCALE_DRIFT:g} times that of the first {at.EARLY} steps, or as much less",
        ("value/return_mean", "value/return_std"),
        scale_drifts,
        steady_returns,
        "van Hasselt et al. 2016 (PopArt)",
        PAGE,
    ),
    Rule(
        "signal_decays",
        "the reward does not reach early tokens",
        f"first-quarter advantages correlate less than {at.LOST_CREDIT:g} with what was earned, the last quarter's "
        f"over {at.KEPT_CREDIT:g} times as much, and the value model explains under {at.KNOWN_EARLY:g} of the first",
        (f"{CREDIT}/1", f"{CREDIT}/4", f"{BY_QUARTER}/1"),
        credit_is_lost,
        farther_credit,
        "Yuan et al. 2025 (VC-PPO): the reward decays as lambda to the power of the distance",
        PAGE,
    ),
)
