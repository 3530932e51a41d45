"""What a joint run works with, put together from its recipe: data, models, rewards, optimisers, generator."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from tandem.config import KlSection, PpoConfig, RewardSource, term_names
from tandem.data.feed import Feed
from tandem.data.prompts import split_prompts
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.errors import InputError
from tandem.models.causal import CausalPolicy
from tandem.models.saving import save_policy, save_scalar
from tandem.models.sharing import JointModels, Placement, RewardModel, build_joint, reward_key
from tandem.models.source import check_labels, layer_count, positions, read_config
from tandem.rewards.composition import Earned, Term, WeightedSum
from tandem.rewards.function import FunctionReward, RewardFunction, load_function
from tandem.rewards.model import ModelReward
from tandem.rewards.remote import RemoteReward
from tandem.rollout import Generator, VllmEngine, VllmGenerator
from tandem.rollout.vllm_generator import check_installed
from tandem.run import Progress, RunFolder
from tandem.stages.compilation import compile_models, compiles
from tandem.stages.joint import evaluate
from tandem.stages.sampling import make_engine, make_generator, send_weights
from tandem.stages.scoring import refused_before_training
from tandem.stages.together import by_first
from tandem.stages.update import Course, Engine, PolicyLearner, SharedLearner, ValueLearner, update, update_shared
from tandem.text import decoder
from tandem.types import Batch, Prompt, Rollout, Scores, Trajectories
from tandem.world import world


class Workers(Protocol):
    """Generators and reward workers as a joint run needs them."""

    def generator(self, random: torch.Generator) -> Generator:
        """One that samples from the weights that it is sent; `random` decides what."""
        ...

    def spread(self, terms: Mapping[str, Term]) -> dict[str, Term]:
        """The same terms, scored by the workers where there are workers for that."""
        ...

    def begin_step(self, number: int) -> None: ...

    def metrics(self) -> dict[str, float]:
        """What befell the workers since this was last asked."""
        ...

    def summary(self) -> dict[str, Any]:
        """What befell them over the whole run."""
        ...


@dataclass(frozen=True)
class JointStage:
    """Everything that a joint run works with."""

    tokenizer: PreTrainedTokenizerBase
    prompts: Feed[Prompt]
    heldout: Sequence[Prompt]
    models: JointModels
    reward: WeightedSum
    reward_models: dict[str, RewardModel]
    generator: Generator
    engine: VllmEngine | None
    learners: tuple[PolicyLearner, ValueLearner] | SharedLearner
    placement: Placement
    sampling: torch.Generator
    random: torch.Generator
    recompute_logprobs: bool
    workers: Workers | None

    @property
    def engines(self) -> dict[str, Engine]:
        """What trains, by name."""
        if isinstance(self.learners, SharedLearner):
            return {"policy": self.learners.engine}
        policy, value = self.learners
        return {"policy": policy.engine, "value": value.engine}

    @property
    def randoms(self) -> dict[str, torch.Generator]:
        """The random states that are the run's own: of sampling, and of the order of minibatches."""
        return {"sampling": self.sampling, "minibatches": self.random}

    @property
    def value_units(self) -> list[float]:
        """The units that the value model's head speaks in: scale and shift."""
        return [self.models.value.scale, self.models.value.shift]

    def set_value_units(self, scale: float, shift: float) -> None:
        """Read a head that was taken over as it spoke then."""
        self.models.value.scale, self.models.value.shift = scale, shift

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """What the reward says. What the models share of reading these rollouts is read once for all."""
        trunk = self.models.policy.trunk
        trunk.expect([rollout.prompt.ids + rollout.ids for rollout in rollouts])
        return self.reward.score(rollouts)

    def evaluate(self, rollouts: Sequence[Rollout], scores: Scores) -> Trajectories:
        models, budget = self.models, self.placement.tokens_per_microbatch
        try:
            return evaluate(
                rollouts,
                scores,
                models.policy,
                models.reference,
                models.value,
                budget,
                recompute=self.recompute_logprobs,
            )
        finally:
            models.policy.trunk.forget()

    def update(self, batch: Batch, kl: KlSection, course: Course, value_epochs: int) -> dict[str, float]:
        budget = self.placement.tokens_per_microbatch
        if isinstance(self.learners, SharedLearner):
            return update_shared(self.learners, batch, kl, budget, self.random, course, value_epochs)
        return update(*self.learners, batch, kl, budget, self.random, course, value_epochs)

    def rescale_values(self, mean: float, std: float) -> None:
        self.models.value.rescale(mean, std)

    def fresh_generator(self, config: PpoConfig) -> Generator:
        """One on the weights as they are, with a random state of its own, the same every time."""
        policy, tokenizer = self.models.policy, self.tokenizer
        random = torch.Generator(device=self.placement.device).manual_seed(config.run.seed + 1)
        if self.workers is not None:
            generator: Generator = self.workers.generator(random)
        elif self.engine is not None:
            generator = VllmGenerator(self.engine, decoder(tokenizer), policy.stop_ids(tokenizer), random)
        else:
            return make_generator(policy, tokenizer, config.rollout, random, gather=config.rollout.gather)
        send_weights(policy, generator, version=0)
        return generator

    def save(self, folder: RunFolder) -> None:
        policy = self.models.policy
        save_policy(policy.trunk, policy.adapter, self.tokenizer, folder.model)
        save_scalar(self.models.value, self.tokenizer, folder.path / "value_model")


