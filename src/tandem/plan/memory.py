"""The memory of one GPU by component, at the moment of a step that needs the most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tandem.config import gathers_by_layer
from tandem.plan.arithmetic import activation_bytes, cache_bytes, working_bytes
from tandem.plan.demand import Demand
from tandem.plan.devices import Device
from tandem.plan.layout import Layout
from tandem.plan.model_size import ModelSize

# Logits of one chunk (models/causal.py), in numbers.
LOGITS_PER_CHUNK = 2**26
# Tokens that vLLM reads at once, at most (0.32; fewer on smaller cards).
VLLM_TOKENS = 16_384


@dataclass(frozen=True)
class Memory:
    """Bytes by component on one GPU: what stays for the whole run, and what each phase adds to it; and bytes of main
    memory for each GPU."""

    staying: Mapping[str, float]
    by_phase: Mapping[str, Mapping[str, float]]
    main_memory: Mapping[str, float]

    @property
    def peak_phase(self) -> str:
        return max(self.by_phase, key=lambda phase: sum(self.by_phase[phase].values()))

    @property
    def at_peak(self) -> dict[str, float]:
        return {**self.staying, **self.by_phase[self.peak_phase]}

    @property
    def peak(self) -> float:
        return sum(self.at_peak.values())


def memory_of(demand: Demand, layout: Layout) -> Memory:
    """What one GPU that trains holds, the fullest of them."""
    layers = {"gathered layers": _gathered(demand)} if layout.shard > 1 else {}
    by_phase = {
        "evaluate": with_reserve(_evaluate(demand, layout), layout.device) | layers,
        "update": with_reserve(_update(demand, layout), layout.device) | layers,
    }
    if layout.cluster is None:
        weights = layers if samples_by_layer(demand, layout) else _whole_while_sampling(demand, layout)
        kept = {"shared activations": 2 * _shared_activations(demand, layout) if keeps_below(layout) else 0.0}
        by_phase["rollout"] = with_reserve(sampling_bytes(demand, layout) | kept, layout.device) | weights
    state = _state_copies(demand, layout)
    staying = {**_weights_and_state(demand, layout), "libraries": layout.device.runtime_gib * 2**30}
    if not layout.device.is_gpu:
        staying |= state
    return Memory({name: held for name, held in staying.items() if held}, by_phase, state)


def with_reserve(part: Mapping[str, float], device: Device) -> dict[str, float]:
    """What comes and goes, with what the allocator holds beside it."""
    kept = {name: held for name, held in part.items() if held}
    return {**kept, "allocator reserve": device.reserve_share * sum(kept.values())}


def _weights_and_state(demand: Demand, layout: Layout) -> dict[str, float]:
    """Weights and optimisers. Whole models are cut over the GPUs of a group; adapters are whole on each."""
    width, shard = demand.width, layout.shard
    trained = (demand.policy_trained + demand.value_trained) / optimiser_shard(demand, layout)
    policy = demand.policy.parameters * width / shard
    held: dict[str, float] = {}
    if demand.rank is None:
        held |= {"policy": policy, "reference": policy}
    else:
        one = demand.policy.adapter_parameters(demand.rank, demand.upper_layers)
        adapters = one * (1 + (demand.mode == "adapters") + demand.adapter_rewards)
        held |= {"trunk of policy and reference": policy, "adapters": float(adapters * width)}
    if demand.value is not None:
        kept_head = demand.policy.head if demand.value_keeps_head else 0
        held["value model"] = (demand.value.scalar_parameters + kept_head) * width / shard
    held["reward models"] = sum(size.scalar_parameters for size in demand.rewards) * width / shard
    held["float32 master weights"] = 4.0 * trained if width < 4 else 0.0
    held["Adam moments"] = 8.0 * trained
    if layout.generator_copy == "always":
        held["generator's weights"] = _generators_weights(demand, layout)
    return held


def _generators_weights(demand: Demand, layout: Layout) -> float:
    return float(demand.policy.parameters * demand.width) / layout.engine_gpus


def optimiser_shard(demand: Demand, layout: Layout) -> int:
    """Over how many GPUs gradients and the optimiser's state are cut."""
    return layout.shard if demand.rank is None else 1


def _gathered(demand: Demand) -> float:
    """The layer that computes, the one that is fetched meanwhile, and the embedding and head that stand around all."""
    largest = max([demand.policy, *demand.rewards], key=lambda size: size.body)
    return demand.width * (2.0 * largest.trunk / largest.layers + largest.head * (1 if largest.tied else 2))


