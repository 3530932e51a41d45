"""Evaluation: whether a model is better than another, on prompts that it was not trained on."""

from __future__ import annotations

import math
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tandem import algo
from tandem.config import EvalConfig, term_names
from tandem.errors import Interrupted
from tandem.models.sharing import Placement
from tandem.models.source import check_labels
from tandem.rewards.composition import Term, WeightedSum
from tandem.rewards.function import RewardFunction, load_function
from tandem.rewards.judge import Judge
from tandem.run import Progress
from tandem.run.disk import finite_or_none
from tandem.run.eval_folder import EvalFolder, check_unused
from tandem.run.lock import claimed
from tandem.run.machine import machine_record
from tandem.run.signals import Terminated, ended_by_sigterm
from tandem.stages.benchmarks import check_benchmarks, run_benchmarks
from tandem.stages.eval_answers import Answers, Speakers, answer, find_speakers
from tandem.stages.eval_judging import Judged, comparison, judge_all, pair_records
from tandem.stages.joint_setup import scored_by
from tandem.stages.scoring import try_rewards
from tandem.types import Rollout
from tandem.view.evaluation import notes, page, tables

REPEATED_TOKENS = 4


def run_eval(config: EvalConfig, progress: Progress) -> dict[str, Any]:
    """Sample, judge, compare, write, by the recipe; returns the summary.

    Raises InputError for what cannot be used, RunError where a judge or the disk fails, Interrupted for Ctrl-C and
    SIGTERM, which leave at most the recipe.
    """
    started, path = time.monotonic(), Path(config.run.directory)
    with claimed(path), _given_up():
        check_unused(path)
        check_benchmarks(config)
        functions = {source.function: load_function(source.function) for source in config.rewards if source.function}
        judge = None if config.judge is None else Judge(config.judge)
        placement = Placement.of(config.compute, progress.say)
        _check_reward_models(config, placement)
        speakers = find_speakers(config, placement, progress)
        folder = EvalFolder(path, config)
        _try_out(config, speakers, functions, judge)

        torch.manual_seed(config.run.seed)
        benchmarks = run_benchmarks(config, placement, progress)
        answers = answer(config, speakers, placement, progress)
        judged = judge_all(config, answers, speakers, functions, judge, placement, progress)
        found = {
            "stage": "eval",
            "interrupted": False,
            "seed": config.run.seed,
            "seconds": time.monotonic() - started,
            **machine_record(placement.device),
            **_compared(config, speakers, answers, judged),
            "benchmarks": benchmarks,
        }
        summary: dict[str, Any] = finite_or_none(found)
        summary["notes"] = notes(summary)
        folder.write(summary, page(summary), pair_records(judged, config.rollout.responses_per_prompt))
    for table in tables(summary):
        progress.console.print(table)
    for note in summary["notes"]:
        progress.say(f"- {note}")
    return summary


@contextmanager
def _given_up() -> Iterator[None]:
    """Whatever stops the evaluation in it, the person is told what is left of it."""
    try:
        with ended_by_sigterm():
            yield
    except (Terminated, KeyboardInterrupt):
        raise Interrupted("stopped before the evaluation was done, so it has no result; run it again.") from None


def _check_reward_models(config: EvalConfig, placement: Placement) -> None:
    """Raises InputError for what can be told of the judging models before any weight is read."""
    for index, source in enumerate(config.rewards):
        if source.model is not None:
            check_labels(source.model, f"rewards.{index}.model", placement.trust_remote_code)
            placement.tokenizer(source.model, f"rewards.{index}.model")


def _try_out(
    config: EvalConfig, speakers: Speakers, functions: Mapping[str, RewardFunction], judge: Judge | None
) -> None:
    """Let every judge that is no model of ours answer once, before anything is sampled. Raises InputError where one
    does not."""
    tried = [Rollout(prompt, (0,), (0.0,), " A first try.", True) for prompt in speakers.model.prompts[:3]]
    terms = {
        name: Term(scored_by(source, None, functions, speakers.model.tokenizer), 1.0)
        for name, source in zip(term_names(config.rewards), config.rewards, strict=True)
        if source.model is None
    }
    try_rewards(WeightedSum(terms), tried)
    if judge is not None:
        judge.try_out()


