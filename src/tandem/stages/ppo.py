"""The joint stage: a policy and a value model trained together under a reward, near a frozen reference."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tandem.config import PpoConfig
from tandem.data.prompts import prompt_batches
from tandem.errors import InputError, RunError
from tandem.models.sharing import histogram_of
from tandem.run import Progress, RunFolder
from tandem.run.clock import Clock
from tandem.run.folder import check_free
from tandem.run.interrupt import Interrupt
from tandem.run.machine import machine_record
from tandem.stages.joint import in_parts
from tandem.stages.joint_setup import JointStage, build
from tandem.stages.saved_rollouts import SavedRollout, as_scored, check_saved, read_saved, records, split_by_prompt
from tandem.stages.scoring import skipped_metric, try_rewards, with_scores_only
from tandem.stages.state import JointState, start_state
from tandem.stages.step import judge, learn
from tandem.types import Batch, Prompt, pad_tokens


def run_ppo(config: PpoConfig, progress: Progress) -> dict[str, Any]:
    """Train by the recipe, save the models and return the run's summary.

    Raises InputError for what cannot be used, RunError where the run cannot go on.
    """
    started = time.monotonic()
    check_free(Path(config.run.directory))
    torch.manual_seed(config.run.seed)
    saved = read_saved(config)
    stage = build(config, progress)
    folder = RunFolder(Path(config.run.directory), config, config.run.trackers)
    check_start(stage, config)
    state = start_state(config)
    heldout_before = evaluate_heldout(stage, config, folder, "before", state)
    state, pretraining = pretrain_value(stage, config, state, saved, progress)
    prompts = prompt_batches(stage.prompts, config.rollout.prompts_per_step, config.run.seed)
    clock, metrics = Clock(), dict[str, float]()
    planned = config.steps + (config.value.warmup.steps if config.value.warmup else 0)
    with Interrupt() as interrupt, progress.stage("PPO", planned) as shown:
        while not state.finished and not interrupt.requested:
            step, resting = state.step + 1, state.course.warming_up
            with clock("rollout"):
                sampled = stage.generator.generate(repeat(next(prompts), config.rollout.responses_per_prompt))
            with clock("score"):
                all_scores = stage.reward.score(sampled)
                rollouts, scores, skipped = with_scores_only(sampled, all_scores)
            if skipped and not metrics.get("reward/skipped"):
                progress.warn(f"step {step}: {skipped} of {len(sampled)} samples have no score; {all_scores.fault}.")
            with clock("evaluate"):
                state = state.with_scores(scores)
                judged = judge(stage, config, state, rollouts, scores)
                if step == 1:
                    check_range(config, judged.batch)
            with clock("update"):
                state, metrics = learn(stage, config, state, judged)
            metrics |= skipped_metric(config.rewards, skipped)
            metrics |= clock.read(tokens=sum(len(rollout.ids) for rollout in sampled))
            if step % config.save_rollouts_every == 0:
                kept = rollouts[: config.rollouts_to_save]
                folder.save_rollouts(f"step_{step:06d}", records(kept, judged, scores, stage.tokenizer))
            if config.eval_every and step % config.eval_every == 0 and not state.finished:
                heldout = evaluate_heldout(stage, config, folder, f"{step:06d}", state)
                metrics |= {f"heldout/{name}": value for name, value in heldout.items()}
            folder.log(step, metrics)
            shown.advance(headline(metrics))
            if resting and not state.course.warming_up:
                say_end_of_warmup(config, step, metrics["value/explained_variance"], progress)
        if interrupt.requested:
            progress.warn(f"interrupted; the models are saved as they are after step {state.step}.")
    heldout_after = {} if interrupt.requested else evaluate_heldout(stage, config, folder, "after", state)
    with progress.console.status("saving the models"):
        stage.save(folder)
    summary = {
        "stage": "ppo",
        "interrupted": interrupt.requested,
        "seed": config.run.seed,
        "steps": state.step,
        "warmup_steps": state.course.warmup_done,
        "seconds": time.monotonic() - started,
        **machine_record(stage.placement.device),
        "last_step": metrics,
        "heldout": {"before": heldout_before, "after": heldout_after},
        "value_pretraining": pretraining,
        "state": state.as_record(),
        "reward_models": {
            name: model.card and model.card.heldout_accuracy for name, model in stage.reward_models.items()
        },
    }
    folder.write_summary(summary)
    folder.close()
    return summary


def check_range(config: PpoConfig, batch: Batch) -> None:
    """Raises InputError where a categorical value head cannot say a tenth of the first step's returns or more."""
    histogram, mask = histogram_of(config.value), batch.tokens.mask
    if histogram is None:
        return
    returns = batch.returns[mask]
    outside = float(histogram.outside(batch.returns, mask) / mask.sum())
    if outside >= 0.1:
        raise InputError(
            f"value.histogram goes from {histogram.low:g} to {histogram.high:g}, and {outside:.0%} of the first "
            f"step's returns lie outside (they go from {float(returns.min()):.3g} to {float(returns.max()):.3g}); "
            "widen it, and leave room for what the policy will earn later."
        )


