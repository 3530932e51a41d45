"""The page and the picture of the study."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import torch

from study.best_of_n import course_of
from study.frontier import Point, at_distance
from study.training import DPO, DPO_EPOCHS, JOINT, RESPONSES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DISTANCES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
GOLD, REWARD = "objective/score/gold", "objective/score/reward_model"
# Colours that the colour-blind tell apart (Okabe and Ito), and a shape of their own.
LOOKS = {
    "PPO": ("#0072B2", "o"),
    "A2C": ("#E69F00", "s"),
    "DPO": ("#009E73", "^"),
    "best of n": ("#CC79A7", "D"),
    "best of n by gold": ("#777777", "x"),
}


def summary_of(found: Sequence[tuple[int, str, Any]]) -> dict[str, Any]:
    """Every course as points, and what the reference is by itself: means and spreads of its candidates' scores."""
    courses: list[dict[str, Any]] = []
    references: dict[int, dict[str, float]] = {}
    for seed, part, raw in found:
        if part == "best of n":
            references[seed] = reference_of(raw)
            courses.append({"method": "best of n by gold", "seed": seed, "points": course_of(raw, "gold")})
        courses.append({"method": part, "seed": seed, "points": points_of(part, raw, references.get(seed))})
    for course in courses:
        course["points"] = [asdict(point) for point in course["points"]]
    return {"references": references, "courses": courses, "at_equal_kl": at_equal_kl(courses, references)}


def reference_of(scores: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, float]:
    both = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in scores.items()}
    return {f"{name}_{what}": float(getattr(rows, what)()) for name, rows in both.items() for what in ("mean", "std")}


def points_of(part: str, raw: Any, reference: Mapping[str, float] | None) -> list[Point]:
    """Where training begins, the policy is the reference: its mean is known from many more answers."""
    if part == "best of n":
        return course_of(raw, "reward")
    assert reference is not None
    start = Point(0.0, reference["gold_mean"], reference["reward_mean"])
    if part == "DPO":
        return [start, *(Point(row["kl"]["nats_a_sequence"], *dpo_scores(row)) for row in raw)]
    return [start, *(Point(row["objective/kl"], row[GOLD], row[REWARD]) for row in raw[1:])]


def dpo_scores(row: Mapping[str, Any]) -> tuple[float, float]:
    """Mean gold score and reward model's score of the model that was evaluated."""
    scores = {one["judge"]: one["score"]["model"] for one in row["comparisons"] if one["against"] == "baseline"}
    return scores["gold"], scores["reward_model"]


def at_equal_kl(
    courses: Sequence[Mapping[str, Any]], references: Mapping[int, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Gains over the reference at each distance, seed by seed; in the reference's own spreads too."""
    rows = []
    for kl in DISTANCES:
        for method in LOOKS:
            gains = {}
            for course in courses:
                if course["method"] == method:
                    reached = at_distance([Point(**point) for point in course["points"]], kl)
                    if reached is not None:
                        gains[course["seed"]] = gains_of(reached, references[course["seed"]])
            if gains:
                rows.append({"kl": kl, "method": method, "gains": gains})
    return rows


def gains_of(point: Point, reference: Mapping[str, float]) -> dict[str, float]:
    gold, reward = point.gold - reference["gold_mean"], point.reward - reference["reward_mean"]
    return {
        "gold": gold,
        "gold_in_spreads": gold / reference["gold_std"],
        "reward_in_spreads": reward / reference["reward_std"],
    }


def page(everything: Mapping[str, Any]) -> str:
    """The page, tables first; what they say is worked out from the numbers."""
    rows, seeds = everything["at_equal_kl"], sorted(everything["references"])
    methods = [method for method in LOOKS if any(row["method"] == method for row in rows)]
    lines = [
        "# PPO, A2C, DPO and best-of-n at equal KL",
        "",
        f"Made by `make study` on the demos of seeds {', '.join(map(str, seeds))} (`make demo-seeds`): SmolLM2-135M "
        "goes on with an opening, 24 tokens, and is to do so positively. Gold is VADER's score, from -1 to 1; it "
        "labelled the preferences, and no policy was trained on it. The reward model learnt from those preferences. "
        "Everything is measured on the forty held-out openings of the seed: "
        f"{40 * RESPONSES} responses at each point of a trained policy, 2,560 candidates for best-of-n.",
        "",
        f"- PPO and A2C: the demo's joint stage with `{' '.join(JOINT)}`, A2C with `--policy.loss=a2c`; measured after "
        "every step of 64 responses.",
        f"- DPO: on the very preferences that the reward model learnt from, `{' '.join(DPO)}`; measured after "
        f"{', '.join(f'{epochs:g}' for epochs in DPO_EPOCHS)} passes.",
        "- best of n: the reference answers n times and the reward model takes the best, n from 1 to 64; its KL is the "
        "bound log n - (n - 1)/n, which such texts nearly reach. By gold: the same where gold itself chooses.",
        "",
        "![gold score by KL](study.png)",
        "",
        "## Gain in gold at equal KL",
        "",
        "Mean over the seeds (each seed's own), read between the two measured points on either side along the root of "
        "the KL; `-` where fewer than all seeds went so far. A point's standard error is about .03 a seed, .02 for "
        "the mean, and less than .01 for best-of-n, beside what the choice of forty openings adds for all methods "
        "alike.",
        "",
        *table(rows, methods, len(seeds), "gold"),
        "",
        "Which wins where (`>`: on every seed; `~`: not on all of them):",
        "",
        *(f"- {kl:g} nats: {ranking(rows, kl, len(seeds))}" for kl in DISTANCES),
        "",
        "Best-of-n is the most efficient in KL as far as it goes: about 3 nats, for 64 answers to every question, for "
        "ever. A trained policy pays once and goes on: farther out the gains are larger than any n of that size "
        "reaches, and the text is mostly stock praise that leaves its opening behind (the rollouts after the last step "
        "are in `runs/study/seed-*/ppo/rollouts/heldout_after.jsonl`). Between PPO and A2C there is nothing to choose "
        "here, since each batch is used once; DPO, without a reward model and without sampling, comes close to both.",
        "",
        "## What the reward model thinks against what gold says",
        "",
        "Gains in spreads of the reference's own answers: by the reward model / by gold. Where the first outruns the "
        "second, the policy finds what the reward model gets wrong. For best-of-n the ratio of the two is little more "
        "than how far reward model and gold agree on the reference's own answers.",
        "",
        *table(rows, methods, len(seeds), "reward_in_spreads", "gold_in_spreads"),
        "",
        "## The ends of the courses",
        "",
        *ends(everything, methods),
        "",
    ]
    return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]], methods: Sequence[str], seeds: int, *names: str) -> list[str]:
    lines = ["| KL, nats a sequence | " + " | ".join(methods) + " |", "|---:|" + "---:|" * len(methods)]
    for kl in DISTANCES:
        cells = []
        for method in methods:
            gains = next((row["gains"] for row in rows if row["kl"] == kl and row["method"] == method), {})
            cells.append(cell(gains, names) if len(gains) == seeds else "-")
        lines.append(f"| {kl:g} | " + " | ".join(cells) + " |")
    return lines


