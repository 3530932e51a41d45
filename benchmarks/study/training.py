"""What is trained for the study; what is on disk already is not run again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GOLD = "tandem.demo.gold:gold"
RESPONSES = 4
# The demo's joint stage at a constant learning rate, measured at every step, so that its course is a frontier.
JOINT = ["--steps=8", "--policy.schedule=constant", "--eval_every=1", f"--eval_responses_per_prompt={RESPONSES}"]
JOINT_METHODS = {"PPO": [], "A2C": ["--policy.loss=a2c"]}
DPO = ["--beta=0.05", "--optimizer.lr=5e-4", "--optimizer.schedule=constant", "--optimizer.warmup_fraction=0"]
DPO_EPOCHS = (0.1, 0.25, 0.5)


@dataclass(frozen=True)
class Demo:
    """A finished demo, whose openings, preferences and reward model the study uses, and where the study keeps its own.

    `model` is the model that the demo began with; it is the reference of everything.
    """

    model: Path
    folder: Path
    kept: Path

    @property
    def seed(self) -> int:
        return int(json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))["seed"])

    @property
    def reward_model(self) -> Path:
        return self.folder / "reward" / "model"

    @property
    def heldout(self) -> Path:
        return self.folder / "data" / "heldout_openings.jsonl"


def joint_course(demo: Demo, method: str) -> list[dict[str, Any]]:
    """Held-out measurements of a joint run, from before its first step to after its last."""
    folder = demo.kept / method.lower()
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        tandem(
            "ppo",
            str(ROOT / "src" / "tandem" / "demo" / "ppo.toml"),
            f"--policy.model={demo.model}",
            f"--rewards.0.model={demo.reward_model}",
            f"--data.prompts={demo.folder / 'data' / 'openings.jsonl'}",
            f"--data.eval_prompts={demo.heldout}",
            "--adapters.upper_layers=15",
            f"--run.seed={demo.seed}",
            f"--run.directory={folder}",
            *JOINT,
            *JOINT_METHODS[method],
        )
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    between = [{name.removeprefix("heldout/"): value for name, value in row.items()} for row in rows]
    measured = [row for row in between if "objective/score" in row and "heldout/objective/score" not in row]
    return [summary["heldout"]["before"], *measured[:-1], summary["heldout"]["after"]]


def dpo_course(demo: Demo) -> list[dict[str, Any]]:
    """Evaluations of the policy along one DPO run, which is ended and gone on with."""
    folder = demo.kept / "dpo"
    for number, epochs in enumerate(DPO_EPOCHS):
        kept = demo.kept / f"dpo-{epochs:g}"
        if not (kept / "summary.json").exists():
            train_dpo(demo, folder, epochs, resume=number > 0)
            evaluate(demo, folder / "model", kept)
    return [
        json.loads((demo.kept / f"dpo-{epochs:g}" / "summary.json").read_text(encoding="utf-8"))
        for epochs in DPO_EPOCHS
    ]


def train_dpo(demo: Demo, folder: Path, epochs: float, *, resume: bool) -> None:
    if resume:
        tandem("dpo", "--resume", str(folder), f"--epochs={epochs:g}")
        return
    shutil.rmtree(folder, ignore_errors=True)
    tandem(
        "dpo",
        f"--model={demo.model}",
        f"--data.train={demo.folder / 'data' / 'pairs.jsonl'}",
        f"--data.eval={demo.folder / 'data' / 'heldout_pairs.jsonl'}",
        "--adapters.upper_layers=15",
        f"--epochs={epochs:g}",
        "--eval_every=1000000",
        f"--run.seed={demo.seed}",
        f"--run.directory={folder}",
        *DPO,
    )


def evaluate(demo: Demo, model: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    tandem(
        "eval",
        f"--model={model}",
        f"--baseline={demo.model}",
        f"--data.prompts={demo.heldout}",
        f"--rewards.0.model={demo.reward_model}",
        f"--rewards.1.function={GOLD}",
        f"--rollout.responses_per_prompt={RESPONSES}",
        "--rollout.max_new_tokens=24",
        "--rollout.sequences_per_batch=160",
        f"--run.seed={demo.seed}",
        f"--run.directory={folder}",
    )


def tandem(*words: str) -> None:
    """Run a command of Tandem's on one thread. Raises RuntimeError with what it said where it fails."""
    command: Sequence[str] = [sys.executable, "-m", "tandem", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout[-500:]}")
