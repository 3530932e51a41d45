"""The time of a joint step by phase, and of each phase by what it is spent on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from tandem.plan.arithmetic import adapted_share, cache_bytes, head_flops, layer_traffic, trunk_flops
from tandem.plan.demand import Demand
from tandem.plan.layout import Layout
from tandem.plan.memory import LOGITS_PER_CHUNK, microbatch_tokens, optimiser_shard, rows_together, shares_below
from tandem.plan.model_size import ModelSize

# Passes over an array of logits: to sample from, to read log-probabilities of, and to learn from.
SAMPLING_PASSES, READING_PASSES, LEARNING_PASSES = 6, 4, 10
# Attention's products are as narrow as a head; narrower than this they reach so much less of the rate.
WIDE_HEAD = 64
# Keys and values are read, and the scores over them written and read.
CACHE_PASSES = 2
# What LoRA adds to a layer: passes over its matrices' inputs and outputs, and calls.
ADAPTER_PASSES, ADAPTER_CALLS = 3, 2
# Bytes that an optimiser step reads and writes for a weight: clipping, AdamW, the compute weight.
OPTIMISER_BYTES = 46


@dataclass(frozen=True)
class Cost:
    """Seconds on one GPU: multiplying, moving memory, calling layers, and waiting for other GPUs."""

    products: float = 0.0
    memory: float = 0.0
    calls: float = 0.0
    network: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.memory + self.calls + self.network

    @property
    def mostly(self) -> str:
        """What most of it is spent on."""
        parts = asdict(self)
        return max(parts, key=lambda name: parts[name])

    def times(self, factor: float) -> Cost:
        return Cost(*(factor * part for part in asdict(self).values()))


def added(costs: Iterable[Cost]) -> Cost:
    parts = [list(asdict(cost).values()) for cost in costs]
    return Cost(*map(sum, zip(*parts, strict=True)))


def step_costs(demand: Demand, layout: Layout) -> dict[str, Cost]:
    """Each phase of a joint step, on the GPU that has the most to do."""
    phases = {
        "rollout": _rollout(demand, layout),
        "score": _score(demand, layout),
        "evaluate": _evaluate(demand, layout),
        "update": _update(demand, layout),
    }
    if layout.generator == "vllm":
        weights = demand.policy.parameters * demand.width
        phases["weight sync"] = Cost(memory=2 * weights / _rates(layout)[1])
    return phases


def _rates(layout: Layout) -> tuple[float, float]:
    """FLOP/s of products and bytes/s of memory that are reached."""
    device = layout.device
    return device.flops * device.product_share, device.bandwidth * device.bandwidth_share


def _sequences(demand: Demand, layout: Layout) -> int:
    return -(-demand.sequences // layout.gpus)


def _reading(demand: Demand, layout: Layout, size: ModelSize, tokens: float, length: float, rank: int) -> Cost:
    """So many tokens through all layers, the calls apart; a rank of 0 is no adapter."""
    flops, bandwidth = _rates(layout)
    weights = trunk_flops(size, tokens, 0) + 2.0 * tokens * size.adapter_parameters(rank, None)
    attention = trunk_flops(size, tokens, length) - trunk_flops(size, tokens, 0)
    products = weights + attention * max(1.0, WIDE_HEAD / size.head_width)
    a_token = layer_traffic(size) + (ADAPTER_PASSES * size.linear_ends if rank else 0)
    return Cost(products / flops, tokens * size.layers * a_token * demand.width / bandwidth)


def _layers(
    demand: Demand, layout: Layout, size: ModelSize, sequences: int, minibatch: int, share: float, rank: int = 0
) -> Cost:
    """One forward of a share of the layers over so many sequences, a micro-batch at a time."""
    passes = math.ceil(sequences * demand.lengths.longest / microbatch_tokens(demand, minibatch, layout))
    calls = passes * size.layers * layout.device.layer_seconds * (1 + (ADAPTER_CALLS if rank else 0))
    lengths = demand.lengths
    reading = _reading(demand, layout, size, sequences * lengths.mean, lengths.mean, rank)
    return added([reading, Cost(calls=calls)]).times(share)


def _head(demand: Demand, layout: Layout, sequences: float, projections: float, passes: int) -> Cost:
    """The responses' positions projected on the vocabulary so many times, and so many passes over their logits."""
    flops, bandwidth = _rates(layout)
    rows = sequences * demand.lengths.mean_response
    moved = rows * demand.policy.vocabulary * 4.0 * passes
    return Cost(projections * head_flops(demand.policy, rows) / flops, moved / bandwidth)


def _with_gathering(
    demand: Demand, layout: Layout, size: ModelSize, cost: Cost, sequences: int, minibatch: int, *, learns: bool
) -> Cost:
    """With what a sharded model must fetch, as far as that takes longer than the work that it goes on beside.

    A forward gathers the weights once; learning gathers them twice and scatters gradients in float32, in every
    micro-batch.
    """
    if layout.shard == 1:
        return cost
    passes = math.ceil(sequences * demand.lengths.longest / microbatch_tokens(demand, minibatch, layout))
    weights = size.body * float(demand.width)
    once = layout.collective_seconds(weights, layout.shard, size.layers)
    needed = passes * once
    if learns:
        trained = demand.rank is None
        needed += passes * once
        needed += passes * layout.collective_seconds(4.0 * size.body, layout.shard, size.layers) * trained
    return added([cost, Cost(network=max(0.0, needed - cost.total))])


