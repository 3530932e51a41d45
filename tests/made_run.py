"""Runs of the joint stage made by hand, in the format in which real ones are saved, for the viewer's tests."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WORDS = (" the", " sea", " was", " quiet", " and", " a", " film", " slow", " good", ".")
CONFIG = """\
steps = 4
rewards = [{ function = "a.py:one", weight = 1.0 }, { function = "b.py:gold", weight = 0.0 }]

[policy]
model = "a-model"

[advantage]
gamma = 1.0
"""


def sample(rng: random.Random, prompt: str, tokens: Sequence[str] | None = None, **replaced: Any) -> dict[str, Any]:
    """One saved sample whose numbers agree with each other: the TD(1) advantage of its rewards and values."""
    tokens = list(tokens or [rng.choice(WORDS) for _ in range(rng.randint(4, 12))])
    count, score = len(tokens), rng.gauss(0, 2)
    logprobs = [-rng.random() * 5 for _ in tokens]
    reference = [one + rng.gauss(0, 0.3) for one in logprobs]
    rewards = [-0.05 * (one - other) for one, other in zip(logprobs, reference, strict=True)]
    rewards[-1] += score
    values = [rng.gauss(0, 1) for _ in tokens]
    outcomes = list(itertools.accumulate(reversed(rewards)))[::-1]
    return {
        "prompt": prompt,
        "prompt_ids": [1],
        "response": "".join(tokens),
        "ended": rng.random() < 0.5,
        "score": score,
        "scores": {"one": score, "gold": score / 4},
        "tokens": tokens,
        "ids": list(range(count)),
        "behaviour_logprobs": logprobs,
        "logprobs": logprobs,
        "reference_logprobs": reference,
        "values": values,
        "rewards": rewards,
        "advantages": [earned - value for earned, value in zip(outcomes, values, strict=True)],
        "returns": outcomes,
        "final_value": 0.5,
        **replaced,
    }


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metrics_row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "objective/score": step / 10,
        "objective/score/one": step / 10,
        "objective/score/gold": step / 40,
        "objective/kl": step / 5,
        "value/explained_variance": None if step == 2 else 0.1 * step,
        **{f"value/explained_variance_by_position/{n}": 0.1 * n for n in range(1, 5)},
        **{f"calibration/predicted_{n:02d}": n - 5.0 for n in range(1, 11)},
        **{f"calibration/earned_{n:02d}": n - 4.5 for n in range(1, 11)},
        "time/rollout": 1.0,
        "time/update": 3.0,
        "time/step": 4.0,
    }


def make_run(path: Path, samples: int = 8, seed: int = 0) -> Path:
    """Four steps, held-out prompts before and after, and a summary."""
    rng = random.Random(seed)
    heldout = [f"the film {n} was" for n in range(3) for _ in range(2)]
    path.mkdir(parents=True)
    (path / "config.toml").write_text(CONFIG)
    write_lines(path / "metrics.jsonl", [metrics_row(step) for step in range(1, 5)])
    for when in ("before", "after"):
        write_lines(path / "rollouts" / f"heldout_{when}.jsonl", [sample(rng, prompt) for prompt in heldout])
    for step in range(1, 5):
        rows = [sample(rng, f"opening {step} {n}") for n in range(samples)]
        write_lines(path / "rollouts" / f"step_{step:06d}.jsonl", rows)
    heldout_metrics = {"before": {"objective/score": 0.1}, "after": {"objective/score": 0.5}}
    summary = {"stage": "ppo", "interrupted": False, "steps": 4, "seconds": 20.0, "heldout": heldout_metrics}
    (path / "summary.json").write_text(json.dumps(summary))
    return path
