"""Rules on the machine: numbers that are not finite, memory that grows, a throughput that falls."""

from __future__ import annotations

from itertools import pairwise
from statistics import median

from tandem.config import PpoConfig
from tandem.health import thresholds as at
from tandem.health.history import History
from tandem.health.remedies import line
from tandem.health.rule import Rule

PAGE = "docs/diagnosis/machine.md"
SKIPPED = "fault/skipped"
MEMORY, THROUGHPUT = ("memory/process_gib", "memory/device_gib"), "throughput/tokens_per_second"
LENGTH = "rollout/length"
PHASES = ("time/rollout", "time/score", "time/evaluate", "time/update")
OF_LEARNING = ("policy/loss", "value/loss", "policy/grad_norm", "value/grad_norm", "objective/kl", "objective/score")


def not_finite(history: History, _config: PpoConfig) -> str | None:
    if history.latest(SKIPPED, 0.0) > 0:
        total = history.latest("fault/skipped_total", 1.0)
        return f"a number was not finite and the step was skipped, the {total:.0f}. so far; faults/ holds its samples."
    broken = [name for name in history.not_finite_now() if name in OF_LEARNING]
    return f"{', '.join(broken)} is not finite." if broken else None


def safer_numbers(_history: History, config: PpoConfig) -> str:
    if config.compute.precision == "bfloat16":
        return line("compute.precision", "float32")
    return line("policy.lr", config.policy.lr / 10)


def memory_grows(history: History, _config: PpoConfig) -> str | None:
    for name in MEMORY:
        recent, early = history.recent(name, at.MEMORY_WINDOW), history.early(name, at.EARLY)
        if history.count(name) < at.EARLY + at.MEMORY_WINDOW or not history.holds(name):
            continue
        before, now, rises = median(early), recent[-1], all(a < b for a, b in pairwise(recent))
        if rises and now > at.MEMORY_GROWTH * before and now - before > at.MEMORY_GIB:
            return (
                f"{name} grew from {before:.3g} to {now:.3g} GiB and at each of the last {at.MEMORY_WINDOW} steps: "
                "something keeps what it should let go."
            )
    return None


def throughput_falls(history: History, _config: PpoConfig) -> str | None:
    if history.count(THROUGHPUT) < at.EARLY + at.THROUGHPUT_WINDOW:
        return None
    before, now = then_and_now(history, THROUGHPUT)
    shorter = history.count(LENGTH) > 0 and history.latest(LENGTH) < 0.5 * median(history.early(LENGTH, at.EARLY))
    if shorter or before <= 0 or now > at.THROUGHPUT_LEFT * before:
        return None
    return f"{now:.3g} tokens a second where the first steps had {before:.3g}{slowest_phase(history)}."


def slowest_phase(history: History) -> str:
    """The part of a step that has grown most in time, in words, where parts are measured."""
    grown = growth_of_phases(history)
    name = max(grown, key=lambda one: grown[one], default="")
    return f"; {name} takes {grown[name]:.1f} times as long" if name else ""


def growth_of_phases(history: History) -> dict[str, float]:
    """How many times as long each part of a step takes as in the first steps."""
    measured = {name: then_and_now(history, name) for name in PHASES if history.count(name) > at.THROUGHPUT_WINDOW}
    return {name: now / before for name, (before, now) in measured.items() if before > 0}


def more_at_once(history: History, config: PpoConfig) -> str:
    """More work at a time in the part that has become slow, where a setting says how much."""
    grown = growth_of_phases(history)
    phase = max(grown, key=lambda one: grown[one], default="")
    served = [place for place, source in enumerate(config.rewards) if source.url is not None]
    if phase == "time/rollout":
        return line("rollout.sequences_per_batch", config.rollout.sequences_per_batch * 2)
    if phase == "time/score" and served:
        source = config.rewards[served[0]]
        return line(f"rewards.{served[0]}.requests_at_once", source.requests_at_once * 2)
    if phase in ("time/evaluate", "time/update"):
        return line("compute.tokens_per_microbatch", config.compute.tokens_per_microbatch * 2)
    return line("save_rollouts_every", config.save_rollouts_every * 10)


def room_in_memory(_history: History, config: PpoConfig) -> str:
    """Smaller micro-batches: room until what grows is found."""
    return line("compute.tokens_per_microbatch", max(1, config.compute.tokens_per_microbatch // 2))


def then_and_now(history: History, name: str) -> tuple[float, float]:
    """Medians of the first and of the latest steps."""
    return median(history.early(name, at.EARLY)), median(history.recent(name, at.THROUGHPUT_WINDOW))


RULES = (
    Rule(
        "not_finite",
        "numbers that are not finite",
        "a step was skipped for one, or a loss, norm, KL or score of the latest row is none",
        (),
        not_finite,
        safer_numbers,
        "docs/decisions/0007-a-step-is-given-up-or-goes-back.md",
        PAGE,
        holds=1,
    ),
    Rule(
        "memory_grows",
        "memory in use grows from step to step",
        f"{at.MEMORY_GROWTH:g} times and {at.MEMORY_GIB:g} GiB more than in the first {at.EARLY} steps, and more at "
        f"each of {at.MEMORY_WINDOW} steps",
        (MEMORY[0],),
        memory_grows,
        room_in_memory,
        "reasoning: a step needs no more memory than the one before",
        PAGE,
        about="machine",
    ),
    Rule(
        "throughput_falls",
        "the throughput falls",
        f"median tokens a second of {at.THROUGHPUT_WINDOW} steps under {at.THROUGHPUT_LEFT:g} of the first "
        f"{at.EARLY}'s, while responses are not half as long",
        (THROUGHPUT,),
        throughput_falls,
        more_at_once,
        "reasoning: a step takes no longer than the one before, token for token",
        PAGE,
        about="machine",
    ),
)