def say_end_of_warmup(config: PpoConfig, steps: int, explained_variance: float, progress: Progress) -> None:
    """Why the policy learns from here on; a warning where a criterion was set and not met."""
    assert config.value.warmup is not None
    wanted = config.value.warmup.explained_variance
    said = f"value warm-up ends after {steps} steps, explained variance {explained_variance:.3f}"
    if wanted is None:
        progress.say(f"{said}.")
    elif explained_variance >= wanted:
        progress.say(f"{said} (wanted {wanted:g}).")
    else:
        progress.warn(
            f"{said}, which is less than the {wanted:g} wanted. The policy learns from here on all the same; more "
            "value.warmup.steps, another value.lr or value.epochs may help."
        )


def pretrain_value(
    stage: JointStage, config: PpoConfig, state: JointState, saved: Sequence[SavedRollout], progress: Progress
) -> tuple[JointState, dict[str, float]]:
    """Let the value model learn on rollouts that an earlier run saved; a tenth of their prompts measures the gain.

    Returns the state, with the moments of what those rollouts earned, and the explained variance on that tenth before
    and after.
    """
    settings = config.value.pretraining
    if settings is None:
        return state, {}
    check_saved(saved, stage.models.policy.trunk, config)
    training, heldout = split_by_prompt(saved, config.run.seed)
    size = config.rollout.prompts_per_step * config.rollout.responses_per_prompt
    state = state.with_scores(as_scored(saved)[1])
    before = explained_of_saved(stage, config, state, heldout)
    with progress.stage("value model, saved rollouts", settings.epochs) as shown:
        for _ in range(settings.epochs):
            for start in range(0, len(training), size):
                judged = judge(stage, config, state, *as_scored(training[start : start + size]))
                check_range(config, judged.batch)
                learnt, _ = learn(stage, config, state.rehearsing(), judged)
                state = replace(state, returns=learnt.returns)
            shown.advance({})
    after = explained_of_saved(stage, config, state, heldout)
    progress.say(f"value model: explained variance on {len(heldout)} saved rollouts {before:.3f} -> {after:.3f}.")
    return state, {
        "rollouts": len(training),
        "heldout_rollouts": len(heldout),
        "explained_variance/before": before,
        "explained_variance/after": after,
    }


def explained_of_saved(stage: JointStage, config: PpoConfig, state: JointState, saved: Sequence[SavedRollout]) -> float:
    return judge(stage, config, state, *as_scored(saved)).metrics["value/explained_variance"]


def repeat(prompts: Sequence[Prompt], times: int) -> list[Prompt]:
    """Each prompt several times over, side by side."""
    return [prompt for prompt in prompts for _ in range(times)]


def check_start(stage: JointStage, config: PpoConfig) -> None:
    """The generator's log-probabilities must be those that train, and the reward must answer as it should.

    Raises InputError where the reward does not, and RunError where log-probabilities differ by more than 1e-4 nats a
    token in float32, or 0.1 on average in bfloat16.
    """
    prompts = sorted(stage.prompts, key=lambda prompt: len(prompt.ids))
    chosen = [prompts[0], prompts[len(prompts) // 2], prompts[-1]]
    rollouts = stage.fresh_generator(config).generate(chosen)
    try_rewards(stage.reward, rollouts)
    tokens = pad_tokens([rollout.prompt.ids for rollout in rollouts], [rollout.ids for rollout in rollouts])
    with torch.no_grad():
        policy, budget = stage.models.policy, config.compute.tokens_per_microbatch
        trained = in_parts(policy.logprobs, policy.prepare(tokens, budget), budget)
    gaps = torch.cat(
        [
            (trained[row, : len(rollout.ids)].cpu() - torch.tensor(rollout.logprobs)).abs()
            for row, rollout in enumerate(rollouts)
        ]
    )
    exact = stage.placement.dtype == torch.float32
    gap, tolerance = (float(gaps.max()), 1e-4) if exact else (float(gaps.mean()), 0.1)
    if not gap <= tolerance:
        raise RunError(
            f"the generator's log-probabilities are {gap:.2g} nats a token from those of the training forward "
            f"(allowed {tolerance:g}); this model's decoding with a cache is not what its forward computes."
        )


def evaluate_heldout(
    stage: JointStage, config: PpoConfig, folder: RunFolder, name: str, state: JointState
) -> dict[str, float]:
    """Measure the models on held-out prompts, without a trace in what training will sample."""
    if not stage.heldout:
        return {}
    sampled = stage.fresh_generator(config).generate(repeat(stage.heldout, config.eval_responses_per_prompt))
    rollouts, scores, skipped = with_scores_only(sampled, stage.reward.score(sampled))
    judged = judge(stage, config, state, rollouts, scores)
    folder.save_rollouts(f"heldout_{name}", records(rollouts, judged, scores, stage.tokenizer))
    return judged.metrics | skipped_metric(config.rewards, skipped)


def headline(metrics: dict[str, float]) -> dict[str, float]:
    """The few numbers that matter."""
    return {
        "score": metrics["objective/score"],
        "KL": metrics["objective/kl"],
        "explained variance": metrics["value/explained_variance"],
        "length": metrics["rollout/length"],
    }