def _rollout(demand: Demand, layout: Layout) -> Cost:
    """Prompts are read, then every token is the slower of multiplying the rows and reading the weights."""
    size, lengths, device = demand.policy, demand.lengths, layout.device
    flops, bandwidth = _rates(layout)
    here, rows = _sequences(demand, layout), rows_together(demand, layout)
    batches = math.ceil(here / rows)
    steps = lengths.longest_response
    going = rows * lengths.mean_response / steps
    prompts = -(-here // demand.responses_per_prompt) * lengths.mean_prompt
    rank = demand.rank or 0
    more_calls = 1 + (ADAPTER_CALLS if rank and layout.generator == "torch" else 0)
    calls = Cost(calls=batches * size.layers * device.layer_seconds * more_calls)
    reading = added([_reading(demand, layout, size, prompts, lengths.mean_prompt, rank), calls])
    weights = size.trunk + size.head
    multiplying = (2.0 * weights * going) / flops
    fetching = weights * demand.width / bandwidth
    context = lengths.mean_prompt + lengths.mean_response / 2
    a_token = layer_traffic(size) + (ADAPTER_PASSES * size.linear_ends if rank else 0)
    moved = going * (
        context * cache_bytes(size, demand.width) * CACHE_PASSES
        + size.layers * a_token * demand.width
        + size.vocabulary * 4.0 * SAMPLING_PASSES
    )
    a_layer = device.graph_layer_seconds if layout.generator == "vllm" else device.layer_seconds
    token = Cost(
        products=multiplying if multiplying >= fetching else 0.0,
        memory=(fetching if fetching > multiplying else 0.0) + moved / bandwidth,
        calls=(size.layers + 1) * a_layer * more_calls,
    )
    whole = Cost(network=layout.collective_seconds(weights * float(demand.width), layout.shard, size.layers))
    return added([whole, reading, token.times(batches * steps)])


def _score(demand: Demand, layout: Layout) -> Cost:
    """Every reward model reads every sequence; lower layers that all share are read here, once."""
    sequences = _sequences(demand, layout)
    costs = [Cost()]
    for size in demand.rewards:
        read = _layers(demand, layout, size, sequences, demand.sequences, 1.0)
        costs.append(_with_gathering(demand, layout, size, read, sequences, demand.sequences, learns=False))
    upper = adapted_share(demand.policy, demand.upper_layers)
    share = demand.adapter_rewards * upper + (1 - upper if shares_below(demand, layout) else 0.0)
    if share:
        costs.append(_layers(demand, layout, demand.policy, sequences, demand.sequences, share, demand.rank or 0))
    return added(costs)


def _evaluate(demand: Demand, layout: Layout) -> Cost:
    """Value model, reference, and the policy: all its rows, or an eighth where the sampler's numbers can stand."""
    sequences, size = _sequences(demand, layout), demand.policy
    upper = adapted_share(size, demand.upper_layers) if shares_below(demand, layout) else 1.0
    again = 1.0 if demand.recompute else 1 / 8
    rank = demand.rank or 0
    reference = _layers(demand, layout, size, sequences, demand.sequences, upper)
    policies = added([reference, _layers(demand, layout, size, sequences, demand.sequences, again * upper, rank)])
    heads = _head(demand, layout, sequences * (1 + again), 1, READING_PASSES)
    value = _layers(demand, layout, demand.value or size, sequences, demand.sequences, upper, rank)
    return added(
        [
            _with_gathering(demand, layout, size, added([policies, heads]), sequences, demand.sequences, learns=False),
            _with_gathering(demand, layout, demand.value or size, value, sequences, demand.sequences, learns=False),
        ]
    )


def _update(demand: Demand, layout: Layout) -> Cost:
    """Forward and backward of both models in every epoch, and an optimiser step for every minibatch."""
    size = demand.policy
    costs = [_learning(demand, layout, size, demand.policy_epochs, demand.policy_minibatch, demand.policy_trained)]
    costs.append(_learning_head(demand, layout).times(demand.policy_epochs))
    if demand.mode != "head":
        value = demand.value or size
        costs.append(
            _learning(demand, layout, value, demand.value_epochs, demand.value_minibatch, demand.value_trained)
        )
    return added(costs)


def _learning(demand: Demand, layout: Layout, size: ModelSize, epochs: int, minibatch: int, trained: int) -> Cost:
    """A backward is two forwards, or one of products where the weights are frozen; checkpointing adds a forward."""
    sequences = _sequences(demand, layout)
    upper = adapted_share(size, demand.upper_layers) if shares_below(demand, layout) else 1.0
    forward = _layers(demand, layout, size, sequences, minibatch, upper, demand.rank or 0)
    extra = 1.0 if layout.activation_checkpointing else 0.0
    products = 3.0 if demand.rank is None else 2.0
    cost = Cost((products + extra) * forward.products, (3 + extra) * forward.memory, (3 + extra) * forward.calls)
    cost = _with_gathering(demand, layout, size, cost, sequences, minibatch, learns=True)
    steps = math.ceil(demand.sequences / minibatch)
    _, bandwidth = _rates(layout)
    moving = OPTIMISER_BYTES * trained / optimiser_shard(demand, layout) / bandwidth
    members = layout.replicas if demand.rank is None else layout.gpus
    own = 4.0 * trained / optimiser_shard(demand, layout)
    summing = 2 * layout.collective_seconds(own, members, size.layers)
    return added([cost, Cost(memory=moving, network=summing).times(steps)]).times(epochs)


def _learning_head(demand: Demand, layout: Layout) -> Cost:
    """Three products a row, two under a frozen head; one more where a chunk makes its logits again."""
    sequences, lengths = _sequences(demand, layout), demand.lengths
    rows = microbatch_tokens(demand, demand.policy_minibatch, layout) * lengths.longest_response / lengths.longest
    again = demand.rank is None and rows > LOGITS_PER_CHUNK // demand.policy.vocabulary
    return _head(demand, layout, sequences, (3 if demand.rank is None else 2) + again, LEARNING_PASSES)
