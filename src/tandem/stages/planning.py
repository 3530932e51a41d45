"""`tandem plan`: what a joint recipe needs and how long it takes, before anyone pays; no weights are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from tandem.config import ClusterSection, PpoConfig, VllmSection
from tandem.errors import InputError
from tandem.models.cards import read_card
from tandem.models.loading import pick_dtype
from tandem.models.source import check_labels, read_config
from tandem.plan.advice import what_would_be_faster, what_would_fit
from tandem.plan.demand import PRECISION_BYTES, Lengths, demand_of
from tandem.plan.devices import Device, device_of, gpus_asked_for
from tandem.plan.layout import Cluster, GeneratorCopy, Layout, Workers
from tandem.plan.model_size import ModelSize
from tandem.plan.planned import Plan, planned
from tandem.plan.shapes import size_of_shape
from tandem.plan.words import report
from tandem.recipe import load_config, read_tree


@dataclass(frozen=True)
class PlanSettings:
    """What to plan for: the GPUs, lengths that are known to be shorter than the recipe's limits, and a shape to take
    instead of the recipe's models, whose files are then not looked at."""

    gpus: str
    prompt_tokens: int | None
    response_tokens: int | None
    model_shape: str | None
    json: bool


def run_plan(recipe: Path, overrides: Sequence[str], settings: PlanSettings) -> Plan:
    """Plan, and print it. Raises InputError for GPUs, lengths or models that there are not, and for a recipe that a
    run on so many GPUs would refuse."""
    count = gpus_asked_for(settings.gpus)[0]
    own = [] if has_cluster(recipe, overrides) else [f"--parallel.processes={count}"]
    plan = plan_of(load_config(PpoConfig, recipe, [*overrides, *own]), settings)
    advice = [] if plan.fits else what_would_fit(plan.demand, plan.layout)
    faster = what_would_be_faster(plan) if plan.fits else None
    if settings.json:
        print(json.dumps(plan.record() | {"advice": advice, "faster": faster and faster.record()}, indent=2))
    else:
        report(plan, advice, faster, Console(highlight=False))
    return plan


def has_cluster(recipe: Path, overrides: Sequence[str]) -> bool:
    """Whether a recipe places its processes over a cluster, and so says itself how many of them train."""
    cluster = read_tree(recipe, overrides).get("cluster")
    return cluster is not None and not (isinstance(cluster, dict) and cluster.get("kind") == "none")


def plan_of(config: PpoConfig, settings: PlanSettings) -> Plan:
    """The plan of a recipe: of its processes over a cluster, or else of as many as it says, each on a GPU."""
    count, name = gpus_asked_for(settings.gpus)
    if name == "cpu" and config.cluster is not None:
        raise InputError(
            "--gpus cpu plans one process, and the recipe has a cluster; add --cluster none, or give GPUs."
        )
    policy, rewards = sizes_of(config, settings.model_shape)
    precision = config.compute.precision
    if precision == "auto":
        fast = name != "cpu" or pick_dtype("auto", torch.device("cpu")) == torch.bfloat16
        precision = "bfloat16" if fast else "float32"
    device = device_of(name, policy, precision)
    layout = layout_of(config, device, count)
    lengths = lengths_of(config, settings)
    return planned(demand_of(config, policy, rewards, lengths, PRECISION_BYTES[precision]), layout)


def lengths_of(config: PpoConfig, settings: PlanSettings) -> Lengths:
    """Raises InputError where a mean is said to be more than the recipe's limit."""
    limits = {
        "--prompt-tokens": (settings.prompt_tokens, "data.max_prompt_tokens", config.data.max_prompt_tokens),
        "--response-tokens": (settings.response_tokens, "rollout.max_new_tokens", config.rollout.max_new_tokens),
    }
    for option, (given, key, limit) in limits.items():
        if given is not None and given > limit:
            raise InputError(f"{option} {given}: the mean is more than {key} = {limit}, the longest; raise that.")
    (prompt, _, longest_prompt), (response, _, longest_response) = limits.values()
    return Lengths(prompt or longest_prompt, response or longest_response, longest_prompt, longest_response)