def sampling_bytes(demand: Demand, layout: Layout) -> dict[str, float]:
    """What sampling takes beside weights: keys and values, and the larger of reading prompts and a token's logits."""
    size, width, lengths = demand.policy, demand.width, demand.lengths
    rows = rows_together(demand, layout)
    tokens = -(-rows // demand.responses_per_prompt) * lengths.longest_prompt
    if layout.generator == "vllm":
        tokens = min(tokens, VLLM_TOKENS)
    reading = tokens * working_bytes(size, width)
    logits = rows * size.vocabulary * (width + 8.0)
    cache = rows * lengths.longest * cache_bytes(size, width)
    return {
        "keys and values": cache if layout.cache_gib is None else layout.cache_gib * 2**30,
        "working set": max(reading, logits),
    }


def _whole_while_sampling(demand: Demand, layout: Layout) -> dict[str, float]:
    """The policy's weights once more: gathered from all GPUs, or held by a generator that gives them back."""
    if layout.generator_copy == "while sampling":
        return {"generator's weights": _generators_weights(demand, layout)}
    if not layout.gathers_to_sample:
        return {}
    return {"policy gathered whole": demand.policy.parameters * demand.width * (1 - 1 / layout.shard)}


def samples_by_layer(demand: Demand, layout: Layout) -> bool:
    """Whether the GPUs that train gather a layer of the policy at a time to sample, as the generator decides it: from
    what is free once all that trains is held."""
    if not layout.gathers_to_sample:
        return False
    held = _weights_and_state(demand, layout)
    whole = float(demand.policy.parameters * demand.width) + held.get("adapters", 0.0)
    free = (layout.device.memory_gib - layout.device.runtime_gib) * 2**30 - sum(held.values())
    return gathers_by_layer(layout.gather, whole, free)


def rows_together(demand: Demand, layout: Layout) -> int:
    """Rows that decode together on one GPU, or on those of one engine; where room for keys and values is set aside, as
    many as it holds."""
    rows = min(-(-demand.sequences * layout.engine_gpus // layout.gpus), demand.sequences_per_batch)
    if layout.cache_gib is None:
        return rows
    held = (
        layout.cache_gib * layout.engine_gpus * 2**30 / (demand.lengths.mean * cache_bytes(demand.policy, demand.width))
    )
    return max(1, min(rows, int(held)))


def _evaluate(demand: Demand, layout: Layout) -> dict[str, float]:
    largest = max([demand.policy, *demand.rewards], key=lambda size: working_bytes(size, demand.width))
    tokens = microbatch_tokens(demand, demand.sequences, layout)
    return {
        "working set": tokens * working_bytes(largest, demand.width) + logits_bytes(demand, layout, tokens),
        "shared activations": 2 * _shared_activations(demand, layout),
    }


def microbatch_tokens(demand: Demand, sequences: int, layout: Layout) -> float:
    """Tokens of the largest micro-batch on one GPU: at most its part of the sequences, at least one."""
    of_one = demand.lengths.longest
    there = -(-sequences // layout.gpus) * of_one
    return max(of_one, min(demand.tokens_per_microbatch // of_one * of_one, there))


def logits_bytes(demand: Demand, layout: Layout, tokens: float) -> float:
    """One chunk of logits as they come, and on a GPU in float32 beside them; a processor makes a block of that."""
    size, lengths = demand.policy, demand.lengths
    rows = min(tokens * lengths.longest_response / lengths.longest, LOGITS_PER_CHUNK // size.vocabulary)
    return rows * size.vocabulary * (demand.width + 4.0 * layout.device.is_gpu)


def _shared_activations(demand: Demand, layout: Layout) -> float:
    """The lower layers' output for all of a step's sequences, where it is read once for all models."""
    if not shares_below(demand, layout):
        return 0.0
    return demand.sequences * demand.lengths.longest * demand.policy.hidden * float(demand.width)


def shares_below(demand: Demand, layout: Layout) -> bool:
    """Whether the layers below the adapters run once for all models, which they do in one process."""
    return demand.has_lower_layers and layout.gpus == 1


def keeps_below(layout: Layout) -> bool:
    """Whether it is the policy itself that samples, so that what its lower layers make of a text can be kept."""
    return layout.generator == "torch" and layout.generator_copy == "never" and layout.cluster is None


def _update(demand: Demand, layout: Layout) -> dict[str, float]:
    """The larger of the policy's and the value model's: they learn one after the other."""
    sides = [_learning(demand, layout, demand.policy, demand.policy_trained, demand.policy_minibatch, projects=True)]
    if demand.mode != "head":
        value = demand.value or demand.policy
        sides.append(_learning(demand, layout, value, demand.value_trained, demand.value_minibatch, projects=False))
    return max(sides, key=lambda side: sum(side.values()))


def _learning(
    demand: Demand, layout: Layout, size: ModelSize, trained: int, minibatch: int, *, projects: bool
) -> dict[str, float]:
    width = demand.width
    tokens = microbatch_tokens(demand, minibatch, layout)
    layers = demand.upper_layers or size.layers
    of_layer = activation_bytes(size, width)
    kept = layers * width * size.hidden + of_layer if layout.activation_checkpointing else layers * of_layer
    gradients = (4.0 if width == 4 else 4.0 + width) * trained / optimiser_shard(demand, layout)
    embedding = 0.0 if demand.rank is not None else float(width) * size.head
    return {
        "gradients": gradients,
        "activations": tokens * (kept + of_layer),
        "working set": (logits_bytes(demand, layout, tokens) if projects else 0.0) + embedding,
        "shared activations": _shared_activations(demand, layout),
    }


def _state_copies(demand: Demand, layout: Layout) -> dict[str, float]:
    """Copies in main memory of what trains: one that a checkpoint is written from, and a spare one while an update
    runs."""
    state = 12.0 * (demand.policy_trained + demand.value_trained) / optimiser_shard(demand, layout)
    return {
        "checkpoint being written": state if demand.keeps_state else 0.0,
        "spare copy": state if demand.keeps_state and demand.spare_copy else 0.0,
    }