def _compared(config: EvalConfig, speakers: Speakers, answers: Answers, judged: Judged) -> dict[str, Any]:
    """The numbers of the evaluation: who won, how each side writes, how far the model is from the reference."""
    responses = config.rollout.responses_per_prompt
    return {
        "model": config.model,
        "baseline": config.baseline,
        "reference": speakers.reference.source,
        "prompts_file": config.data.prompts,
        "prompts": len(speakers.model.prompts),
        "dropped_prompts": speakers.dropped_prompts,
        "trained_on": _trained_on(config),
        "responses_per_prompt": responses,
        "max_new_tokens": config.rollout.max_new_tokens,
        "temperature": config.rollout.temperature,
        "best_of_n": config.best_of_n,
        "comparisons": [comparison(verdicts, judged, responses) for verdicts in judged.verdicts],
        "writing": {
            side: writing(rollouts, speakers.model.tokenizer, responses) for side, rollouts in judged.sides.items()
        },
        "kl": _kl(speakers, answers.log_ratios, answers.tokens, config.best_of_n),
        "samples": _samples(judged, responses),
    }


def writing(
    rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase, responses_per_prompt: int
) -> dict[str, float]:
    """How a side writes, whatever anybody thinks of it. Every side's text is read by one tokenizer, so that two models
    with different ones can be compared."""
    texts = [tokenizer(rollout.text, add_special_tokens=False, verbose=False).input_ids for rollout in rollouts]
    groups = [texts[start : start + responses_per_prompt] for start in range(0, len(texts), responses_per_prompt)]
    apart = [algo.distance_between(group, 2) for group in groups]
    known = [one for one in apart if not math.isnan(one)]
    lengths = torch.tensor([len(text) for text in texts])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text, dtype=torch.int64) for text in texts], batch_first=True)
    mask = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
    repeated, runs = algo.repeated_ngrams(ids, mask, REPEATED_TOKENS)
    return {
        "tokens": float(lengths.float().mean()),
        "characters": sum(len(rollout.text) for rollout in rollouts) / len(rollouts),
        "eos_rate": sum(rollout.ended for rollout in rollouts) / len(rollouts),
        "repetition": repeated / runs if runs else 0.0,
        "distinct_1": algo.distinct_ngrams(texts, 1),
        "distinct_2": algo.distinct_ngrams(texts, 2),
        "distance_within_prompt": sum(known) / len(known) if known else math.nan,
    }


def _kl(speakers: Speakers, log_ratios: Tensor | None, tokens: Tensor, best_of_n: int | None) -> dict[str, Any]:
    """k1 over the model's own responses, a sequence and a token, and what bounds it for the best of n."""
    bound = None if best_of_n is None else algo.best_of_n_kl_bound(best_of_n)
    if log_ratios is None:
        return {"unmeasured": speakers.no_kl, "best_of_n_bound": bound}
    found = algo.clustered_mean(log_ratios)
    return {
        "nats_a_sequence": found.mean,
        "standard_error": found.standard_error,
        "nats_a_token": float(log_ratios.sum() / tokens.sum()),
        "best_of_n_bound": bound,
    }


def _samples(judged: Judged, responses: int, count: int = 4) -> list[dict[str, Any]]:
    """What every side answered first to the first prompts; none of them is picked."""
    ours = judged.sides["model"]
    rows = range(0, min(len(ours), count * responses), responses)
    return [
        {
            "prompt": ours[row].prompt.text if ours[row].prompt.messages is None else ours[row].prompt.row["prompt"],
            "responses": {side: rollouts[row].text for side, rollouts in judged.sides.items()},
        }
        for row in rows
    ]


def _trained_on(config: EvalConfig) -> bool:
    """Whether the run that made the model trained on the very file of these prompts, where its recipe is at hand."""
    try:
        recipe = tomllib.loads((Path(config.model).parent / "config.toml").read_text(encoding="utf-8"))
        trained = [recipe["data"].get(name) for name in ("prompts", "train")]
        return any(Path(name).resolve() == Path(config.data.prompts).resolve() for name in trained if name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
