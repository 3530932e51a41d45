"""What can be asked of every token of a sample, as pure functions of the numbers that a run saves.

All of them follow the one alignment of `tandem.types`: `values[t]` is the value of the state before token t is
emitted, `rewards[t]` is paid for emitting it. A number that a run did not save, or that is not finite, is NaN, and so
is everything that would need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class TokenNumbers:
    """A sample's saved numbers, [T] each, and what else the quantities need.

    `bootstrapped` says that the response was cut and that the value of its last state, `final_value`, stands for what
    would have followed; otherwise nothing follows the last token.
    """

    length: int
    arrays: Mapping[str, Numbers]
    gamma: float
    bootstrapped: bool
    final_value: float

    def __getitem__(self, name: str) -> Numbers:
        found = self.arrays.get(name)
        return np.full(self.length, np.nan) if found is None else found


@dataclass(frozen=True)
class Quantity:
    """One number a token: what it is called, how it is computed, and how it is coloured.

    `middle` is where its colours have their neutral point; with "log" scale distances from it are ratios. Colours are
    never full nearer than `least` to it, so that rounding does not look like a difference.
    """

    name: str
    title: str
    formula: str
    meaning: str
    unit: str
    middle: Literal["zero", "one", "mean"]
    scale: Literal["linear", "log"]
    least: float
    compute: Callable[[TokenNumbers], Numbers]

    def of(self, sample: TokenNumbers) -> Numbers:
        """[T], NaN where it cannot be told."""
        with np.errstate(all="ignore"):
            found = self.compute(sample)
        return np.where(np.isfinite(found), found, np.nan)

    def distances(self, values: Numbers, middle: float) -> Numbers:
        """How far values are from the neutral point, signed."""
        return np.log(np.maximum(values, 1e-300)) if self.scale == "log" else values - middle


def td_errors(sample: TokenNumbers) -> Numbers:
    """delta_t = r_t + gamma V(s_{t+1}) - V(s_t), with no value after an end."""
    values = sample["values"]
    after_last = sample.final_value if sample.bootstrapped else 0.0
    following = np.append(values[1:], after_last)[: sample.length]
    return sample["rewards"] + sample.gamma * following - values


def outcomes(sample: TokenNumbers) -> Numbers:
    """What was earned from each token on, sum_l gamma^l r_{t+l}; unknown where a response was cut and bootstrapped."""
    if sample.bootstrapped:
        return np.full(sample.length, np.nan)
    if sample.gamma == 1.0:
        return np.cumsum(sample["rewards"][::-1])[::-1]
    earned, following = np.empty(sample.length), 0.0
    for t in range(sample.length - 1, -1, -1):
        earned[t] = following = sample["rewards"][t] + sample.gamma * following
    return earned


def value_errors(sample: TokenNumbers) -> Numbers:
    """V(s_t) less what was earned from there on."""
    return sample["values"] - outcomes(sample)


def log_ratios_to_reference(sample: TokenNumbers) -> Numbers:
    """log pi(y_t|s_t) - log pi_ref(y_t|s_t)."""
    return sample["logprobs"] - sample["reference_logprobs"]


def ratios_to_sampler(sample: TokenNumbers) -> Numbers:
    """pi(y_t|s_t) / mu(y_t|s_t), mu being what sampled."""
    return np.exp(sample["logprobs"] - sample["behaviour_logprobs"])


def surprises(sample: TokenNumbers) -> Numbers:
    """-log pi(y_t|s_t)."""
    return -sample["logprobs"]


QUANTITIES: tuple[Quantity, ...] = (
    Quantity(
        "advantage",
        "advantage",
        "A(t) = sum over l of (gamma lambda)^l delta(t+l)",
        "How much better this token did than the value model expected, as the policy learnt from it: blue tokens were "
        "made likelier, orange ones less likely.",
        "reward",
        "zero",
        "linear",
        1e-3,
        lambda sample: sample["advantages"],
    ),
    Quantity(
        "value",
        "value",
        "V(s(t)), the state before the token is emitted",
        "What the value model expected the rest of the response to earn. Colours are neutral at the run's mean value, "
        "since a reward's zero means nothing.",
        "reward",
        "mean",
        "linear",
        1e-3,
        lambda sample: sample["values"],
    ),
    Quantity(
        "value_error",
        "value error",
        "V(s(t)) - sum over l of gamma^l r(t+l)",
        "The value less what was earned from there on: blue where the value model promised too much, orange where too "
        "little.",
        "reward",
        "zero",
        "linear",
        1e-3,
        value_errors,
    ),
    Quantity(
        "td_error",
        "TD error",
        "delta(t) = r(t) + gamma V(s(t+1)) - V(s(t))",
        "By how much this one token changed what the value model expects, with its reward: where the response was won "
        "or lost, in the critic's eyes.",
        "reward",
        "zero",
        "linear",
        1e-3,
        td_errors,
    ),
    Quantity(
        "kl",
        "KL",
        "log pi(y(t)|s(t)) - log pi_ref(y(t)|s(t))",
        "The log-ratio to the reference, whose sum over the response is its KL estimate: blue tokens have become "
        "likelier than under the reference, orange ones less likely.",
        "nats",
        "zero",
        "linear",
        1e-3,
        log_ratios_to_reference,
    ),
    Quantity(
        "ratio",
        "ratio",
        "pi(y(t)|s(t)) / mu(y(t)|s(t)), mu being what sampled",
        "The policy before the step's update against the generator that sampled the token. Away from 1 the two do not "
        "compute the same thing (another engine, lower precision, stale weights). It is exactly 1 where they were not "
        "compared.",
        "",
        "one",
        "log",
        1e-2,
        ratios_to_sampler,
    ),
    Quantity(
        "reward",
        "reward",
        "r(t) = process reward - beta KL estimate (t) + [t is last] score",
        "What was paid for emitting this token: the score at the last one, process rewards at their own, and the KL "
        "penalty at every one, where the recipe places it in the reward.",
        "reward",
        "zero",
        "linear",
        1e-3,
        lambda sample: sample["rewards"],
    ),
    Quantity(
        "surprise",
        "surprise",
        "-log pi(y(t)|s(t))",
        "How unlikely the policy found the token that it sampled; its mean estimates the policy's entropy.",
        "nats",
        "zero",
        "linear",
        1e-3,
        surprises,
    ),
)
