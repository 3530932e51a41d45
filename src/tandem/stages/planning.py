"""`tandem plan`: what a joint recipe needs and how long it takes, before anyone pays; no weights are read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from tandem.config import PpoConfig
from tandem.errors import InputError
from tandem.models.cards import read_card
from tandem.models.source import check_labels, read_config
from tandem.plan.advice import what_would_fit
from tandem.plan.demand import PRECISION_BYTES, Lengths, demand_of
from tandem.plan.devices import GPUS_PER_MACHINE, Device, device_of, gpus_asked_for
from tandem.plan.layout import Layout
from tandem.plan.model_size import ModelSize
from tandem.plan.planned import Plan, planned
from tandem.plan.shapes import size_of_shape
from tandem.plan.words import report


@dataclass(frozen=True)
class PlanSettings:
    """What to plan for: the GPUs, lengths that are known to be shorter than the recipe's limits, and a shape to take
    instead of the recipe's models, whose files are then not looked at."""

    gpus: str
    prompt_tokens: int | None
    response_tokens: int | None
    model_shape: str | None
    generator: Literal["torch", "vllm"]
    checkpointing: bool
    json: bool


def run_plan(config: PpoConfig, settings: PlanSettings) -> Plan:
    """Plan, and print it. Raises InputError for GPUs, lengths or models that there are not."""
    plan = plan_of(config, settings)
    advice = [] if plan.fits else what_would_fit(plan.demand, plan.layout)
    if settings.json:
        print(json.dumps(plan.record() | {"advice": advice}, indent=2))
    else:
        report(plan, advice, Console(highlight=False))
    return plan


def plan_of(config: PpoConfig, settings: PlanSettings) -> Plan:
    count, name = gpus_asked_for(settings.gpus)
    policy, rewards = sizes_of(config, settings.model_shape)
    precision = config.compute.precision
    if precision == "auto":
        precision = "float32" if name == "cpu" else "bfloat16"
    device = device_of(name, policy, precision)
    layout = layout_of(count, device, policy, PRECISION_BYTES[precision], settings)
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
    policy = ModelSize.of_config(read_config(config.policy.model, "policy.model", trust))
    return policy, [_reward_size(config, source, trust) for source in sources]


def _reward_size(config: PpoConfig, source: str, trust: bool) -> ModelSize | None:
    card = read_card(source)
    on_a_trunk = card is not None and card.adapter is not None and config.sharing.mode != "separate"
    if on_a_trunk and Path(card.base).resolve() == Path(config.policy.model).resolve():
        return None
    check_labels(source, "rewards.model", trust)
    return ModelSize.of_config(read_config(source, "rewards.model", trust))


def layout_of(count: int, device: Device, policy: ModelSize, width: int, settings: PlanSettings) -> Layout:
    """All GPUs shard every model between them; a generator of its own takes as few to a copy as leave room beside."""
    split = 1
    if settings.generator == "vllm":
        most = min(count, GPUS_PER_MACHINE)
        wanted = policy.parameters * width / (0.25 * device.memory_gib * 2**30)
        split = min(2 ** max(0, math.ceil(math.log2(wanted))), 2 ** int(math.log2(most)))
    return Layout(count, device, count, settings.checkpointing, settings.generator, split)
