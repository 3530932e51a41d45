"""Who won: scores and judgements of responses side by side, by every judge that the recipe names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tandem import algo
from tandem.config import EvalConfig, RewardSource, term_names
from tandem.errors import RewardError
from tandem.models.sharing import Placement, load_reward
from tandem.rewards.composition import Earned
from tandem.rewards.faults import described, not_finite
from tandem.rewards.function import RewardFunction
from tandem.rewards.judge import Judge, Judgement
from tandem.run import Progress
from tandem.stages.eval_answers import Answers, Speakers, give_memory_back
from tandem.stages.joint_setup import scored_by
from tandem.types import Rollout

MODEL, BASELINE = "model", "baseline"


@dataclass(frozen=True)
class Verdicts:
    """What one judge said of the model's responses beside another side's, B pairs in the order of the prompts.

    outcomes [B]: 1 where the model's won, 1/2 for a tie, 0 where it lost, NaN where nobody judged. `scores` are those
    of the model's and the other's responses, [B] each, of a judge by score; `judgements` those of a chat endpoint.
    """

    judge: str
    against: str
    outcomes: Tensor
    scores: tuple[Tensor, Tensor] | None = None
    judgements: Sequence[Judgement | None] | None = None


@dataclass(frozen=True)
class Judged:
    """Every side's responses by its name, B each, and the verdicts on the model's beside each other side's."""

    sides: Mapping[str, Sequence[Rollout]]
    verdicts: Sequence[Verdicts]


def judge_all(
    config: EvalConfig,
    answers: Answers,
    speakers: Speakers,
    functions: Mapping[str, RewardFunction],
    judge: Judge | None,
    placement: Placement,
    progress: Progress,
) -> Judged:
    """Let every judge compare the model with the baseline and, where asked for, the best of n of the reference.

    Raises RewardError where a judge fails.
    """
    sides: dict[str, Sequence[Rollout]] = {MODEL: answers.model, BASELINE: answers.baseline}
    known, verdicts = torch.ones(len(answers.model), dtype=torch.bool), list[Verdicts]()
    for index, (source, name) in enumerate(zip(config.rewards, term_names(config.rewards), strict=True)):
        with progress.console.status(f"{name} judges"):
            score = _scorer(source, index, functions, speakers, placement)
            if index == 0 and config.best_of_n is not None:
                sides[best_of(config.best_of_n)], known = _best(score(answers.candidates), answers, config.best_of_n)
            verdicts += _by_score(name, score, sides)
            del score
            give_memory_back()
    if judge is not None:
        with progress.console.status(f"{judge.name} judges"):
            verdicts += _by_chat(judge, sides, term_names(config.rewards))
    return Judged(sides, [_where(known, one) if one.against != BASELINE else one for one in verdicts])


def best_of(n: int) -> str:
    """What the best of n responses of the reference are called."""
    return f"best_of_{n}"


def higher_wins(ours: Tensor, theirs: Tensor) -> Tensor:
    """Outcomes [B] by scores [B]: the higher one wins, equal ones tie, and NaN is no score."""
    outcomes = ((ours > theirs).float() + (ours >= theirs).float()) / 2
    return torch.where(ours.isnan() | theirs.isnan(), math.nan, outcomes)


def comparison(verdicts: Verdicts, judged: Judged, responses: int) -> dict[str, Any]:
    """What a judge's verdicts come to, with `responses` for each prompt."""
    ours, theirs = judged.sides[MODEL], judged.sides[verdicts.against]
    outcomes = verdicts.outcomes.reshape(-1, responses)
    longer_by = torch.tensor([float(len(a.text) - len(b.text)) for a, b in zip(ours, theirs, strict=True)])
    return {
        "against": verdicts.against,
        "judge": verdicts.judge,
        "by": "score" if verdicts.scores is not None else "chat",
        "wins": int((outcomes == 1).sum()),
        "ties": int((outcomes == 0.5).sum()),
        "losses": int((outcomes == 0).sum()),
        "unjudged": int(outcomes.isnan().sum()),
        "effective_comparisons": algo.effective_comparisons(outcomes),
        "win_rate": vars(algo.win_rate(outcomes)),
        "length_controlled": vars(algo.length_controlled_win_rate(outcomes, longer_by.reshape(-1, responses))),
        "score": None if verdicts.scores is None else _mean_scores(*verdicts.scores, responses),
        "position": None if verdicts.judgements is None else _position(verdicts.judgements),
    }


