"""Options of the joint stage, varied one at a time on several seeds: docs/results/ablation-TASK.md and .json.

usage: python -m ablation stories MODEL STORIES [--seeds N] [--only NAME ...]
       python -m ablation demo MODEL RUN [RUN ...] [--only NAME ...]

`stories`: MODEL is a small story model, STORIES a .jsonl file of {"text"}. `demo`: RUNs are finished demos, one a
seed, whose openings and reward models are used; their own joint stages are the first row. Runs that are already there
are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablation.report import page
from ablation.settings import DEMO, STORIES

ROOT = Path(__file__).parents[2]
AT_ONCE = 2
RESULTS, RUNS = ROOT / "docs" / "results", ROOT / "runs" / "ablation"


@dataclass(frozen=True)
class Run:
    """One run of the joint stage: a setting on a seed."""

    setting: str
    seed: int
    folder: Path
    words: Sequence[str]

    def summary(self) -> dict[str, Any]:
        """Run it on one thread, unless it has been run, and return what it reached."""
        path = self.folder / "summary.json"
        if not path.exists():
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "tandem", "ppo", *self.words, f"--run.directory={self.folder}"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{self.setting}, seed {self.seed}: {done.stderr.strip() or done.stdout[-500:]}")
        return json.loads(path.read_text(encoding="utf-8"))


def stories(model: Path, source: Path, seeds: int, only: Sequence[str]) -> list[Run]:
    """The first ten words of each story are a prompt; the last 64 prompts are held out."""
    lines = source.read_text(encoding="utf-8").splitlines()[:1064]
    openings = [" ".join(json.loads(line)["text"].split()[:10]) for line in lines]
    RUNS.mkdir(parents=True, exist_ok=True)
    files = {"prompts": openings[:-64], "eval_prompts": openings[-64:]}
    for name, texts in files.items():
        rows = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
        (RUNS / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    recipe = str(Path(__file__).parent / "stories.toml")
    data = [f"--data.{name}={RUNS / f'{name}.jsonl'}" for name in files]
    return [
        Run(
            name,
            seed,
            RUNS / "stories" / f"{_slug(name)}-{seed}",
            [recipe, f"--policy.model={model}", *data, f"--run.seed={seed}", *words],
        )
        for name, words in _chosen(STORIES, only).items()
        for seed in range(seeds)
    ]


def demo(model: Path, folders: Sequence[Path], only: Sequence[str]) -> list[Run]:
    """A setting on every seed before the next; the demo's own joint stages stand for its own setting."""
    runs = []
    for name, words in _chosen(DEMO, only).items():
        for folder in folders:
            seed = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["seed"]
            place = RUNS / "demo" / f"{_slug(name)}-{seed}" if words else folder / "ppo"
            runs.append(Run(name, seed, place, [*_demo_words(model, folder), f"--run.seed={seed}", *words]))
    return runs


def _demo_words(model: Path, folder: Path) -> list[str]:
    """The demo's joint stage on what a finished demo has left."""
    return [
        str(ROOT / "src" / "tandem" / "demo" / "ppo.toml"),
        f"--policy.model={model}",
        f"--rewards.0.model={folder / 'reward' / 'model'}",
        f"--data.prompts={folder / 'data' / 'openings.jsonl'}",
        f"--data.eval_prompts={folder / 'data' / 'heldout_openings.jsonl'}",
        "--adapters.upper_layers=15",
    ]


def _chosen(settings: Mapping[str, list[str]], only: Sequence[str]) -> Mapping[str, list[str]]:
    return {name: words for name, words in settings.items() if not only or name in only}


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="ablation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("task", choices=["stories", "demo"])
    parser.add_argument("model", type=Path)
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args()
    if given.task == "stories":
        runs = stories(given.model, given.sources[0], given.seeds, given.only)
    else:
        runs = demo(given.model, given.sources, given.only)
    found = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for run, summary in zip(runs, pool.map(Run.summary, runs), strict=True):
            after, last = summary["heldout"]["after"], summary["last_step"]
            row = {"setting": run.setting, "seed": run.seed, "before": summary["heldout"]["before"], "after": after}
            found.append(row | {"last_step": last, "seconds": summary["seconds"]})
            print(
                f"{len(found)}/{len(runs)}  {run.setting}, seed {run.seed}: {after['objective/rlhf_reward']:.3f}",
                flush=True,
            )
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    (RESULTS / f"ablation-{given.task}.json").write_text(text, encoding="utf-8")
    (RESULTS / f"ablation-{given.task}.md").write_text(page(given.task, found), encoding="utf-8")


if __name__ == "__main__":
    main()
