"""The best of n answers of the reference, chosen by the reward model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from study.frontier import Point, expected_best
from study.training import Demo
from tandem.algo import best_of_n_kl_bound
from tandem.config import ComputeSection
from tandem.demo.gold import gold
from tandem.demo.story import FULL, sample_openings
from tandem.models.sharing import Placement, load_reward
from tandem.rewards.model import ModelReward
from tandem.run import Progress

CANDIDATES = 64
SIZES = (1, 2, 4, 8, 16, 32, 64)


def candidates(demo: Demo, progress: Progress) -> dict[str, Any]:
    """Scores of the reference's answers to the held-out openings, [P, N] each, from the reward model and from gold."""
    path = demo.kept / "candidates.json"
    if not path.exists():
        openings = [json.loads(line)["prompt"] for line in demo.heldout.read_text(encoding="utf-8").splitlines()]
        scale = replace(FULL, samples_per_opening=CANDIDATES)
        rollouts = sample_openings(str(demo.model), openings, scale, demo.seed + 1000, progress)
        model = load_reward(str(demo.reward_model), "the reward model", Placement.of(ComputeSection(), progress.say))
        reward = ModelReward(model.scorer, model.tokenizer, str(demo.reward_model), model.context, "fail")
        scores = {
            "reward": reward(rollouts).whole.reshape(-1, CANDIDATES).tolist(),
            "gold": torch.tensor(gold([], [rollout.text for rollout in rollouts], [])).reshape(-1, CANDIDATES).tolist(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(scores), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def course_of(scores: Mapping[str, Sequence[Sequence[float]]], chosen_by: str) -> list[Point]:
    """One point for each n; "reward" chooses, or "gold" itself: what no reward model can beat."""
    of = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in scores.items()}
    choice = of[chosen_by]
    return [
        Point(best_of_n_kl_bound(n), expected_best(choice, of["gold"], n), expected_best(choice, of["reward"], n))
        for n in SIZES
    ]
