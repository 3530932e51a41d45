"""What one step off-policy gains in time: the same short run with a staleness of 0 and 1, turn and turn about.

usage: python benchmarks/staleness.py MODEL PROMPTS [RECIPE WORDS ...]

It means something on a machine with nothing else to do and more than one core: sampling and training then run at once.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from statistics import median

from tandem.cli import main
from tandem.run.folder import read_metrics

ROUNDS, STEPS, BEFORE = 2, 8, 2
RECIPE = Path(__file__).parents[1] / "recipes" / "ppo-function.toml"


def seconds(model: str, prompts: str, staleness: int, more: list[str]) -> list[dict[str, float]]:
    """The rows of a run's steps, without the first ones and the last, which has nothing to sample ahead."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["ppo", str(RECIPE), f"--policy.model={model}", f"--data.prompts={prompts}", f"--steps={STEPS}"]
        words += [f"--rollout.staleness={staleness}", f"--run.directory={folder}/run", "--run.trackers=[]", *more]
        if main(words) != 0:
            raise SystemExit(1)
        return read_metrics(Path(folder) / "run")[BEFORE:-1]


def compare(model: str, prompts: str, more: list[str]) -> None:
    """Print the medians of both, and who else was busy."""
    found: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    for _ in range(ROUNDS):
        for staleness, rows in found.items():
            rows += seconds(model, prompts, staleness, more)
    print(f"cores {os.cpu_count()}, load {os.getloadavg()[0]:.1f}")
    for staleness, rows in found.items():
        of = {
            name: median(row[f"time/{name}"] for row in rows) for name in ("step", "rollout", "weight_sync", "update")
        }
        print(f"staleness {staleness}: " + ", ".join(f"{name} {value:.3f} s" for name, value in of.items()))
    steps = {staleness: median(row["time/step"] for row in rows) for staleness, rows in found.items()}
    print(f"a step takes {steps[1] / steps[0]:.2f} of the time")


if __name__ == "__main__":
    compare(sys.argv[1], sys.argv[2], sys.argv[3:])