def sizes_of(config: PpoConfig, shape: str | None) -> tuple[ModelSize, list[ModelSize | None]]:
    """The policy's size, and each reward model's in the recipe's order: None for an adapter of the policy."""
    sources = list(dict.fromkeys(source.model for source in config.rewards if source.model is not None))
    if shape is not None:
        size = size_of_shape(shape)
        return size, [size for _ in sources]
    trust = config.compute.trust_remote_code
    try:
        policy = ModelSize.of_config(read_config(config.policy.model, "policy.model", trust))
        return policy, [_reward_size(config, source, trust) for source in sources]
    except InputError as error:
        raise InputError(f"{error} Or plan a published shape in its place, such as --model-shape 7b.") from error


def _reward_size(config: PpoConfig, source: str, trust: bool) -> ModelSize | None:
    card = read_card(source)
    if (
        card is not None
        and card.adapter is not None
        and config.sharing.mode != "separate"
        and Path(card.base).resolve() == Path(config.policy.model).resolve()
    ):
        return None
    check_labels(source, "rewards.model", trust)
    return ModelSize.of_config(read_config(source, "rewards.model", trust))


def layout_of(config: PpoConfig, device: Device, gpus_there: int) -> Layout:
    """As many GPUs as the recipe has processes that train, with the models cut as it says; others over a cluster.

    Raises InputError for a cluster whose resource lines leave models without a GPU.
    """
    rollout, parallel = config.rollout, config.parallel
    cluster = None if config.cluster is None else cluster_of(config, config.cluster, device, gpus_there)
    return Layout(
        gpus=parallel.processes,
        device=device if cluster is None else _of_one(device, cluster.trainer_gpus),
        shard=parallel.processes // parallel.replicate,
        activation_checkpointing=parallel.activation_checkpointing,
        generator=rollout.generator,
        generator_copy=_generator_copy(config, device),
        cache_gib=None if rollout.generator == "torch" else (rollout.vllm or VllmSection()).kv_cache_gib,
        gather=rollout.gather,
        cluster=cluster,
        engine_gpus=1 if rollout.vllm is None else rollout.vllm.tensor_parallel,
    )


def _generator_copy(config: PpoConfig, device: Device) -> GeneratorCopy:
    """When there is a second policy beside the models that train: over a cluster it is in other processes."""
    rollout = config.rollout
    if config.cluster is not None or (rollout.generator == "torch" and rollout.staleness == 0):
        return "never"
    sleeps = rollout.staleness == 0 and (rollout.vllm is None or rollout.vllm.sleep) and device.is_gpu
    return "while sampling" if sleeps else "always"


def cluster_of(config: PpoConfig, settings: ClusterSection, device: Device, gpus_there: int) -> Cluster:
    """Who stands where, by the resource lines. Raises InputError where who computes has no GPU."""
    computing = ["trainer_gpus", "generator_gpus"]
    if settings.reward_workers and any(source.model for source in config.rewards):
        computing.append("reward_gpus")
    for name in computing:
        if getattr(settings, name) == 0:
            raise InputError(
                f"cluster.{name} = 0: those processes would compute on CPUs, which is not planned; set it to 1, or to "
                "a share of a GPU."
            )

    def workers(count: int, gpus: float) -> Workers:
        return Workers(count, gpus, _of_one(device, gpus))

    return Cluster(
        gpus_there=gpus_there,
        trainer_gpus=settings.trainer_gpus,
        generators=workers(settings.generators, settings.generator_gpus),
        scorers=workers(settings.reward_workers, settings.reward_gpus),
        samples_per_task=settings.samples_per_task,
        ahead=config.rollout.staleness == 1,
    )


def _of_one(device: Device, gpus: float) -> Device:
    """What a process computes on: one GPU, however many it is given, or its share of one."""
    return device.part(gpus) if 0 < gpus < 1 else device
