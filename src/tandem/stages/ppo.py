"""The joint stage: a policy and a value model trained together under a reward, near a frozen reference."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tandem import algo
from tandem.config import PpoConfig
from tandem.data.prompts import PromptLimits, prompt_batches, read_prompts
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.errors import InputError, RunError
from tandem.models.causal import CausalPolicy
from tandem.models.loading import context_length, load_tokenizer, pick_device, pick_dtype
from tandem.models.saving import save_policy, save_scalar
from tandem.models.sharing import JointModels, Placement, RewardModel, build_joint
from tandem.rewards import Reward
from tandem.rewards.composition import Term, WeightedSum
from tandem.rewards.function import FunctionReward, load_function
from tandem.rewards.model import ModelReward
from tandem.rollout import Generator, TorchGenerator
from tandem.run import Progress, RunFolder
from tandem.run.clock import Clock
from tandem.run.folder import check_free
from tandem.run.interrupt import Interrupt
from tandem.run.machine import machine_record
from tandem.stages.joint import (
    PolicyLearner,
    ValueLearner,
    estimate_advantages,
    evaluate,
    in_parts,
    measure,
    update,
)
from tandem.text import decoder
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
    check_sampler(stage, config)
    heldout_before = evaluate_heldout(stage, config, folder, "before")
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
                metrics = measure(trajectories, batch, scores, kl.coefficient)
            with clock("update"):
                metrics |= update(stage.policy, stage.value, batch, config.compute.tokens_per_microbatch, stage.random)
            metrics |= clock.read(tokens=sum(len(rollout.ids) for rollout in rollouts))
            kl = kl.after(metrics["objective/kl"], len(rollouts))
            if step % config.save_rollouts_every == 0:
                chosen = slice(0, config.rollouts_to_save)
                folder.save_rollouts(f"step_{step:06d}", records(rollouts, trajectories, batch, scores, stage)[chosen])
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                heldout = evaluate_heldout(stage, config, folder, f"{step:06d}")
                metrics |= {f"heldout/{name}": value for name, value in heldout.items()}
            folder.log(step, metrics)
            shown.advance(headline(metrics))
            steps_done = step
            if interrupt.requested:
                progress.warn(f"interrupted; the models are saved as they are after step {step}.")
                break
    heldout_after = {} if interrupt.requested else evaluate_heldout(stage, config, folder, "after")
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


@dataclass(frozen=True)
class JointStage:
    """Everything that a joint run works with."""

    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    heldout: Sequence[Prompt]
    models: JointModels
    reward: Reward
    reward_models: dict[str, RewardModel]
    generator: Generator
    policy: PolicyLearner
    value: ValueLearner
    placement: Placement
    random: torch.Generator

    def evaluate(self, rollouts: Sequence[Rollout], scores: Scores) -> Trajectories:
        models, budget = self.models, self.placement.tokens_per_microbatch
        return evaluate(rollouts, scores, models.policy, models.reference, models.value, budget)

    def fresh_generator(self, config: PpoConfig) -> Generator:
        """One with a random state of its own, the same every time, that leaves training's alone."""
        random = torch.Generator(device=self.placement.device).manual_seed(config.run.seed + 1)
        return make_generator(self.models.policy, self.tokenizer, config, random)

    def save(self, folder: RunFolder) -> None:
        policy = self.models.policy
        save_policy(policy.trunk, policy.adapter, self.tokenizer, folder.model)
        save_scalar(self.models.value, self.tokenizer, folder.path / "value_model")


def build(config: PpoConfig, progress: Progress) -> JointStage:
    """Load data, models and reward. What can be refused early is looked at first."""
    functions = {source.function: load_function(source.function) for source in config.rewards if source.function}
    device = pick_device(config.compute.device)
    placement = Placement(device, pick_dtype(config.compute.precision, device), config.compute.tokens_per_microbatch)
    tokenizer = load_tokenizer(config.policy.model, "policy.model")
    limits = PromptLimits(config.data.max_prompt_tokens, config.data.too_long)
    prompts = read_all_prompts(config, tokenizer, limits, progress)
    with progress.console.status("loading the models"):
        models, reward_models = build_joint(config, tokenizer, placement)
    check_context(config, models, [*prompts[0], *prompts[1]])
    introduce(reward_models, progress)
    terms = {}
    for source in config.rewards:
        if source.model is not None:
            model = reward_models[source.model]
            terms["reward_model"] = Term(ModelReward(model.scorer, model.tokenizer, source.model), source.weight)
        else:
            assert source.function is not None
            name = source.function.rpartition(":")[2]
            terms[name] = Term(FunctionReward(functions[source.function], source.function), source.weight)
    random = torch.Generator(device=device).manual_seed(config.run.seed)
    policy, value = learners(config, models)
    return JointStage(
        tokenizer=tokenizer,
        prompts=prompts[0],
        heldout=prompts[1],
        models=models,
        reward=WeightedSum(terms, config.score),
        reward_models=reward_models,
        generator=make_generator(models.policy, tokenizer, config, random),
        policy=policy,
        value=value,
        placement=placement,
        random=torch.Generator().manual_seed(config.run.seed),
    )