def build(
    config: PpoConfig,
    progress: Progress,
    offsets: Mapping[str, float] | None = None,
    workers: Workers | None = None,
) -> JointStage:
    """Load data, models and reward. What can be refused early is looked at first.

    `offsets` are those of the reward's terms, where they were found before; `workers` sample and score, where others
    do that than this process.
    """
    functions = {source.function: load_function(source.function) for source in config.rewards if source.function}
    if config.rollout.generator == "vllm":
        check_installed()
    placement = Placement.of(config.compute, cache(progress.say))
    tokenizer = placement.tokenizer(config.policy.model, "policy.model")
    check_models(config, placement)
    prompts = split_prompts(config.data, tokenizer, config.run.seed)
    for line in prompts.notes:
        progress.say(line)
    check_context(config, prompts.longest)
    with progress.console.status("loading the models"):
        models, reward_models = build_joint(config, tokenizer, placement)
    check_end(config, models.policy.stop_ids(tokenizer), progress)
    introduce(reward_models, progress)
    sampling = torch.Generator(device=placement.device).manual_seed(config.run.seed)
    sampler = models.policy
    if workers is None and config.rollout.generator == "torch" and config.rollout.staleness:
        sampler = models.policy.own_copy()
    if compiles(config, models.policy):
        compile_models(config, models, reward_models.values(), sampler, progress)
    engine, generator = make_sampler(config, models.policy, sampler, tokenizer, prompts.longest, sampling, workers)
    terms = reward_terms(config.rewards, reward_models, functions, tokenizer)
    reward = WeightedSum(terms if workers is None else workers.spread(terms))
    if offsets is None:
        reward = centred_on_reference(reward, config, models, tokenizer, prompts.train.sample, progress)
    else:
        reward = reward.with_offsets(offsets)
    return JointStage(
        tokenizer=tokenizer,
        prompts=prompts.train,
        heldout=prompts.heldout,
        models=models,
        reward=reward,
        reward_models=reward_models,
        generator=generator,
        engine=engine,
        learners=learners(config, models),
        placement=placement,
        sampling=sampling,
        random=torch.Generator().manual_seed(config.run.seed),
        recompute_logprobs=config.rollout.recomputes(placement.dtype.itemsize),
        workers=workers,
    )


def make_sampler(
    config: PpoConfig,
    policy: CausalPolicy,
    sampler: CausalPolicy,
    tokenizer: PreTrainedTokenizerBase,
    longest_prompt: int,
    random: torch.Generator,
    workers: Workers | None,
) -> tuple[VllmEngine | None, Generator]:
    """What samples the responses of training, and the engine behind it, where that is vLLM's in this process.

    `sampler` is the policy, or the copy of it that samples while the policy trains, in a thread of its own.
    """
    if workers is not None:
        return None, workers.generator(random)
    rollout = config.rollout
    together = world().apart() if rollout.staleness else world()
    if rollout.generator == "vllm":
        engine = make_engine(policy, config, longest_prompt + rollout.max_new_tokens)
        return engine, VllmGenerator(engine, decoder(tokenizer), policy.stop_ids(tokenizer), random, together)
    load = None if sampler is policy else sampler.load_weights
    return None, make_generator(
        sampler, tokenizer, rollout, random, load=load, gather=rollout.gather, together=together
    )


def reward_terms(
    sources: Sequence[RewardSource],
    models: dict[str, RewardModel],
    functions: dict[str, RewardFunction],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Term]:
    """The terms of the reward by the names that metrics call them by."""
    return {
        name: Term(scored_by(source, models.get(source.model or ""), functions, tokenizer), source.weight)
        for name, source in zip(term_names(sources), sources, strict=True)
    }


def scored_by(
    source: RewardSource,
    model: RewardModel | None,
    functions: Mapping[str, RewardFunction],
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[Sequence[Rollout]], Earned]:
    """What scores for one source of reward: the model that was loaded for it, its function, or its server.

    Functions and servers are asked once, however many processes train together.
    """
    if source.model is not None:
        assert model is not None
        return ModelReward(model.scorer, model.tokenizer, source.model, model.context, source.on_error)
    if source.function is not None:
        return by_first(FunctionReward(functions[source.function], source, decoder(tokenizer)))
    return by_first(RemoteReward(source, decoder(tokenizer)))


