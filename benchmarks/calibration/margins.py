"""How far healthy and faulty runs stand from the thresholds: the evidence beside each number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from tandem.health import thresholds as at

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Margin:
    """A number that a run reaches at its worst, and the threshold that it is held against.

    `rule` is the one whose faults must cross it; `above` tells on which side they are.
    """

    threshold: str
    what: str
    rule: str
    reached: Callable[[Rows], float]
    above: bool

    @property
    def value(self) -> float:
        return float(getattr(at, self.threshold))


def of(rows: Rows, name: str) -> list[float]:
    """The numbers of a metric, without gaps, while the policy learns."""
    return [
        row[name]
        for row in rows
        if not row.get("value/warming_up") and isinstance(row.get(name), float) and math.isfinite(row[name])
    ]


def windows(values: Sequence[float], size: int, start: int = 0) -> list[Sequence[float]]:
    return [values[end - size : end] for end in range(max(size, start), len(values) + 1)]


def early(rows: Rows, name: str) -> float:
    return fmean(of(rows, name)[: at.EARLY])


def gaps(rows: Rows) -> list[float]:
    """Distances of the mean value from the mean outcome, in spreads."""
    floor = at.LAGGING_FLOOR * early(rows, "value/return_std")
    triples = zip(of(rows, "value/mean"), of(rows, "value/return_mean"), of(rows, "value/return_std"), strict=True)
    return [abs(value - outcome) / max(spread, floor, 1e-12) for value, outcome, spread in triples]


def largest_pair(name: str) -> Callable[[Rows], float]:
    """The largest mean of two steps."""
    return lambda rows: max(map(fmean, windows(of(rows, name), 2)))


def against_early(name: str, worst: Callable[..., float]) -> Callable[[Rows], float]:
    """The mean of two steps, in units of the first steps', at its worst."""
    return lambda rows: worst(map(fmean, windows(of(rows, name), 2))) / early(rows, name)


def size_ratio(rows: Rows) -> float:
    means, spreads = of(rows, "value/return_mean"), of(rows, "value/return_std")
    sizes = [math.sqrt(fmean(part)) for part in windows([m**2 + s**2 for m, s in zip(means, spreads, strict=True)], 3)]
    return max(max(size / sizes[0], sizes[0] / size) for size in sizes)


def nats_a_token(rows: Rows) -> float:
    pairs = zip(of(rows, "objective/kl"), of(rows, "rollout/length"), strict=True)
    return max(map(fmean, windows([kl / length for kl, length in pairs], 2)))


def possible_gain(rows: Rows) -> float:
    price = of(rows, "objective/kl_coefficient")[0]
    return early(rows, "objective/score_std") / price if price > 0 else math.inf


def lost_likelihood(rows: Rows) -> float:
    name = "rollout/reference_logprob"
    return early(rows, name) - min(map(fmean, windows(of(rows, name), 2)))


MARGINS = (
    Margin(
        "WORSE_EXPLAINED_VARIANCE",
        "lowest median explained variance of 4 steps",
        "critic_worse_than_baseline",
        lambda rows: min(map(median, windows(of(rows, "value/explained_variance"), at.WINDOW))),
        above=False,
    ),
    Margin(
        "BIASED_START",
        "largest distance of values from outcomes in the first 3 steps, spreads",
        "value_start_biased",
        lambda rows: max(gaps(rows)[: at.EARLY]),
        above=True,
    ),
    Margin(
        "LAGGING",
        "the same later, that 3 steps in a row reach",
        "critic_lags",
        lambda rows: max(map(min, windows(gaps(rows)[at.EARLY :], 3))),
        above=True,
    ),
    Margin("SCALE_DRIFT", "largest factor of the returns' size", "return_scale_drifts", size_ratio, above=True),
    Margin("FAR_A_TOKEN", "largest KL, nats a token", "kl_does_not_bite", nats_a_token, above=True),
    Margin(
        "LARGE_APPROX_KL",
        "largest approximate KL of 2 steps, nats a token",
        "updates_too_large",
        largest_pair("policy/approx_kl"),
        above=True,
    ),
    Margin(
        "STILL_APPROX_KL",
        "largest approximate KL of a step",
        "learning_rate_too_small",
        lambda rows: max(of(rows, "policy/approx_kl")),
        above=False,
    ),
    Margin("HELD_GAIN", "spread of the scores over KL coefficient", "kl_too_strong", possible_gain, above=False),
    Margin(
        "COLLAPSED_ENTROPY",
        "lowest entropy, of the first steps'",
        "entropy_collapse",
        against_early("policy/entropy", min),
        above=False,
    ),
    Margin(
        "REPETITIVE",
        "largest rise of repetition",
        "repetition",
        lambda rows: largest_pair("rollout/repetition")(rows) - early(rows, "rollout/repetition"),
        above=True,
    ),
    Margin(
        "SHRUNK", "shortest, of the first steps'", "length_collapse", against_early("rollout/length", min), above=False
    ),
    Margin(
        "FLUENCY_FELL", "largest fall of the reference's log-probability", "reward_hacking", lost_likelihood, above=True
    ),
    Margin(
        "MISMATCH",
        "largest gap to the generator, nats a token",
        "generator_mismatch",
        largest_pair("rollout/logprob_mismatch"),
        above=True,
    ),
    Margin(
        "DROWNED",
        "largest ratio of the value's gradient to the policy's",
        "gradient_conflict",
        largest_pair("policy/value_gradient_ratio"),
        above=True,
    ),
)


def reached(rows: Rows) -> dict[str, float]:
    """What a run reaches of every margin that its metrics allow to read."""
    found = {}
    for margin in MARGINS:
        try:
            found[margin.threshold] = margin.reached(rows)
        except (ValueError, ZeroDivisionError, IndexError):
            continue
    return found


def table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each margin the threshold, the worst of the healthy runs and the mildest of the runs with its fault."""
    lines = []
    for margin in MARGINS:
        read = [run for run in runs if margin.threshold in run["reached"]]
        healthy = [run["reached"][margin.threshold] for run in read if not run["rules"]]
        faulty = [run["reached"][margin.threshold] for run in read if margin.rule in run["rules"]]
        worst, mildest = (max, min) if margin.above else (min, max)
        lines.append(
            {
                "threshold": margin.threshold,
                "value": margin.value,
                "what": margin.what,
                "rule": margin.rule,
                "side": "over" if margin.above else "under",
                "healthy_worst": worst(healthy) if healthy else None,
                "faulty_mildest": mildest(faulty) if faulty else None,
            }
        )
    return lines