def ranking(rows: Sequence[Mapping[str, Any]], kl: float, seeds: int) -> str:
    """Methods that a person can use, by mean gain in gold; the sign tells whether all seeds agree on a neighbour."""
    found = {
        row["method"]: [row["gains"][seed]["gold"] for seed in sorted(row["gains"])]
        for row in rows
        if row["kl"] == kl and row["method"] != "best of n by gold" and len(row["gains"]) == seeds
    }
    order = sorted(found, key=lambda method: -mean(found[method]))
    said = order[0]
    for better, worse in itertools.pairwise(order):
        agreed = all(one > other for one, other in zip(found[better], found[worse], strict=True))
        said += f" {'>' if agreed else '~'} {worse}"
    return said


def cell(gains: Mapping[Any, Mapping[str, float]], names: Sequence[str]) -> str:
    means = " / ".join(f"{mean(gain[name] for gain in gains.values()):+.2f}" for name in names)
    if len(names) > 1:
        return means
    return f"{means} ({', '.join(f'{gain[names[0]]:+.2f}' for gain in gains.values())})"


def ends(everything: Mapping[str, Any], methods: Sequence[str]) -> list[str]:
    """Each method's last point, seed by seed, and the best gold on the way."""
    lines = ["| method | KL at the end | gold at the end | best gold on the way | gain by the reward model, spreads |"]
    lines.append("|---|---|---|---|---|")
    for method in methods:
        courses = [course for course in everything["courses"] if course["method"] == method]
        last = [Point(**course["points"][-1]) for course in courses]
        best = [max(point["gold"] for point in course["points"]) for course in courses]
        spreads = [
            gains_of(point, everything["references"][course["seed"]])["reward_in_spreads"]
            for point, course in zip(last, courses, strict=True)
        ]
        columns = ([point.kl for point in last], [point.gold for point in last], best, spreads)
        lines.append(f"| {method} | " + " | ".join(", ".join(f"{x:.2f}" for x in column) for column in columns) + " |")
    return lines


def plot(everything: Mapping[str, Any], path: Path) -> None:
    """Gold by KL, and gold by what the reward model thinks; one line a seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for course in everything["courses"]:
        colour, shape = LOOKS[course["method"]]
        reference = everything["references"][course["seed"]]
        points = [Point(**point) for point in course["points"]]
        gains = [gains_of(point, reference) for point in points]
        look = {"color": colour, "marker": shape, "markersize": 4, "linewidth": 1, "alpha": 0.8}
        label = course["method"] if course["seed"] == min(everything["references"]) else None
        left.plot([point.kl for point in points], [gain["gold"] for gain in gains], label=label, **look)
        if course["method"] != "best of n by gold":
            right.plot(
                [gain["reward_in_spreads"] for gain in gains], [gain["gold_in_spreads"] for gain in gains], **look
            )
    left.set_xlabel("KL to the reference, nats a sequence")
    left.set_ylabel("gain in gold score")
    right.axline((0, 0), slope=1, color="#999999", linestyle=":", linewidth=1)
    right.set_xlabel("gain by the reward model, spreads of the reference")
    right.set_ylabel("gain by gold, spreads of the reference")
    left.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