def centred_on_reference(
    reward: WeightedSum,
    config: PpoConfig,
    models: JointModels,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    progress: Progress,
) -> WeightedSum:
    """The reward with the terms that ask for it less their mean on responses that the reference gives.

    It is the policy that answers: before training it is the reference, under the rule that will sample.
    """
    names = [name for name, source in zip(term_names(config.rewards), config.rewards, strict=True) if source.center]
    if not names:
        return reward
    sampling = torch.Generator(device=models.policy.device).manual_seed(config.run.seed + 2)
    generator = make_generator(models.policy, tokenizer, config.rollout, sampling, gather=config.rollout.gather)
    count = config.score.reference_samples
    rollouts = generator.generate(random.Random(config.run.seed).choices(prompts, k=count))
    with refused_before_training():
        centred = reward.centred(names, rollouts)
    for name in names:
        progress.say(f"{name}: {centred.terms[name].offset:.4g} on average on {count} responses of the reference.")
    return centred


def check_models(config: PpoConfig, placement: Placement) -> None:
    """Raises InputError for what can be told of the models before data or weights are read."""
    trust = placement.trust_remote_code
    for source in dict.fromkeys(source.model for source in config.rewards if source.model is not None):
        check_labels(source, reward_key(config, source), trust)
        placement.tokenizer(source, reward_key(config, source))
    upper = None if config.adapters is None else config.adapters.upper_layers
    if upper is not None:
        layers = layer_count(config.policy.model, "policy.model", trust)
        if upper > layers:
            raise InputError(
                f"adapters.upper_layers = {upper}, but policy.model has {layers} layers; set at most that, or leave it "
                "out for all."
            )


def check_context(config: PpoConfig, longest: int) -> None:
    """Raises InputError where the longest prompt and response together do not fit the policy or the value model."""
    readers = {"policy.model": config.policy.model}
    if config.value.start == "reward":
        readers["the value model"] = next(source.model for source in config.rewards if source.model)
    for name, source in readers.items():
        limit = positions(read_config(source, name, config.compute.trust_remote_code))
        if limit is not None and longest + config.rollout.max_new_tokens > limit:
            raise InputError(
                f"prompts have up to {longest} tokens and rollout.max_new_tokens is "
                f"{config.rollout.max_new_tokens}, together more than the {limit} that {name} reads; lower "
                'data.max_prompt_tokens with data.too_long = "drop", or rollout.max_new_tokens.'
            )


def check_end(config: PpoConfig, stop_ids: Collection[int], progress: Progress) -> None:
    """Warn where nothing ends a response: to write on to a fixed length can be meant.

    Raises InputError where responses that do not end are penalised, since all of them would be.
    """
    if stop_ids:
        return
    said = "policy.model has no EOS token, in its tokenizer or generation_config.json, so no response ends by itself"
    if config.score.missing_eos_penalty > 0:
        raise InputError(
            f"{said}, and score.missing_eos_penalty would be taken off every one; leave it out, or give the tokenizer "
            "its eos_token."
        )
    progress.warn(f"{said}: every one has rollout.max_new_tokens = {config.rollout.max_new_tokens} tokens.")


def introduce(reward_models: dict[str, RewardModel], progress: Progress) -> None:
    """Say how good each reward model is known to be, and warn of what speaks against it."""
    for name, model in reward_models.items():
        if model.card is None or model.card.heldout_accuracy is None:
            progress.say(f"reward model {name}: carries no held-out accuracy.")
            continue
        accuracy, pairs = model.card.heldout_accuracy, model.card.heldout_pairs
        progress.say(f"reward model {name}: accuracy {accuracy:.3f} on {pairs} held-out pairs.")
        for doubt in model.card.doubts():
            progress.warn(f"reward model {name}: {doubt}")


def learners(config: PpoConfig, models: JointModels) -> tuple[PolicyLearner, ValueLearner] | SharedLearner:
    """Each model with its optimiser, or both with one where they share their trunk."""
    policy, value = config.policy, config.value
    head = ParameterGroup(list(models.value.head.parameters()), value.head_lr or value.lr)
    trunk = ParameterGroup(models.policy_parameters, policy.lr)
    if models.shared is not None:
        stop = config.sharing.head_gradient == "stop"
        every = config.sharing.gradient_cosine_every
        return SharedLearner(models.shared, LocalEngine([trunk, head], policy, "policy"), policy, value, stop, every)
    of_value = [ParameterGroup(models.value_parameters, value.lr), head]
    return (
        PolicyLearner(models.policy, LocalEngine([trunk], policy, "policy"), policy),
        ValueLearner(models.value, LocalEngine(of_value, value, "value model"), value),
    )
