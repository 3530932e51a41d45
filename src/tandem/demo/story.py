"""The demo from beginning to end: preferences, reward model, joint training, and what came of it."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from tandem.config import PpoConfig, RewardConfig
from tandem.data.prompts import make_prompt
from tandem.data.rows import Row
from tandem.demo.base_model import smollm2
from tandem.demo.gold import gold
from tandem.demo.report import print_report, save_plot, summarise
from tandem.errors import InputError
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.loading import load_causal, load_tokenizer, pick_device, pick_dtype
from tandem.models.source import layer_count
from tandem.models.trunk import Trunk
from tandem.recipe import load_config
from tandem.rollout import TorchGenerator
from tandem.run import Progress
from tandem.run.disk import write_json
from tandem.stages.ppo import run_ppo
from tandem.stages.reward import run_reward
from tandem.text import decoder
from tandem.types import Rollout


@dataclass(frozen=True)
class Scale:
    """How much of everything; `joint_settings` override the joint stage's recipe."""

    train_openings: int
    heldout_openings: int
    samples_per_opening: int
    joint_settings: Mapping[str, Any]


FULL = Scale(train_openings=200, heldout_openings=40, samples_per_opening=5, joint_settings={})
QUICK = Scale(
    train_openings=8,
    heldout_openings=4,
    samples_per_opening=4,
    joint_settings={"steps": 2, "rollout.prompts_per_step": 8, "eval_responses_per_prompt": 1},
)
RESPONSE_TOKENS = 24
CLEAR = 0.3


def run_demo(model: str | None, run_dir: Path, seed: int, quick: bool, progress: Progress) -> dict[str, Any]:
    """Run all of it and return the summary. An earlier run in the folder is kept under another name.

    Raises InputError for a model that cannot be used or a folder that cannot be written.
    """
    gold([""], [""], [{}])
    source = model or str(smollm2(progress))
    load_tokenizer(source, "--model")
    layer_count(source, "--model")
    make_room(run_dir, progress)
    started = time.monotonic()
    scale = QUICK if quick else FULL
    training, heldout = split_openings(scale, seed)
    write_rows(run_dir / "data" / "openings.jsonl", [{"prompt": text} for text in training])
    write_rows(run_dir / "data" / "heldout_openings.jsonl", [{"prompt": text} for text in heldout])
    rollouts = sample_openings(source, training + heldout, scale, seed, progress)
    mark = len(training) * scale.samples_per_opening
    pairs, heldout_pairs = preferences(rollouts[:mark]), preferences(rollouts[mark:])
    if not pairs or not heldout_pairs:
        raise InputError(
            f"what {source} wrote is nowhere clearly positive or negative, so there is nothing to prefer; the demo "
            f"needs a model that writes English. Its first words: {rollouts[0].text[:60]!r}."
        )
    write_rows(run_dir / "data" / "pairs.jsonl", pairs)
    write_rows(run_dir / "data" / "heldout_pairs.jsonl", heldout_pairs)
    upper_half = -(-layer_count(source, "--model") // 2)
    reward_settings = {
        "model": source,
        "adapters.upper_layers": upper_half,
        "data.train": f"{run_dir}/data/pairs.jsonl",
        "data.eval": f"{run_dir}/data/heldout_pairs.jsonl",
        "run.directory": f"{run_dir}/reward",
        "run.seed": seed,
    }
    joint_settings = {
        "policy.model": source,
        "rewards.0.model": f"{run_dir}/reward/model",
        "data.prompts": f"{run_dir}/data/openings.jsonl",
        "data.eval_prompts": f"{run_dir}/data/heldout_openings.jsonl",
        "adapters.upper_layers": upper_half,
        "run.directory": f"{run_dir}/ppo",
        "run.seed": seed,
        **scale.joint_settings,
    }
    reward = run_reward(load_config(RewardConfig, recipe("reward.toml"), as_words(reward_settings)), progress)
    if reward["interrupted"]:
        return {"interrupted": True}
    joint = run_ppo(load_config(PpoConfig, recipe("ppo.toml"), as_words(joint_settings)), progress)
    summary = summarise(run_dir, source, seed, time.monotonic() - started, reward, joint)
    write_json(summary, run_dir / "summary.json")
    save_plot(run_dir)
    print_report(summary, run_dir, progress)
    return summary


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the command line gives them."""
    return [f"--{name}={value}" for name, value in settings.items()]


def recipe(name: str) -> Path:
    return Path(str(resources.files("tandem.demo") / name))


def make_room(run_dir: Path, progress: Progress) -> None:
    """Move what an earlier demo left in the folder to a name of its own."""
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        if not (run_dir / "data" / "openings.jsonl").exists():
            raise InputError(f"--run-dir {run_dir} holds something that is no earlier demo; choose another folder.")
        number = next(n for n in itertools.count(1) if not run_dir.with_name(f"{run_dir.name}.{n}").exists())
        kept = run_dir.with_name(f"{run_dir.name}.{number}")
        run_dir.rename(kept)
        progress.say(f"the earlier run is kept as {kept}")
    try:
        (run_dir / "data").mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--run-dir {run_dir} cannot be written: {error.strerror}.") from error


def split_openings(scale: Scale, seed: int) -> tuple[list[str], list[str]]:
    """Openings to train on, and others that no training step sees."""
    lines = recipe("openings.txt").read_text(encoding="utf-8").splitlines()
    random.Random(seed).shuffle(lines)
    training = lines[: scale.train_openings]
    return training, lines[len(training) : len(training) + scale.heldout_openings]


def sample_openings(source: str, openings: Sequence[str], scale: Scale, seed: int, progress: Progress) -> list[Rollout]:
    """Several continuations of each opening by the model as it is, side by side."""
    device = pick_device("auto")
    tokenizer = load_tokenizer(source, "--model")
    with progress.console.status("loading the model"):
        model = load_causal(source, "--model", pick_dtype("auto", device), device)
    policy = CausalPolicy(Trunk(model), FULL_DISTRIBUTION)
    generator = TorchGenerator(
        policy,
        decoder(tokenizer),
        policy.stop_ids(tokenizer),
        max_new_tokens=RESPONSE_TOKENS,
        sequences_per_batch=192,
        random=torch.Generator(device=device).manual_seed(seed),
    )
    prompts = [
        make_prompt(text, tokenizer, Row({"prompt": text}, f"opening {n}"))
        for n, text in enumerate(openings, start=1)
        for _ in range(scale.samples_per_opening)
    ]
    rollouts: list[Rollout] = []
    with progress.stage("sampling", len(prompts)) as shown:
        for start in range(0, len(prompts), 192):
            rollouts += generator.generate(prompts[start : start + 192])
            shown.advance(steps=len(prompts[start : start + 192]))
    return rollouts


def preferences(rollouts: Sequence[Rollout]) -> list[dict[str, str]]:
    """Every pair of continuations of an opening whose gold scores are clearly apart, the better one chosen."""
    texts = [rollout.text for rollout in rollouts]
    openings = [rollout.prompt.text for rollout in rollouts]
    scores = gold(openings, texts, [])
    pairs = []
    for opening, group in itertools.groupby(range(len(rollouts)), key=openings.__getitem__):
        for one, other in itertools.combinations(group, 2):
            if abs(scores[one] - scores[other]) >= CLEAR and texts[one].strip() and texts[other].strip():
                better, worse = (one, other) if scores[one] > scores[other] else (other, one)
                pairs.append({"prompt": opening, "chosen": texts[better], "rejected": texts[worse]})
    return pairs


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
