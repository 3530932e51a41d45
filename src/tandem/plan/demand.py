"""What a joint recipe asks for, as numbers: which models of which size, how they learn, how much is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tandem.config import PpoConfig
from tandem.plan.model_size import ModelSize

PRECISION_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and responses: the mean, which time goes by, and the longest, which memory goes by."""

    mean_prompt: float
    mean_response: float
    longest_prompt: int
    longest_response: int

    @property
    def mean(self) -> float:
        return self.mean_prompt + self.mean_response

    @property
    def longest(self) -> int:
        return self.longest_prompt + self.longest_response


@dataclass(frozen=True)
class Demand:
    """A joint step in numbers.

    `rewards` are the models that score by themselves; `adapter_rewards` stand on the policy's trunk. `rank` is that of
    the adapters, None where whole models train. `value` is the value model where it has a trunk of its own.
    `width` is bytes a weight that computes. `keeps_state`: checkpoints are written, with a `spare_copy` or none.
    """

    mode: Literal["separate", "adapters", "head"]
    policy: ModelSize
    value: ModelSize | None
    value_keeps_head: bool
    rewards: Sequence[ModelSize]
    adapter_rewards: int
    rank: int | None
    upper_layers: int | None
    width: int
    lengths: Lengths
    prompts: int
    responses_per_prompt: int
    sequences_per_batch: int
    tokens_per_microbatch: int
    policy_epochs: int
    value_epochs: int
    policy_minibatch: int
    value_minibatch: int
    recompute: bool
    keeps_state: bool
    spare_copy: bool

    @property
    def sequences(self) -> int:
        return self.prompts * self.responses_per_prompt

    @property
    def policy_trained(self) -> int:
        """Weights of the policy that an optimiser moves."""
        if self.rank is None:
            return self.policy.parameters
        return self.policy.adapter_parameters(self.rank, self.upper_layers)

    @property
    def value_trained(self) -> int:
        """Weights of the value model that an optimiser moves, its head among them."""
        if self.mode == "separate":
            assert self.value is not None
            return self.value.scalar_parameters
        if self.mode == "head":
            return self.policy.hidden
        assert self.rank is not None
        return self.policy.adapter_parameters(self.rank, self.upper_layers) + self.policy.hidden

    @property
    def has_lower_layers(self) -> bool:
        """Whether there are layers below the adapters, the same for all models."""
        return self.rank is not None and (self.upper_layers or self.policy.layers) < self.policy.layers


def demand_of(
    config: PpoConfig, policy: ModelSize, rewards: Sequence[ModelSize | None], lengths: Lengths, width: int
) -> Demand:
    """`rewards` are the sizes of the recipe's reward models in their order, None for an adapter of the policy."""
    value: ModelSize | None = None
    if config.sharing.mode == "separate":
        value = (rewards[0] or policy) if config.value.start == "reward" else policy
    adapters = config.adapters
    if config.sharing.mode == "adapters" or adapters is not None:
        rank: int | None = 16 if adapters is None else adapters.rank
    else:
        rank = None
    own = [size for size in rewards if size is not None]
    return Demand(
        mode=config.sharing.mode,
        policy=policy,
        value=value,
        value_keeps_head=config.value.start == "policy" and not policy.tied,
        rewards=own,
        adapter_rewards=len(rewards) - len(own),
        rank=rank,
        upper_layers=None if adapters is None else adapters.upper_layers,
        width=width,
        lengths=lengths,
        prompts=config.rollout.prompts_per_step,
        responses_per_prompt=config.rollout.responses_per_prompt,
        sequences_per_batch=config.rollout.sequences_per_batch,
        tokens_per_microbatch=config.compute.tokens_per_microbatch,
        policy_epochs=config.policy.epochs,
        value_epochs=config.value.epochs,
        policy_minibatch=config.policy.sequences_per_minibatch,
        value_minibatch=config.value.sequences_per_minibatch,
        recompute=config.rollout.recomputes(width),
        keeps_state=True,
        spare_copy=config.checkpoints.spare_copy,
    )