def read_all_prompts(
    config: PpoConfig, tokenizer: PreTrainedTokenizerBase, limits: PromptLimits, progress: Progress
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on and held-out ones."""
    found: list[list[Prompt]] = []
    for source, key in (
        (config.data.prompts, "data.prompts"),
        (config.data.eval_prompts, "data.eval_prompts"),
    ):
        if source is None:
            found.append([])
            continue
        prompts, dropped = read_prompts(source, key, config.data.split, config.data.columns, tokenizer, limits)
        if dropped:
            progress.say(
                f"{key}: {dropped} prompts were dropped for being longer than {limits.max_prompt_tokens} tokens."
            )
        found.append(prompts)
    return found[0], found[1]


def check_context(config: PpoConfig, models: JointModels, prompts: Sequence[Prompt]) -> None:
    """Raises InputError where prompt and response together do not fit the model."""
    limit = context_length(models.policy.trunk.model)
    longest = max(len(prompt.ids) for prompt in prompts)
    if limit is not None and longest + config.rollout.max_new_tokens > limit:
        raise InputError(
            f"the longest prompt has {longest} tokens and rollout.max_new_tokens is {config.rollout.max_new_tokens}, "
            f"together more than the {limit} that policy.model reads; lower data.max_prompt_tokens with "
            f'data.too_long = "drop", or rollout.max_new_tokens.'
        )


def introduce(reward_models: dict[str, RewardModel], progress: Progress) -> None:
    """Say how good each reward model is known to be, and warn where it is no better than a coin."""
    for name, model in reward_models.items():
        if model.card is None or model.card.heldout_accuracy is None:
            progress.say(f"reward model {name}: carries no held-out accuracy.")
            continue
        accuracy, pairs = model.card.heldout_accuracy, model.card.heldout_pairs
        progress.say(f"reward model {name}: accuracy {accuracy:.3f} on {pairs} held-out pairs.")
        if model.card.near_chance():
            progress.warn(
                f"that is chance. The policy will climb this reward all the same and learn nothing that it was "
                f"meant to; train a better reward model first ({name})."
            )


def learners(config: PpoConfig, models: JointModels) -> tuple[PolicyLearner, ValueLearner]:
    """Each model with its optimiser, whose schedule spans all updates of the run."""
    sequences = config.rollout.prompts_per_step * config.rollout.responses_per_prompt

    def updates(section: Any) -> int:
        return config.steps * section.epochs * -(-sequences // section.sequences_per_minibatch)

    policy, value = config.policy, config.value
    policy_groups = [ParameterGroup(models.policy_parameters, policy.lr)]
    head = list(models.value.head.parameters())
    value_groups = [
        ParameterGroup(models.value_parameters, value.lr),
        ParameterGroup(head, value.head_lr or value.lr),
    ]
    return (
        PolicyLearner(
            model=models.policy,
            engine=LocalEngine(policy_groups, policy, updates(policy)),
            epochs=policy.epochs,
            sequences_per_minibatch=policy.sequences_per_minibatch,
            clip_low=policy.clip_low,
            clip_high=policy.clip_high,
        ),
        ValueLearner(
            model=models.value,
            engine=LocalEngine(value_groups, value, updates(value)),
            epochs=value.epochs,
            sequences_per_minibatch=value.sequences_per_minibatch,
        ),
    )


def make_generator(
    policy: CausalPolicy, tokenizer: PreTrainedTokenizerBase, config: PpoConfig, random: torch.Generator
) -> TorchGenerator:
    return TorchGenerator(
        policy,
        decoder(tokenizer),
        policy.stop_ids(tokenizer),
        max_new_tokens=config.rollout.max_new_tokens,
        sequences_per_batch=config.rollout.sequences_per_batch,
        random=random,
    )


def repeat(prompts: Sequence[Prompt], times: int) -> list[Prompt]:
    """Each prompt several times over, side by side."""
    return [prompt for prompt in prompts for _ in range(times)]


def check_sampler(stage: JointStage, config: PpoConfig) -> None:
    """The generator's log-probabilities must be those that train.

    Raises RunError where they differ by more than 1e-4 nats a token in float32, or 0.1 on average in bfloat16.
    """
    prompts = sorted(stage.prompts, key=lambda prompt: len(prompt.ids))
    chosen = [prompts[0], prompts[len(prompts) // 2], prompts[-1]]
    rollouts = stage.fresh_generator(config).generate(chosen)
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


def evaluate_heldout(stage: JointStage, config: PpoConfig, folder: RunFolder, name: str) -> dict[str, float]:
    """Measure the models on held-out prompts, without a trace in what training will sample."""
    if not stage.heldout:
        return {}
    rollouts = stage.fresh_generator(config).generate(repeat(stage.heldout, config.eval_responses_per_prompt))
    scores = stage.reward.score(rollouts)
    trajectories = stage.evaluate(rollouts, scores)
    batch = estimate_advantages(trajectories, config.advantage, config.kl.coefficient)
    folder.save_rollouts(f"heldout_{name}", records(rollouts, trajectories, batch, scores, stage))
    return measure(trajectories, batch, scores, config.kl.coefficient)


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