def pair_records(judged: Judged, responses: int) -> list[dict[str, Any]]:
    """Every comparison with what was compared and what each judge said."""
    records = []
    for side, theirs in judged.sides.items():
        of_side = [one for one in judged.verdicts if one.against == side]
        for row, (a, b) in enumerate(zip(judged.sides[MODEL], theirs, strict=True) if of_side else ()):
            records.append(
                {
                    "prompt_number": row // responses,
                    "response_number": row % responses,
                    "against": side,
                    "prompt": a.prompt.text if a.prompt.messages is None else list(a.prompt.messages),
                    "model_response": a.text,
                    "other_response": b.text,
                    "model_ended": a.ended,
                    "other_ended": b.ended,
                    "verdicts": {one.judge: _said(one, row) for one in of_side},
                }
            )
    return records


def _by_score(
    name: str, score: Callable[[Sequence[Rollout]], Tensor], sides: Mapping[str, Sequence[Rollout]]
) -> list[Verdicts]:
    """The verdicts of a judge by score on the model's responses beside each other side's."""
    scores = {side: score(rollouts) for side, rollouts in sides.items()}
    ours = scores.pop(MODEL)
    return [Verdicts(name, side, higher_wins(ours, theirs), scores=(ours, theirs)) for side, theirs in scores.items()]


def _by_chat(judge: Judge, sides: Mapping[str, Sequence[Rollout]], taken: Sequence[str]) -> list[Verdicts]:
    """The same of a chat endpoint, named by its model unless that name is taken."""
    name = f"{judge.model} (chat)" if judge.model in taken else judge.model
    verdicts = []
    for side, theirs in sides.items():
        if side != MODEL:
            found = judge.compare(sides[MODEL], theirs)
            outcomes = torch.tensor([math.nan if one is None else one.outcome for one in found])
            verdicts.append(Verdicts(name, side, outcomes, judgements=found))
    return verdicts


def _scorer(
    source: RewardSource,
    index: int,
    functions: Mapping[str, RewardFunction],
    speakers: Speakers,
    placement: Placement,
) -> Callable[[Sequence[Rollout]], Tensor]:
    """From responses to their scores [B], NaN for those that are skipped.

    Raises RewardError where one has a score that is not finite and is not to be skipped.
    """
    key = f"rewards.{index}.model"
    model = None if source.model is None else load_reward(source.model, key, placement)
    earns = scored_by(source, model, functions, speakers.model.tokenizer)

    def score(rollouts: Sequence[Rollout]) -> Tensor:
        earned: Earned = earns(rollouts)
        for row in earned.scored:
            number = float(earned.whole[row])
            if not math.isfinite(number):
                raise RewardError(f"{described(not_finite(number), f'rewards.{index}', rollouts[row])}.")
        if not earned.scored:
            raise RewardError(f"none of {len(rollouts)} responses has a score; the first: {earned.fault}.")
        return earned.whole

    return score


def _best(scores: Tensor, answers: Answers, n: int) -> tuple[list[Rollout], Tensor]:
    """Of each n candidates the one with the highest score, and where there is one [B]."""
    groups = scores.reshape(-1, n)
    best = groups.nan_to_num(nan=-math.inf).argmax(1)
    chosen = [answers.candidates[row * n + int(place)] for row, place in enumerate(best)]
    return chosen, ~groups.isnan().all(1)


def _where(known: Tensor, verdicts: Verdicts) -> Verdicts:
    """The verdicts, with none where the other side has no response."""
    outcomes = torch.where(known, verdicts.outcomes, math.nan)
    return Verdicts(verdicts.judge, verdicts.against, outcomes, verdicts.scores, verdicts.judgements)


def _mean_scores(ours: Tensor, theirs: Tensor, responses: int) -> dict[str, float]:
    """Mean scores of pairs that have both, and their difference with its standard error."""
    both = ~(ours.isnan() | theirs.isnan())
    difference = algo.clustered_mean((ours - theirs).reshape(-1, responses))
    return {
        "model": float(ours[both].double().mean()),
        "other": float(theirs[both].double().mean()),
        "difference": difference.mean,
        "standard_error": difference.standard_error,
    }


def _position(judgements: Sequence[Judgement | None]) -> dict[str, float]:
    """How much the order in which responses were shown decided."""
    found = [one for one in judgements if one is not None]
    return {
        "inconsistent": sum(not one.consistent for one in found) / len(found),
        "preference_for_first": sum(one.preference_for_first for one in found) / len(found),
    }


def _said(verdicts: Verdicts, row: int) -> dict[str, Any]:
    said: dict[str, Any] = {"outcome": float(verdicts.outcomes[row])}
    if verdicts.scores is not None:
        said |= {"model_score": float(verdicts.scores[0][row]), "other_score": float(verdicts.scores[1][row])}
    if verdicts.judgements is not None:
        judgement = verdicts.judgements[row]
        said |= {} if judgement is None else vars(judgement)
    return said
