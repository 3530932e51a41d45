"""What came of the demo: summary, plot, and plain words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from tandem.run import Progress
from tandem.run.folder import read_metrics

GOLD, MODEL = "objective/score/gold", "objective/score/reward_model"
_SAMPLES = 4


def summarise(
    run_dir: Path, source: str, seed: int, seconds: float, reward: dict[str, Any], joint: dict[str, Any]
) -> dict[str, Any]:
    """The figures that the demo is judged by, all of them on openings that no training step saw."""
    before, after = joint["heldout"]["before"], joint["heldout"]["after"]

    def change(name: str) -> dict[str, float | None]:
        return {"before": before[name], "after": after.get(name)}

    return {
        "interrupted": reward["interrupted"] or joint["interrupted"],
        "model": source,
        "seed": seed,
        "seconds": seconds,
        "peak_memory_gib": joint["peak_memory_gib"],
        "device": joint["device"],
        "threads": joint["threads"],
        "versions": joint["versions"],
        "reward_model": {
            "heldout_accuracy": reward["heldout_accuracy"],
            "heldout_pairs": reward["heldout_pairs"],
        },
        "gold": change(GOLD),
        "reward": change(MODEL),
        "kl": change("objective/kl"),
        "length": change("rollout/length"),
        "explained_variance": after.get("value/explained_variance"),
        "heldout_responses": len(read_samples(run_dir, "before")),
        "samples": side_by_side(run_dir) if after else [],
        "steps": joint["steps"],
    }


def read_samples(run_dir: Path, when: str) -> list[dict[str, Any]]:
    path = run_dir / "ppo" / "rollouts" / f"heldout_{when}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def side_by_side(run_dir: Path) -> list[dict[str, Any]]:
    """The first continuation of each of the first openings, before and after; none of them is picked."""
    pairs = zip(read_samples(run_dir, "before"), read_samples(run_dir, "after"), strict=True)
    firsts: dict[str, dict[str, Any]] = {}
    for old, new in pairs:
        if old["prompt"] not in firsts:
            firsts[old["prompt"]] = {
                "opening": old["prompt"],
                "before": old["response"],
                "after": new["response"],
                "gold": {"before": old["scores"]["gold"], "after": new["scores"]["gold"]},
            }
    return list(firsts.values())[:_SAMPLES]


def over_optimisation(summary: dict[str, Any]) -> str:
    """In plain words, whether the reward model's gain is also the gold scorer's."""
    gold = summary["gold"]["after"] - summary["gold"]["before"]
    reward = summary["reward"]["after"] - summary["reward"]["before"]
    if reward <= 0:
        return f"The policy did not climb its reward model ({reward:+.2f}), so there is nothing to compare."
    if gold <= 0.05:
        return (
            f"The reward model is happier by {reward:+.2f} and the gold scorer is not ({gold:+.2f}): the policy found "
            "what the reward model gets wrong. That is over-optimisation."
        )
    return (
        f"The reward model's score rose by {reward:+.2f} (its own scale) and the gold scorer, which the policy never "
        f"saw, agrees: {gold:+.2f} on a scale from -1 to 1. The gain is real, not an error of the reward model."
    )


def print_report(summary: dict[str, Any], run_dir: Path, progress: Progress) -> None:
    """Before and after on the terminal."""
    if summary["interrupted"]:
        progress.say(f"Interrupted. What there is stands in {run_dir}.")
        return
    table = Table(title=f"On {summary['heldout_responses']} continuations of openings that no training step saw")
    for name in ("", "before", "after"):
        table.add_column(name, justify="left" if not name else "right")
    rows = {
        "gold score (VADER, -1 to 1)": summary["gold"],
        "reward model's score": summary["reward"],
        "KL to the reference, nats a sequence": summary["kl"],
        "length, tokens": summary["length"],
    }
    for name, change in rows.items():
        table.add_row(name, f"{change['before']:.2f}", f"{change['after']:.2f}")
    table.add_row("explained variance of the value model", "", f"{summary['explained_variance']:.2f}")
    progress.console.print(table)
    accuracy, pairs = summary["reward_model"]["heldout_accuracy"], summary["reward_model"]["heldout_pairs"]
    progress.say(f"Reward model: {accuracy:.2f} of {pairs} held-out pairs ordered as the gold scorer does.")
    progress.say(over_optimisation(summary))
    samples = Table(title="The first continuation of four held-out openings (gold score)", show_lines=True)
    for name in ("opening", "before", "after"):
        samples.add_column(name, ratio=1)
    for sample in summary["samples"]:
        cells = [f"{' '.join(sample[when].split())} ({sample['gold'][when]:+.2f})" for when in ("before", "after")]
        samples.add_row(sample["opening"], *(cell.replace("[", r"\[") for cell in cells))
    progress.console.print(samples)
    progress.say(
        f"{summary['seconds']:.0f} s, {summary['peak_memory_gib']:.1f} GiB at most. In {run_dir}: summary.json, "
        f"curves.png, ppo/model (load it with transformers, or: tandem generate {run_dir}/ppo/model --prompt '...')."
    )


def save_plot(run_dir: Path) -> None:
    """curves.png: what the joint stage did, step by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(run_dir / "ppo")
    steps = [row["step"] for row in rows]
    panels = {
        "gold score (never trained on)": GOLD,
        "reward model's score": MODEL,
        "KL to the reference, nats a sequence": "objective/kl",
        "explained variance of the value model": "value/explained_variance",
        "policy entropy, nats a token": "policy/entropy",
        "response length, tokens": "rollout/length",
    }
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), sharex=True, layout="constrained")
    for axis, (title, name) in zip(axes.flat, panels.items(), strict=True):
        axis.plot(steps, [float("nan") if row[name] is None else row[name] for row in rows], color="#0072B2")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(run_dir / "curves.png", dpi=110)
    pyplot.close(figure)
