"""The table of an ablation, with its spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import mean
from typing import Any

from ablation.settings import DEMO, STORIES

COLUMNS = {
    "objective": "objective/rlhf_reward",
    "score": "objective/score",
    "KL": "objective/kl",
    "explained variance": "value/explained_variance",
    "certificate": "objective/certificate",
}
ABOUT = {
    "stories": (
        "A story model of 260K parameters goes on with the first ten words of a story; the reward is VADER's score of "
        "what it adds, 32 tokens. 40 steps of 64 responses (`benchmarks/ablation/stories.toml`); measured on 256 "
        "responses to 64 held-out openings."
    ),
    "demo": (
        "The demo's task, SmolLM2-135M under the reward model of a finished demo, one for each seed (`tandem demo`); "
        "the score is the reward model's, in its own units, so that only rows of the same seed compare. Measured on "
        "the forty held-out openings."
    ),
}


def page(task: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Figures of each seed, and the mean difference to the first setting over the seeds with its spread."""
    settings = {"stories": STORIES, "demo": DEMO}[task]
    names = list(settings)
    by_setting = {
        name: sorted(group, key=lambda row: row["seed"])
        for name, group in groupby(
            sorted(rows, key=lambda row: names.index(row["setting"])), key=lambda row: row["setting"]
        )
    }
    base = next(iter(by_setting.values()))
    lines = [
        f"# Options of the joint stage, one at a time: {task}",
        "",
        f"Made by `make ablation-{task}`. {ABOUT[task]}",
        "",
        "All figures are held-out and at the end of training, one for each seed. The objective is what is maximised: "
        "score less the KL coefficient times KL in nats a sequence. The difference is to the first row, seed by seed: "
        "mean, and the smallest and largest over the seeds. The seeds differ by chance alone, so a difference whose "
        "range holds zero says nothing.",
        "",
        "| setting | " + " | ".join(COLUMNS) + " | difference in objective |",
        "|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for name, seeds in by_setting.items():
        cells = [", ".join(f"{row['after'][key]:.3g}" for row in seeds) for key in COLUMNS.values()]
        gaps = [_objective(row) - _objective(other) for row, other in zip(seeds, base, strict=False)]
        difference = "" if seeds is base else f"{mean(gaps):+.3f} ({min(gaps):+.3f} to {max(gaps):+.3f})"
        lines.append(f"| {name} | " + " | ".join([*cells, difference]) + " |")
    lines += ["", "What each row changes:", ""]
    lines += [f"- {name}: `{' '.join(words)}`" for name, words in settings.items() if words and name in by_setting]
    start = base[0]["before"]
    lines += ["", f"Before training, seed {base[0]['seed']}: score {start['objective/score']:.3f}.", ""]
    return "\n".join(lines)


def _objective(row: Mapping[str, Any]) -> float:
    return float(row["after"]["objective/rlhf_reward"])
