"""The memory of one GPU by component, at the moment of a step that needs the most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tandem.plan.arithmetic import activation_bytes, cache_bytes, working_bytes
from tandem.plan.demand import Demand
from tandem.plan.layout import Layout
from tandem.plan.model_size import ModelSize

# Logits of one chunk (models/causal.py), in numbers.
LOGITS_PER_CHUNK = 2**26
# What the allocator holds and cannot hand out, as a share of what comes and goes.
RESERVE_SHARE = 0.1


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
    """What one GPU holds, the fullest of them."""
    phases = {
        "rollout": _rollout(demand, layout),
        "evaluate": _evaluate(demand, layout),
        "update": _update(demand, layout),
    }
    state = _state_copies(demand, layout)
    staying = {**_staying(demand, layout), "libraries": layout.device.runtime_gib * 2**30}
    if not layout.device.is_gpu:
        staying |= state
    return Memory(
        {name: held for name, held in staying.items() if held},
        {name: _with_reserve(part) for name, part in phases.items()},
        state,
    )


def _with_reserve(part: Mapping[str, float]) -> dict[str, float]:
    kept = {name: held for name, held in part.items() if held}
    return {**kept, "allocator reserve": RESERVE_SHARE * sum(kept.values())}


def _staying(demand: Demand, layout: Layout) -> dict[str, float]:
    """Weights and optimisers; a sharded model keeps trained weights in float32 and computes on what it gathers."""
    width, shard = demand.width, layout.shard
    trained = demand.policy_trained + demand.value_trained
    whole_models_train = demand.rank is None
    own_width = 4 if shard > 1 and whole_models_train else width
    policy = demand.policy.parameters * own_width
    held = {"policy" if whole_models_train else "trunk of policy and reference": policy / shard}
    if whole_models_train:
        held["reference"] = demand.policy.parameters * width / shard
    if demand.value is not None:
        kept_head = demand.policy.head * width if demand.value_keeps_head else 0
        held["value model"] = (demand.value.scalar_parameters * own_width + kept_head) / shard
    held["reward models"] = sum(size.scalar_parameters for size in demand.rewards) * width / shard
    if not whole_models_train:
        assert demand.rank is not None
        one = demand.policy.adapter_parameters(demand.rank, demand.upper_layers)
        adapters = one * (1 + (demand.mode == "adapters") + demand.adapter_rewards)
        held["adapters"] = adapters * width / shard
    has_masters = width < 4 and not (shard > 1 and whole_models_train)
    held["float32 master weights"] = 4.0 * trained / shard if has_masters else 0.0
    held["Adam moments"] = 8.0 * trained / shard
    held["gathered layers"] = _gathered(demand) if shard > 1 else 0.0
    if layout.generator == "vllm":
        held["generator's weights"] = demand.policy.parameters * width / layout.generator_shard
    return held


def _gathered(demand: Demand) -> float:
    """The layer that computes, the one that is fetched meanwhile, and the embedding and head that stand around all."""
    largest = max([demand.policy, *demand.rewards], key=lambda size: size.body)
    return demand.width * (2.0 * largest.trunk / largest.layers + largest.head * (1 if largest.tied else 2))


def _rollout(demand: Demand, layout: Layout) -> dict[str, float]:
    size, width, lengths = demand.policy, demand.width, demand.lengths
    rows = rows_together(demand, layout)
    prompts = -(-rows // demand.responses_per_prompt)
    reading = prompts * lengths.longest_prompt * working_bytes(size, width) if layout.generator == "torch" else 0.0
    logits = rows * size.vocabulary * (width + 8.0)
    return {
        "keys and values": rows * lengths.longest * cache_bytes(size, width),
        "working set": max(reading, logits),
    }


def rows_together(demand: Demand, layout: Layout) -> int:
    """Rows that decode together on one GPU."""
    return min(-(-demand.sequences // layout.gpus), demand.sequences_per_batch)


def _evaluate(demand: Demand, layout: Layout) -> dict[str, float]:
    largest = max([demand.policy, *demand.rewards], key=lambda size: working_bytes(size, demand.width))
    tokens = microbatch_tokens(demand, demand.sequences, layout)
    return {
        "working set": tokens * working_bytes(largest, demand.width) + logits_bytes(demand, tokens),
        "shared activations": 2 * _shared_activations(demand, layout),
    }


def microbatch_tokens(demand: Demand, sequences: int, layout: Layout) -> float:
    """Tokens of the largest micro-batch on one GPU: at most its part of the sequences, at least one."""
    of_one = demand.lengths.longest
    there = -(-sequences // layout.gpus) * of_one
    return max(of_one, min(demand.tokens_per_microbatch // of_one * of_one, there))


def logits_bytes(demand: Demand, tokens: float) -> float:
    """One chunk of logits: as they come, in float32, and on a GPU the log-softmax beside them."""
    size, lengths = demand.policy, demand.lengths
    rows = min(tokens * lengths.longest_response / lengths.longest, LOGITS_PER_CHUNK // size.vocabulary)
    return rows * size.vocabulary * (4.0 if demand.width == 4 else demand.width + 8.0)


def _shared_activations(demand: Demand, layout: Layout) -> float:
    """The lower layers' output for all of a step's sequences, where it is read once for all models."""
    if not demand.shares_below:
        return 0.0
    sequences = -(-demand.sequences // layout.gpus)
    return sequences * demand.lengths.longest * demand.policy.hidden * float(demand.width)


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
    gradients = 4.0 * trained / layout.shard
    if width < 4:
        gradients += float(width) * (trained if layout.shard == 1 else size.trunk / size.layers + size.head)
    embedding = 0.0 if demand.rank is not None else float(width) * size.head
    return {
        "gradients": gradients,
        "activations": tokens * (kept + of_layer),
        "working set": (logits_bytes(demand, tokens) if projects else 0.0) + embedding,
        "shared activations": _shared_activations(demand, layout),
    }


def _state_copies(demand: Demand, layout: Layout) -> dict[str, float]:
    """Copies in main memory of what trains: one that a checkpoint is written from, and a spare one while an update
    runs."""
    state = 12.0 * (demand.policy_trained + demand.value_trained) / layout.shard
    return {
        "checkpoint being written": state if demand.keeps_state else 0.0,
        "spare copy": state if demand.keeps_state and demand.spare_copy else 0.0,
    }
