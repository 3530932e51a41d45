"""Real runs on a tiny model, ended from outside and taken up again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.same import differences
from tiny import save_tiny

WORDS = ["good", "story", "film", "sea", "quiet", "slow"]
REWARD = '''"""Longer responses earn more."""


def reward(prompts, responses, rows):
    return [float(len(response)) + number % 3 for number, response in enumerate(responses)]
'''


@dataclass(frozen=True)
class Task:
    """A run to be ended: its stage, what tells it from others, and the words of its command."""

    stage: str
    name: str
    words: Sequence[str]


@dataclass(frozen=True)
class Ended:
    """One end from outside: after which step, whether a checkpoint was half written, the exit status, and the seconds
    from the signal to the end."""

    step: int
    in_save: bool
    status: int
    seconds: float


@dataclass(frozen=True)
class Story:
    """A run that was ended time and again and then finished: its ends, and how it differs from one in one piece."""

    task: str
    ends: list[Ended]
    differences: list[str]


def prepare(folder: Path) -> None:
    """The tiny model, data and reward function that all runs use."""
    save_tiny("llama", folder / "model")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    prompts = [{"prompt": f"{'the' if n % 2 else 'a'} {word} is"} for n, word in enumerate(WORDS)]
    examples = [{"prompt": f"the {word} {n}", "completion": " was quiet"} for n in range(10) for word in WORDS]
    pairs = [
        {"prompt": f"the {w}", "chosen": " was good", "rejected": f" was {n} bad"} for n in range(6) for w in WORDS
    ]
    for name, rows in {"prompts": prompts, "examples": examples, "pairs": pairs}.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def tasks(folder: Path) -> list[Task]:
    """A run of each stage and sharing mode, with a checkpoint after every step so that saves are often hit."""
    model = folder / "model"
    joint = [f"--policy.model={model}", f"--rewards.0.function={folder / 'reward.py'}:reward", "--value.start=policy"]
    joint += [f"--data.prompts={folder / 'prompts.jsonl'}", f"--data.eval_prompts={folder / 'prompts.jsonl'}"]
    joint += ["--steps=120", "--eval_every=5", "--rollout.prompts_per_step=4", "--rollout.max_new_tokens=5"]
    joint += ["--policy.lr=0.001", "--policy.schedule=cosine", "--kl.target=2.0", "--score.normalize=running"]
    often = ["--checkpoints.every_steps=1", "--run.trackers=[]"]
    sft = [f"--model={model}", f"--data.train={folder / 'examples.jsonl'}", "--sequences_per_minibatch=4", "--epochs=9"]
    reward = [f"--model={model}", f"--data.train={folder / 'pairs.jsonl'}", "--pairs_per_minibatch=4", "--epochs=13"]
    return [
        Task("ppo", "ppo, separate models", [*joint, *often, "--value.adaptive.max_epochs=4"]),
        Task("ppo", "ppo, adapters", [*joint, *often, "--sharing.mode=adapters", "--value.normalize=true"]),
        Task("ppo", "ppo, value head", [*joint, *often, "--sharing.mode=head", "--value.warmup.steps=20"]),
        Task("ppo", "ppo, bfloat16", [*joint, *often, "--compute.precision=bfloat16", "--policy.epochs=2"]),
        Task("sft", "sft", [*sft, *often, "--eval_every=7"]),
        Task("reward", "reward model", [*reward, *often, "--eval_every=7", "--adapters.rank=4"]),
        Task("pipeline", "pipeline", _pipeline_words(folder)),
    ]


def _pipeline_words(folder: Path) -> list[str]:
    """All stages, each long enough to be ended in."""
    data = {"sft.data.train": "examples", "reward.data.train": "pairs", "ppo.data.prompts": "prompts"}
    words = [f"--{key}={folder / name}.jsonl" for key, name in data.items()]
    words += [f"--model={folder / 'model'}", f"--ppo.data.eval_prompts={folder / 'prompts.jsonl'}"]
    words += [f"--{stage}.checkpoints.every_steps=1" for stage in ("sft", "reward", "ppo")]
    words += [
        "--sft.epochs=4",
        "--sft.sequences_per_minibatch=4",
        "--reward.epochs=6",
        "--reward.pairs_per_minibatch=4",
    ]
    words += ["--reward.optimizer.lr=0.003", "--ppo.steps=60", "--ppo.rollout.prompts_per_step=4"]
    return [*words, "--ppo.rollout.max_new_tokens=5", "--ppo.policy.lr=0.001", "--run.trackers=[]"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "tandem", *words]


def environment() -> Mapping[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def in_one_piece(task: Task, folder: Path) -> Path:
    """The run as it is when nobody ends it."""
    run = folder / f"{task.name.replace(' ', '_')}_whole"
    if not (run / "summary.json").exists():
        words = command(task.stage, *task.words, f"--run.directory={run}")
        subprocess.run(words, env=environment(), check=True, capture_output=True)
    return run


def told_by_signals(task: Task, folder: Path, number: int, times: int, seed: int) -> Story:
    """Start the run, end it by a signal at random moments, take it up again, and hold it against one in one piece."""
    moment = random.Random(seed)
    run = folder / f"{task.name.replace(' ', '_')}_{signal.Signals(number).name}_{seed}"
    words, ends = [task.stage, *task.words, f"--run.directory={run}"], []
    for _ in range(times):
        ends.append(_one_life(command(*words), run, number, moment))
        words = [task.stage, "--resume", str(run)]
    subprocess.run(command(*words), env=environment(), check=True, capture_output=True)
    return Story(task.name, ends, differences(run, in_one_piece(task, folder)))


def _one_life(words: Sequence[str], run: Path, number: int, moment: random.Random) -> Ended:
    """From a start to an end from outside, at a moment that may fall into loading, a step or a save."""
    before = _rows(run)
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and _rows(run) in (before, 0):
        time.sleep(0.005)
    time.sleep(moment.uniform(0.0, 0.8))
    process.send_signal(number)
    sent = time.monotonic()
    status = process.wait()
    seconds = time.monotonic() - sent
    return Ended(_rows(run), any(run.rglob("checkpoints/.partial_*")), status, seconds)


def _rows(run: Path) -> int:
    """Rows of metrics, those of a pipeline's stages too."""
    return sum(metrics.read_bytes().count(b"\n") for metrics in run.rglob("metrics.jsonl"))
