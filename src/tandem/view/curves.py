"""Which curves a report shows, and what is in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tandem.view.metrics import describe
from tandem.view.reading import RunRecord


@dataclass(frozen=True)
class Chart:
    """Some metrics on one pair of axes, each by its short name."""

    title: str
    series: Mapping[str, str]


@dataclass(frozen=True)
class Group:
    title: str
    charts: tuple[Chart, ...]


def _joint_groups(run: RunRecord) -> tuple[Group, ...]:
    unweighted = measured_only(run)
    weighted = [name for name in reward_terms(run) if name not in unweighted]
    adapts = run.setting("kl", "target", None) is not None
    quarters = {f"quarter {n}": f"value/explained_variance_by_position/{n}" for n in range(1, 5)}
    return (
        Group(
            "What is wanted",
            (
                Chart(
                    "Reward",
                    {
                        "score": "objective/score",
                        "less the KL": "objective/rlhf_reward",
                        "held out": "heldout/objective/score",
                    },
                ),
                Chart("KL to the reference", {"training": "objective/kl", "held out": "heldout/objective/kl"}),
                *(
                    Chart(
                        f"{name}, measured only" if name in unweighted else name,
                        {"training": f"objective/score/{name}", "held out": f"heldout/objective/score/{name}"},
                    )
                    for name in (*(weighted if len(weighted) > 1 else ()), *unweighted)
                ),
                *((Chart("KL coefficient", {"coefficient": "objective/kl_coefficient"}),) if adapts else ()),
            ),
        ),
        Group(
            "The critic",
            (
                Chart(
                    "Explained variance",
                    {"training": "value/explained_variance", "held out": "heldout/value/explained_variance"},
                ),
                Chart("Explained variance by position", quarters),
                Chart("Value loss", {"loss": "value/loss"}),
                Chart(
                    "Calibration error",
                    {"training": "value/calibration_error", "held out": "heldout/value/calibration_error"},
                ),
                Chart("Value and score", {"mean value": "value/mean", "score": "objective/shaped_score"}),
                Chart("Optimality certificate", {"certificate": "objective/certificate"}),
            ),
        ),
        Group(
            "The policy",
            (
                Chart("Entropy", {"training": "policy/entropy", "held out": "heldout/policy/entropy"}),
                Chart("Clipped tokens", {"clipped": "policy/clipfrac"}),
                Chart("KL before to after the update", {"approximate KL": "policy/approx_kl"}),
                Chart("Largest ratio", {"largest": "policy/ratio_max"}),
                Chart("Gradient norms", {"policy": "policy/grad_norm", "value": "value/grad_norm"}),
                Chart("Advantages' spread", {"spread": "advantage/std"}),
            ),
        ),
        Group(
            "The rollouts",
            (
                Chart("Response length", {"training": "rollout/length", "held out": "heldout/rollout/length"}),
                Chart("Ended by itself", {"training": "rollout/eos_rate", "held out": "heldout/rollout/eos_rate"}),
                Chart(
                    "Generator against trainer",
                    {"mean": "rollout/logprob_mismatch", "largest": "rollout/logprob_mismatch_max"},
                ),
                Chart("Throughput", {"tokens a second": "throughput/tokens_per_second"}),
            ),
        ),
    )


def _data_groups() -> tuple[Group, ...]:
    def both(title: str, name: str) -> Chart:
        return Chart(title, {"training": f"train/{name}", "held out": f"heldout/{name}"})

    return (
        Group(
            "What is wanted",
            (
                both("Loss", "loss"),
                both("Accuracy", "accuracy"),
                both("Margin", "margin"),
                Chart("Rewards", {"chosen": "train/reward_chosen", "rejected": "train/reward_rejected"}),
                Chart(
                    "Accuracy by length",
                    {
                        "chosen is longer": "heldout/accuracy_chosen_longer",
                        "chosen is shorter": "heldout/accuracy_chosen_shorter",
                    },
                ),
                both("Calibration error", "calibration_error"),
            ),
        ),
        Group(
            "The optimiser",
            (Chart("Gradient norm", {"norm": "train/grad_norm"}), Chart("Learning rate", {"lr": "train/lr"})),
        ),
    )


def curves(run: RunRecord) -> dict[str, Any]:
    """The groups of charts that have anything to show, and the points of every metric.

    Metrics that no chart names have one each in a last group, so that nothing that a run measured stays hidden; the
    deciles of the calibration alone are drawn elsewhere, as what they are.
    """
    points = {name: series for name, series in points_of(run).items() if "calibration/" not in name}
    groups = _joint_groups(run) if run.stage == "ppo" else _data_groups()
    shown = [(group.title, [chart for chart in map(_present(points), group.charts) if chart]) for group in groups]
    named = {name for _, charts in shown for chart in charts for name in chart.series.values()}
    rest = [Chart(name, {name.rpartition("/")[2]: name}) for name in points if name not in named]
    shown.append(("Everything else that was measured", rest))
    return {
        "groups": [
            {
                "title": title,
                "charts": [
                    {
                        "title": chart.title,
                        "series": [{"label": label, "name": name} for label, name in chart.series.items()],
                    }
                    for chart in charts
                ],
            }
            for title, charts in shown
            if charts
        ],
        "points": points,
        "descriptions": {name: _description(name) for name in points},
    }


def _present(points: Mapping[str, Any]) -> Any:
    """Leaves out of a chart what the run did not measure; None where nothing stays."""

    def present(chart: Chart) -> Chart | None:
        series = {label: name for label, name in chart.series.items() if name in points}
        return Chart(chart.title, series) if series else None

    return present


def _description(name: str) -> dict[str, str] | None:
    found = describe(name)
    return None if found is None else {"what": found.what, "healthy": found.healthy, "unit": found.unit}


def points_of(run: RunRecord) -> dict[str, dict[str, list[Any]]]:
    """`x` steps and `y` values of every metric, None for a value that was not finite.

    Held-out metrics begin with those before the first step and end with those after the last.
    """
    found: dict[str, dict[str, list[Any]]] = {}

    def add(step: int, items: Iterable[tuple[str, Any]]) -> None:
        for name, value in items:
            series = found.setdefault(name, {"x": [], "y": []})
            if not series["x"] or series["x"][-1] != step:
                series["x"].append(step)
                series["y"].append(value if value is None else float(f"{value:.6g}"))

    add(0, heldout(run, "before").items())
    for row in run.metrics:
        add(int(row["step"] or 0), ((name, value) for name, value in row.items() if name != "step"))
    add(run.steps_done, heldout(run, "after").items())
    return found


def heldout(run: RunRecord, when: str) -> dict[str, float | None]:
    """What the summary says of held-out data `before` or `after` training, under the names of the rows' metrics."""
    found = run.summary.get("heldout")
    metrics = found.get(when) if isinstance(found, Mapping) else None
    if not isinstance(metrics, Mapping):
        return {}
    return {
        name if name.startswith("heldout/") else f"heldout/{name}": value
        for name, value in metrics.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def reward_terms(run: RunRecord) -> list[str]:
    """The names of the rewards, as metrics call them."""
    prefix = "objective/score/"
    row = run.metrics[0] if run.metrics else heldout(run, "before")
    return [name.rpartition(prefix)[2] for name in row if prefix in name]


def measured_only(run: RunRecord) -> list[str]:
    """The rewards of weight 0, which train nothing; a run that skips samples of one may not name them all."""
    names, sources = reward_terms(run), run.config.get("rewards")
    if not isinstance(sources, list) or len(sources) != len(names):
        return []
    return [
        name
        for name, source in zip(names, sources, strict=True)
        if isinstance(source, Mapping) and source.get("weight") == 0
    ]
