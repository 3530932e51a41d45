"""The joint stage: a policy and a value model trained together under a reward, near a frozen reference."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tandem.config import PpoConfig
from tandem.data.prompts import prompt_batches
from tandem.errors import InputError, RunError
from tandem.rewards.shaping import shape_scores
from tandem.run import Progress, RunFolder
from tandem.run.clock import Clock
from tandem.run.folder import check_free
from tandem.run.interrupt import Interrupt
from tandem.run.machine import machine_record
from tandem.stages.joint import estimate_advantages, in_parts
from tandem.stages.joint_setup import JointStage, build
from tandem.stages.measure import measure, measure_critic
from tandem.stages.saved_rollouts import SavedRollout, as_scored, read_saved, records
from tandem.stages.state import JointState, start_state
from tandem.stages.update import Course
from tandem.types import Batch, Prompt, Rollout, Scores, Trajectories, pad_tokens


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
    state = start_state(config)
    check_start(stage, config)
    pretraining = pretrain_value(stage, config, state, saved, progress)
    heldout_before = evaluate_heldout(stage, config, folder, "before", state)
    prompts = prompt_batches(stage.prompts, config.rollout.prompts_per_step, config.run.seed)
    clock, metrics = Clock(), dict[str, float]()
    planned = state.course.warmup_total + config.steps
    with Interrupt() as interrupt, progress.stage("PPO", planned) as shown:
        while not state.finished and not interrupt.requested:
            step, course = state.step + 1, state.course
            with clock("rollout"):
                rollouts = stage.generator.generate(repeat(next(prompts), config.rollout.responses_per_prompt))
            with clock("score"):
                scores = stage.reward.score(rollouts)
                state = state.with_scores(scores.total)
            with clock("evaluate"):
                trajectories, batch = judge(stage, config, state, rollouts, scores)
                metrics = measure(trajectories, batch, scores, config.advantage, state.kl_section(config.kl))
                state = in_units_of_returns(stage, config, state, batch)
            with clock("update"):
                kl, epochs = state.kl_section(config.kl), state.value_epochs.epochs
                metrics |= stage.update(batch, kl, course, epochs)
                metrics |= {"value/epochs": epochs, "value/warming_up": float(course.warming_up)}
            metrics |= clock.read(tokens=sum(len(rollout.ids) for rollout in rollouts))
            state = state.after(metrics, len(rollouts))
            if step % config.save_rollouts_every == 0:
                kept = rollouts[: config.rollouts_to_save]
                folder.save_rollouts(f"step_{step:06d}", records(kept, trajectories, batch, scores, stage.tokenizer))
            if config.eval_every and step % config.eval_every == 0 and not state.finished:
                heldout = evaluate_heldout(stage, config, folder, f"{step:06d}", state)
                metrics |= {f"heldout/{name}": value for name, value in heldout.items()}
            folder.log(step, metrics)
            shown.advance(headline(metrics))
            if course.warming_up and not state.course.warming_up:
                progress.say(f"value warm-up ends after {step} steps; the policy learns from here on.")
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
        "reward_models": {
            name: model.card and model.card.heldout_accuracy for name, model in stage.reward_models.items()
        },
    }
    folder.write_summary(summary)
    folder.close()
    return summary


def judge(
    stage: JointStage, config: PpoConfig, state: JointState, rollouts: Sequence[Rollout], scores: Scores
) -> tuple[Trajectories, Batch]:
    """Rollouts as trajectories, with their scores shaped, and as a batch to learn from."""
    shaped = shape_scores(scores, rollouts, config.score, state.scores, config.rollout.max_new_tokens)
    trajectories = stage.evaluate(rollouts, shaped)
    kl = state.kl_section(config.kl)
    return trajectories, estimate_advantages(trajectories, config.advantage, kl, config.policy.importance_cap)


def in_units_of_returns(stage: JointStage, config: PpoConfig, state: JointState, batch: Batch) -> JointState:
    """Follow the scale of the returns (`value.normalize`); at the first step, check a histogram's range against them.

    Raises InputError where the range does not hold a tenth of them or more.
    """
    histogram = config.value.histogram
    if histogram is not None and state.step == 0:
        returns = batch.returns[batch.tokens.mask]
        outside = ((returns < histogram.low) | (returns > histogram.high)).float().mean().item()
        if outside >= 0.1:
            raise InputError(
                f"value.histogram goes from {histogram.low:g} to {histogram.high:g}, and {outside:.0%} of the first "
                f"step's returns lie outside (they go from {float(returns.min()):.3g} to {float(returns.max()):.3g}); "
                "widen it, and leave room for what the policy will earn later."
            )
    if config.value.normalize:
        state = state.with_returns(batch)
        stage.models.value.rescale(state.returns.mean, state.returns.std)
    return state


def pretrain_value(
    stage: JointStage, config: PpoConfig, state: JointState, saved: Sequence[SavedRollout], progress: Progress
) -> dict[str, float]:
    """Let the value model learn on rollouts that an earlier run saved; a tenth of them measures what it learnt.

    Returns the explained variance on that tenth before and after; nothing where there are no saved rollouts.
    """
    settings = config.value.pretraining
    if settings is None:
        return {}
    order = torch.randperm(len(saved), generator=torch.Generator().manual_seed(config.run.seed)).tolist()
    parts = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]
    heldout, training = ([saved[index] for index in part] for part in parts)
    kl = state.kl_section(config.kl)
    with progress.console.status(f"value model: learning from {len(training)} saved rollouts"):
        before = explained_of_saved(stage, config, state, heldout)
        _, batch = judge(stage, config, state, *as_scored(training))
        in_units_of_returns(stage, config, state, batch)
        rehearsal = Course(done=0, total=0, warmup_total=1, warming_up=True)
        stage.update(batch, kl, rehearsal, settings.epochs)
        after = explained_of_saved(stage, config, state, heldout)
    progress.say(f"value model: explained variance on {len(heldout)} saved rollouts {before:.3f} -> {after:.3f}.")
    return {"rollouts": len(training), "explained_variance/before": before, "explained_variance/after": after}


def explained_of_saved(stage: JointStage, config: PpoConfig, state: JointState, saved: Sequence[SavedRollout]) -> float:
    trajectories, _ = judge(stage, config, state, *as_scored(saved))
    return measure_critic(trajectories, config.advantage, state.kl_section(config.kl))["value/explained_variance"]


def repeat(prompts: Sequence[Prompt], times: int) -> list[Prompt]:
    """Each prompt several times over, side by side."""
    return [prompt for prompt in prompts for _ in range(times)]


def check_start(stage: JointStage, config: PpoConfig) -> None:
    """The generator's log-probabilities must be those that train, and the reward must answer as it should.

    Raises RunError where they differ by more than 1e-4 nats a token in float32, or 0.1 on average in bfloat16.
    """
    prompts = sorted(stage.prompts, key=lambda prompt: len(prompt.ids))
    chosen = [prompts[0], prompts[len(prompts) // 2], prompts[-1]]
    rollouts = stage.fresh_generator(config).generate(chosen)
    stage.reward.score(rollouts)
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
    rollouts = stage.fresh_generator(config).generate(repeat(stage.heldout, config.eval_responses_per_prompt))
    scores = stage.reward.score(rollouts)
    trajectories, batch = judge(stage, config, state, rollouts, scores)
    folder.save_rollouts(f"heldout_{name}", records(rollouts, trajectories, batch, scores, stage.tokenizer))
    return measure(trajectories, batch, scores, config.advantage, state.kl_section(config.kl))


def headline(metrics: dict[str, float]) -> dict[str, float]:
    """The few numbers that matter."""
    return {
        "score": metrics["objective/score"],
        "KL": metrics["objective/kl"],
        "explained variance": metrics["value/explained_variance"],
        "length": metrics["rollout/length"],
    }
