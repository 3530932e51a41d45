"""The joint stage: a policy and a value model trained together under a reward, near a frozen reference."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tandem import algo
from tandem.config import PpoConfig
from tandem.data.prompts import prompt_batches
from tandem.errors import RunError
from tandem.run import Progress, RunFolder
from tandem.run.clock import Clock
from tandem.run.folder import check_free
from tandem.run.interrupt import Interrupt
from tandem.run.machine import machine_record
from tandem.stages.joint import estimate_advantages, in_parts, measure, update
from tandem.stages.joint_setup import JointStage, build
from tandem.types import Batch, Prompt, Rollout, Scores, Trajectories, pad_tokens


def run_ppo(config: PpoConfig, progress: Progress) -> dict[str, Any]:
    """Train by the recipe, save the models and return the run's summary.

    Raises InputError for what cannot be used, RunError where the run cannot go on.
    """
    started = time.monotonic()
    check_free(Path(config.run.directory))
    torch.manual_seed(config.run.seed)
    stage = build(config, progress)
    folder = RunFolder(Path(config.run.directory), config, config.run.trackers)
    check_start(stage, config)
    heldout_before = evaluate_heldout(stage, config, folder, "before", config.kl.coefficient)
    kl = algo.AdaptiveKl(config.kl.coefficient, config.kl.target, config.kl.horizon)
    prompts = prompt_batches(stage.prompts, config.rollout.prompts_per_step, config.run.seed)
    clock, steps_done = Clock(), 0
    with Interrupt() as interrupt, progress.stage("PPO", config.steps) as shown:
        for step in range(1, config.steps + 1):
            with clock("rollout"):
                rollouts = stage.generator.generate(repeat(next(prompts), config.rollout.responses_per_prompt))
            with clock("score"):
                scores = stage.reward.score(rollouts)
            with clock("evaluate"):
                trajectories = stage.evaluate(rollouts, scores)
                batch = estimate_advantages(trajectories, config.advantage, kl.coefficient)
                metrics = measure(trajectories, batch, scores, config.advantage, kl.coefficient)
            with clock("update"):
                metrics |= update(stage.policy, stage.value, batch, config.compute.tokens_per_microbatch, stage.random)
            metrics |= clock.read(tokens=sum(len(rollout.ids) for rollout in rollouts))
            kl = kl.after(metrics["objective/kl"], len(rollouts))
            if step % config.save_rollouts_every == 0:
                saved = rollouts[: config.rollouts_to_save]
                folder.save_rollouts(f"step_{step:06d}", records(saved, trajectories, batch, scores, stage))
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                heldout = evaluate_heldout(stage, config, folder, f"{step:06d}", kl.coefficient)
                metrics |= {f"heldout/{name}": value for name, value in heldout.items()}
            folder.log(step, metrics)
            shown.advance(headline(metrics))
            steps_done = step
            if interrupt.requested:
                progress.warn(f"interrupted; the models are saved as they are after step {step}.")
                break
    heldout_after = {} if interrupt.requested else evaluate_heldout(stage, config, folder, "after", kl.coefficient)
    with progress.console.status("saving the models"):
        stage.save(folder)
    summary = {
        "stage": "ppo",
        "interrupted": interrupt.requested,
        "seed": config.run.seed,
        "steps": steps_done,
        "seconds": time.monotonic() - started,
        **machine_record(stage.placement.device),
        "last_step": metrics,
        "heldout": {"before": heldout_before, "after": heldout_after},
        "reward_models": {
            name: model.card and model.card.heldout_accuracy for name, model in stage.reward_models.items()
        },
    }
    folder.write_summary(summary)
    folder.close()
    return summary


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
    stage: JointStage, config: PpoConfig, folder: RunFolder, name: str, kl_coefficient: float
) -> dict[str, float]:
    """Measure the models on held-out prompts, without a trace in what training will sample."""
    if not stage.heldout:
        return {}
    rollouts = stage.fresh_generator(config).generate(repeat(stage.heldout, config.eval_responses_per_prompt))
    scores = stage.reward.score(rollouts)
    trajectories = stage.evaluate(rollouts, scores)
    batch = estimate_advantages(trajectories, config.advantage, kl_coefficient)
    folder.save_rollouts(f"heldout_{name}", records(rollouts, trajectories, batch, scores, stage))
    return measure(trajectories, batch, scores, config.advantage, kl_coefficient)


def records(
    rollouts: Sequence[Rollout], trajectories: Trajectories, batch: Batch, scores: Scores, stage: JointStage
) -> list[dict[str, Any]]:
    """Samples as they are saved: text, scores and every per-token number."""
    per_token = {
        "behaviour_logprobs": trajectories.behaviour_logprobs,
        "logprobs": trajectories.logprobs,
        "reference_logprobs": trajectories.reference_logprobs,
        "values": trajectories.values,
        "rewards": batch.rewards,
        "advantages": batch.advantages,
        "returns": batch.returns,
    }

    def numbers(row: int, length: int) -> Iterator[tuple[str, list[float]]]:
        for name, tensor in per_token.items():
            yield name, [round(value, 6) for value in tensor[row, :length].tolist()]

    return [
        {
            "prompt": rollout.prompt.text,
            "response": rollout.text,
            "ended": rollout.ended,
            "score": float(scores.total[row]),
            "scores": {name: float(part[row]) for name, part in scores.parts.items()},
            "tokens": [stage.tokenizer.decode([token]) for token in rollout.ids],
            "ids": list(rollout.ids),
            **dict(numbers(row, len(rollout.ids))),
        }
        for row, rollout in enumerate(rollouts)
    ]


def headline(metrics: dict[str, float]) -> dict[str, float]:
    """The few numbers that matter."""
    return {
        "score": metrics["objective/score"],
        "KL": metrics["objective/kl"],
        "explained variance": metrics["value/explained_variance"],
        "length": metrics["rollout/length"],
    }
