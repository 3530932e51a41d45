"""The settings that are held against the exact solution, with what each must reach or must fail to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from oracles.tabular import Task, counter, tree
from oracles.training import Setup


@dataclass(frozen=True)
class Row:
    """A line of the table: the setting, what it shows, and the gap that each seed must stay under or go over."""

    name: str
    task: Callable[[], Task]
    setup: Setup
    shows: str
    below: float | None = None
    above: float | None = None

    @property
    def gate(self) -> str:
        if self.below is not None:
            return f"< {self.below:g}"
        return "" if self.above is None else f"> {self.above:g}"

    def missed(self, gap: float) -> bool:
        """Whether a seed's gap is on the wrong side of the gate."""
        return (self.below is not None and gap >= self.below) or (self.above is not None and gap <= self.above)


def first_tree() -> Task:
    return tree(seed=0)


def _on_tree(**settings: Any) -> Setup:
    return Setup(episodes=1024, settings=_dotted(settings))


def _on_counter(value_start: float = 0.0, **settings: Any) -> Setup:
    return Setup(episodes=512, settings=_dotted(settings), value_start=value_start)


def _dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in settings.items()}


TD0 = {"advantage__lambda_policy": 0.0, "advantage__lambda_value": 0.0}
BOOK = {"preset": "book"}
HISTOGRAM = {"value__loss": "hl_gauss", "value__histogram": {"low": -4.0, "high": 4.0, "bins": 41}}

TREE_ROWS = [
    Row("default: KL in the reward, lambda .95 / 1", first_tree, _on_tree(), "the default", below=0.03),
    Row("lambda 1 / 1", first_tree, _on_tree(advantage__lambda_policy=1.0), "Monte-Carlo advantages", below=0.03),
    Row("TD(0) / TD(0)", first_tree, _on_tree(**TD0), "enough where responses are short", below=0.03),
    Row("length-adaptive lambda, alpha 1", first_tree, _on_tree(advantage__length_adaptive=1.0), "VAPO", below=0.03),
    Row("whitened advantages", first_tree, _on_tree(advantage__whiten=True), "costs a little here", below=0.04),
    Row(
        "A2C",
        first_tree,
        _on_tree(policy__loss="a2c", policy__epochs=1, policy__lr=0.1),
        "one epoch: it has no clip",
        below=0.03,
    ),
    Row("clip-higher .2 / .28", first_tree, _on_tree(policy__clip_high=0.28), "", below=0.03),
    Row("dual clip 3", first_tree, _on_tree(policy__dual_clip=3.0), "", below=0.03),
    Row(
        "importance cap 2",
        first_tree,
        _on_tree(policy__importance_cap=2.0),
        "weights are 1: nothing to correct",
        below=0.03,
    ),
    Row("staleness 1", first_tree, _on_tree(rollout__staleness=1), "sampled one update behind, weighed", below=0.03),
    Row(
        "staleness 1, importance weights off",
        first_tree,
        _on_tree(rollout__staleness=1, policy__importance_cap="off"),
        "the same without the correction",
    ),
    Row("epochs stop at approximate KL .02", first_tree, _on_tree(policy__max_approx_kl=0.02), "", below=0.03),
    Row("categorical value head (HL-Gauss)", first_tree, _on_tree(**HISTOGRAM), "", below=0.03),
    Row("value clip .2", first_tree, _on_tree(value__clip=0.2), "", below=0.03),
    Row("normalised returns", first_tree, _on_tree(value__normalize=True), "", below=0.03),
    Row(
        "batch baseline",
        first_tree,
        _on_tree(advantage__baseline="batch"),
        "no value model in the advantages",
        below=0.03,
    ),
    Row("adaptive baseline", first_tree, _on_tree(advantage__baseline="adaptive"), "EVPO", below=0.03),
    Row(
        "entropy bonus .1",
        first_tree,
        _on_tree(policy__entropy_coefficient=0.1),
        "another objective: must miss this optimum",
        above=0.005,
    ),
    Row(
        "KL as a loss, k2",
        first_tree,
        _on_tree(kl__placement="loss", kl__estimator="k2"),
        "blind to later KL: the wrong fixed point",
        above=0.3,
    ),
    Row(
        "KL as a loss, k3",
        first_tree,
        _on_tree(kl__placement="loss", kl__estimator="k3"),
        "the other direction of the KL as well",
        above=0.3,
    ),
    Row("k2 in the reward", first_tree, _on_tree(kl__estimator="k2"), "a biased gradient", above=0.05),
    Row("k3 in the reward", first_tree, _on_tree(kl__estimator="k3"), "a biased gradient", above=0.05),
    Row("book preset", first_tree, _on_tree(**BOOK), "the textbook's form, literally", above=1.0),
    Row(
        "book's penalty alone",
        first_tree,
        Setup(episodes=1024, unchecked={"kl": {"placement": "loss", "estimator": "k1"}}),
        "its gradient is zero on average",
        above=1.0,
    ),
    Row("book's clip alone", first_tree, _on_tree(policy__loss="book"), "ignores the sign of the advantage"),
    Row(
        "one theta_ref",
        first_tree,
        Setup(episodes=1024, anchor_moves=True),
        "the anchor moves with the policy and holds nothing",
        above=1.0,
    ),
]

BIASED = {"value_start": 3.0}
COUNTER_ROWS = [
    Row("default: lambda .95 / 1", counter, _on_counter(), "the default", below=0.35),
    Row("staleness 1", counter, _on_counter(rollout__staleness=1), "sampled one update behind", below=0.35),
    Row("lambda 1 / 1", counter, _on_counter(advantage__lambda_policy=1.0), "", below=0.35),
    Row("lambda .95 / .95", counter, _on_counter(advantage__lambda_value=0.95), "", below=0.35),
    Row("TD(0) / TD(0)", counter, _on_counter(**TD0), "V starts at 0", below=0.9),
    Row("V starts at 3, TD(0) / TD(0)", counter, _on_counter(**BIASED, **TD0), "collapse", above=1.5),
    Row(
        "the same, 12 value updates to 1",
        counter,
        _on_counter(**BIASED, **TD0, value__epochs=48),
        "the value model's update frequency decides",
        below=0.9,
    ),
    Row(
        "the same, after 100 value-only steps",
        counter,
        _on_counter(**BIASED, **TD0, value__epochs=48, value__warmup={"steps": 100}),
        "warm-up",
        below=0.9,
    ),
    Row(
        "V starts at 3, TD(0), adaptive value epochs",
        counter,
        _on_counter(**BIASED, **TD0, value__adaptive={"max_epochs": 48}),
        "the schedule finds the frequency by itself",
        below=0.9,
    ),
    Row(
        "V starts at 3, TD(0), adaptive baseline",
        counter,
        _on_counter(**BIASED, **TD0, advantage__baseline="adaptive"),
        "EVPO: the batch's mean until the critic is better",
        below=0.9,
    ),
    Row("V starts at 3, lambda .95 / 1", counter, _on_counter(**BIASED), "decoupled GAE cures it too", below=0.35),
    Row("gamma .95", counter, _on_counter(advantage__gamma=0.95), "discounting is a bias here", above=0.6),
]
