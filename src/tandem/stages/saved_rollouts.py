"""Rollouts on disk: how they are written, one JSON object each, and how a value model learns from them again."""

from __future__ import annotations

import json
import operator
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tandem.config import PpoConfig
from tandem.errors import InputError, reason_of
from tandem.models.loading import context_length
from tandem.models.trunk import Trunk
from tandem.stages.step import Judged
from tandem.types import Prompt, Rollout, Scores


@dataclass(frozen=True)
class SavedRollout:
    """A rollout and what it earned, as an earlier run found it: at its last token, and at each of its tokens."""

    rollout: Rollout
    score: float
    process: tuple[float, ...] | None


def records(
    rollouts: Sequence[Rollout], judged: Judged, scores: Scores, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The first samples of a step as they are saved: text, scores and every per-token number."""
    trajectories, batch = judged.trajectories, judged.batch
    per_token = {
        "behaviour_logprobs": trajectories.behaviour_logprobs,
        "logprobs": trajectories.logprobs,
        "reference_logprobs": trajectories.reference_logprobs,
        "values": trajectories.values,
        "rewards": batch.rewards,
        "advantages": batch.advantages,
        "returns": batch.returns,
    }
    if scores.process is not None:
        per_token["process_rewards"] = scores.process

    def numbers(row: int, length: int) -> Iterator[tuple[str, list[float]]]:
        for name, tensor in per_token.items():
            yield name, [round(value, 6) for value in tensor[row, :length].tolist()]

    return [
        {
            "prompt": rollout.prompt.text,
            "prompt_ids": list(rollout.prompt.ids),
            "response": rollout.text,
            "ended": rollout.ended,
            "score": float(scores.total[row]),
            "scores": {name: float(part[row]) for name, part in scores.parts.items()},
            "tokens": [tokenizer.decode([token]) for token in rollout.ids],
            "ids": list(rollout.ids),
            **dict(numbers(row, len(rollout.ids))),
            "final_value": round(float(trajectories.final_values[row]), 6),
        }
        for row, rollout in enumerate(rollouts)
    ]


def unjudged(rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    """Samples of a step that came no further than being sampled."""
    return [
        {
            "prompt": rollout.prompt.text,
            "response": rollout.text,
            "ended": rollout.ended,
            "ids": list(rollout.ids),
            "behaviour_logprobs": list(rollout.logprobs),
        }
        for rollout in rollouts
    ]


def read_saved(config: PpoConfig) -> list[SavedRollout]:
    """The rollouts that `value.pretraining` names, held-out ones left out; none where it is unset.

    Raises InputError where they come from fewer than ten prompts, or a line is not what `records` writes.
    """
    settings = config.value.pretraining
    if settings is None:
        return []
    path = Path(settings.rollouts)
    files = sorted(path.glob("step_*.jsonl")) if path.is_dir() else [path]
    found: list[SavedRollout] = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"value.pretraining.rollouts: {file} cannot be read ({reason_of(error)}); give the rollouts "
                "folder of a joint run."
            ) from None
        found += [_parse(line, f"{file}:{number}") for number, line in enumerate(lines, start=1)]
    prompts = len({one.rollout.prompt.ids for one in found})
    if prompts < 10:
        raise InputError(
            f"value.pretraining.rollouts = {settings.rollouts!r} holds {len(found)} training rollouts of {prompts} "
            "prompts; at least 10 prompts are needed (a run saves more rollouts with rollouts_to_save)."
        )
    return found


def check_saved(saved: Sequence[SavedRollout], trunk: Trunk, config: PpoConfig) -> None:
    """Raises InputError where saved rollouts cannot be this policy's: unknown tokens, or too many of them."""
    vocabulary, limit = trunk.model.config.get_text_config().vocab_size, context_length(trunk.model)
    for one in saved:
        ids = [*one.rollout.prompt.ids, *one.rollout.ids]
        if not one.rollout.prompt.ids or not one.rollout.ids or min(ids) < 0 or max(ids) >= vocabulary:
            raise InputError(
                f"value.pretraining.rollouts: a rollout of {one.rollout.prompt.text[:60]!r} holds tokens that "
                f"policy.model does not know (it has {vocabulary}); was it saved by a run of another model?"
            )
        if limit is not None and len(ids) > limit:
            raise InputError(
                f"value.pretraining.rollouts: a rollout of {one.rollout.prompt.text[:60]!r} has {len(ids)} tokens, "
                f"and {config.policy.model!r} reads {limit}."
            )


def split_by_prompt(saved: Sequence[SavedRollout], seed: int) -> tuple[list[SavedRollout], list[SavedRollout]]:
    """Rollouts to learn from, and those of a tenth of the prompts to measure what was learnt."""
    prompts = sorted({one.rollout.prompt.ids for one in saved})
    random.Random(seed).shuffle(prompts)
    heldout = set(prompts[: max(2, len(prompts) // 10)])
    by_side = {side: [one for one in saved if (one.rollout.prompt.ids in heldout) == side] for side in (False, True)}
    return by_side[False], by_side[True]


def _parse(line: str, where: str) -> SavedRollout:
    try:
        row = json.loads(line)
        prompt = Prompt(_whole_numbers(row["prompt_ids"]), str(row["prompt"]), messages=None, row={})
        ids, logprobs = _whole_numbers(row["ids"]), tuple(map(float, row["behaviour_logprobs"]))
        process = tuple(map(float, row["process_rewards"])) if "process_rewards" in row else None
        if any(len(part) != len(ids) for part in (logprobs, process) if part is not None):
            raise ValueError(f"{len(ids)} ids, and not as many behaviour_logprobs or process_rewards")
        rollout = Rollout(prompt, ids, logprobs, str(row["response"]), bool(row["ended"]))
        return SavedRollout(rollout, float(row["score"]), process)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{where}: is no rollout that a run of this version saved ({reason_of(error)}); "
            "give the rollouts folder of a joint run."
        ) from None


def _whole_numbers(found: Any) -> tuple[int, ...]:
    return tuple(map(operator.index, found))


def as_scored(saved: Sequence[SavedRollout]) -> tuple[list[Rollout], Scores]:
    """Saved rollouts with what they earned."""
    process = None
    if any(one.process is not None for one in saved):
        rows = [torch.tensor(one.process or (0.0,) * len(one.rollout.ids)) for one in saved]
        process = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return [one.rollout for one in saved], Scores(torch.tensor([one.score for one in saved]), {}, process)
