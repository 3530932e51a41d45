"""Rules on what the responses are like: their variety, their length, and whether they end."""

from __future__ import annotations

from statistics import fmean

from tandem.config import PpoConfig
from tandem.health import thresholds as at
from tandem.health.history import History
from tandem.health.remedies import hold_nearer, line
from tandem.health.rule import Rule

PAGE = "docs/diagnosis/text.md"
ENTROPY, REPEATED, LENGTH, ENDED = "policy/entropy", "rollout/repetition", "rollout/length", "rollout/eos_rate"


def entropy_collapses(history: History, _config: PpoConfig) -> str | None:
    before, now = first_and_latest(history, ENTROPY)
    if before <= 0 or now > at.COLLAPSED_ENTROPY * before:
        return None
    return (
        f"the entropy fell from {before:.2g} to {now:.2g} nats a token, {now / before:.0%} of what it was: the policy "
        "tries nothing new, and what it does not sample it cannot learn of."
    )


def more_variety(history: History, config: PpoConfig) -> str:
    """A price on leaving the reference, which holds its entropy too; where it has one, a bonus for entropy."""
    if config.kl.coefficient == 0 or config.policy.entropy_coefficient > 0:
        return hold_nearer(history, config)
    return line("policy.entropy_coefficient", 0.01)


def repeats_itself(history: History, _config: PpoConfig) -> str | None:
    before, now = first_and_latest(history, REPEATED)
    if now - before < at.REPETITIVE:
        return None
    return (
        f"{now:.0%} of all four-token runs stood earlier in their response, {before:.0%} in the first steps: the "
        "policy says the same again and again."
    )


def shrinks(history: History, _config: PpoConfig) -> str | None:
    before, now = first_and_latest(history, LENGTH)
    if before <= 0 or now > at.SHRUNK * before:
        return None
    return f"responses fell from {before:.3g} to {now:.3g} tokens, {now / before:.0%} of what they were."


def grows(history: History, _config: PpoConfig) -> str | None:
    before, now = first_and_latest(history, LENGTH)
    if before <= 0 or now < at.GROWN * before:
        return None
    return f"responses grew from {before:.3g} to {now:.3g} tokens, {now / before:.1f} times what they were."


def shorter_answers(history: History, config: PpoConfig) -> str:
    """A penalty on overlong responses, where one can be paid; else the reference's lengths."""
    score, limit = config.score, config.rollout.max_new_tokens
    if config.advantage.at_limit == "bootstrap" or limit < 4:
        return hold_nearer(history, config)
    if score.overlong_from is not None:
        return line("score.overlong_penalty", score.overlong_penalty * 2)
    return line("score.overlong_from", limit // 2)


def ends_no_more(history: History, config: PpoConfig) -> str | None:
    before, now = first_and_latest(history, ENDED)
    if before >= at.ENDING and now < at.ENDS_NO_MORE * before:
        return (
            f"{now:.0%} of the responses end by themselves, {before:.0%} did in the first steps: the policy has "
            "unlearnt to stop, and its scores are those of cut text."
        )
    wanted = config.score.missing_eos_penalty > 0 or config.advantage.at_limit == "bootstrap"
    if wanted and before < at.NEVER_ENDS and now < at.NEVER_ENDS and history.count(ENDED) > at.WINDOW:
        return (
            f"{now:.0%} of the responses end within the limit of {config.rollout.max_new_tokens} tokens, and the "
            "recipe pays only for an end: there is nothing to learn an end from."
        )
    return None


def reward_ends(_history: History, config: PpoConfig) -> str:
    """A penalty for responses that are cut; where there is one, or none can be paid, room to end in."""
    if config.advantage.at_limit == "bootstrap" or config.score.missing_eos_penalty > 0:
        return line("rollout.max_new_tokens", config.rollout.max_new_tokens * 2)
    return line("score.missing_eos_penalty", 1.0)


def first_and_latest(history: History, name: str) -> tuple[float, float]:
    """The mean of the first steps, and of the latest two."""
    return fmean(history.early(name, at.EARLY)), fmean(history.recent(name, 2))


RULES = (
    Rule(
        "entropy_collapse",
        "the policy's entropy collapses",
        f"entropy under {at.COLLAPSED_ENTROPY:g} of the first {at.EARLY} steps'",
        (ENTROPY,),
        entropy_collapses,
        more_variety,
        "Cui et al. 2025 on the entropy mechanism; Yu et al. 2025 (DAPO)",
        PAGE,
        lower_rate_helps=True,
    ),
    Rule(
        "repetition",
        "the responses repeat themselves",
        f"share of repeated four-token runs {at.REPETITIVE:g} over the first {at.EARLY} steps'",
        (REPEATED,),
        repeats_itself,
        hold_nearer,
        "Welleck et al. 2019 on repetition",
        PAGE,
    ),
    Rule(
        "length_collapse",
        "the responses shrink away",
        f"length under {at.SHRUNK:g} of the first {at.EARLY} steps'",
        (LENGTH,),
        shrinks,
        hold_nearer,
        "Singhal et al. 2023 on length in RLHF",
        PAGE,
    ),
    Rule(
        "length_runaway",
        "the responses grow and grow",
        f"length over {at.GROWN:g} times the first {at.EARLY} steps'",
        (LENGTH,),
        grows,
        shorter_answers,
        "Singhal et al. 2023 on length in RLHF",
        PAGE,
    ),
    Rule(
        "no_end",
        "the responses do not end",
        f"share that ends by itself under {at.ENDS_NO_MORE:g} of the first {at.EARLY} steps', where that was "
        f"{at.ENDING:g} or more; or none ends where the recipe pays only for an end",
        (ENDED,),
        ends_no_more,
        reward_ends,
        "Stiennon et al. 2020 and Huang et al. 2024 on the missing-EOS penalty",
        PAGE,
    ),
)
