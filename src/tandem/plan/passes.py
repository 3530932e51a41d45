"""The time of passes through a model on one GPU, and of gathering its weights where they are cut."""

from __future__ import annotations

import math

from tandem.plan import attending
from tandem.plan.arithmetic import head_flops, layer_traffic, trunk_flops
from tandem.plan.cost import Cost, added
from tandem.plan.demand import Demand
from tandem.plan.layout import Layout
from tandem.plan.memory import microbatch_tokens
from tandem.plan.model_size import ModelSize

# What LoRA adds to a layer: passes over its matrices' inputs and outputs, and calls.
ADAPTER_PASSES, ADAPTER_CALLS = 3, 2
# Weights that were gathered are copied out of the buffer that they came in.
GATHER_PASSES = 2


def sequences_of_one(demand: Demand, layout: Layout) -> int:
    """Sequences of a step on one GPU."""
    return -(-demand.sequences // layout.gpus)


def token_traffic(size: ModelSize, rank: int) -> float:
    """Numbers that one layer reads and writes for a token; a rank of 0 is no adapter."""
    return layer_traffic(size) + (ADAPTER_PASSES * size.linear_ends if rank else 0)


def reading(demand: Demand, layout: Layout, size: ModelSize, tokens: float, length: float, rank: int) -> Cost:
    """So many tokens through all layers, the calls apart."""
    flops, bandwidth = layout.device.reached_flops, layout.device.reached_bandwidth
    weights = trunk_flops(size, tokens, 0) + 2.0 * tokens * size.adapter_parameters(rank, None)
    moved = tokens * size.layers * token_traffic(size, rank) * demand.width
    return added([Cost(weights / flops, moved / bandwidth), attending.of_sequences(layout, size, tokens, length)])


def calling(layout: Layout, size: ModelSize, rank: int) -> float:
    """Seconds of calling a pass through all layers from Python."""
    device = layout.device
    return device.pass_seconds + size.layers * device.layer_seconds * (1 + (ADAPTER_CALLS if rank else 0))


def passes_over(demand: Demand, layout: Layout, sequences: int, minibatch: int) -> int:
    """Micro-batches of so many sequences."""
    return math.ceil(sequences * demand.lengths.longest / microbatch_tokens(demand, minibatch, layout))


def through_layers(
    demand: Demand, layout: Layout, size: ModelSize, sequences: int, minibatch: int, share: float, rank: int = 0
) -> Cost:
    """One forward of a share of the layers over so many sequences, a micro-batch at a time."""
    lengths = demand.lengths
    calls = passes_over(demand, layout, sequences, minibatch) * calling(layout, size, rank)
    read = reading(demand, layout, size, sequences * lengths.mean, lengths.mean, rank)
    return added([read, Cost(calls=calls)]).times(share)


def on_vocabulary(demand: Demand, layout: Layout, sequences: float, projections: float, passes: int) -> Cost:
    """The responses' positions projected on the vocabulary so many times, and so many passes over their logits."""
    flops, bandwidth = layout.device.reached_flops, layout.device.reached_bandwidth
    rows = sequences * demand.lengths.mean_response
    moved = rows * demand.policy.vocabulary * 4.0 * passes
    return Cost(projections * head_flops(demand.policy, rows) / flops, moved / bandwidth)


def gathering_beside(cost: Cost, layout: Layout, gathered: float, network: float) -> Cost:
    """Work with what it must fetch: `gathered` bytes are copied where they belong; `network` seconds of waiting go on
    beside the work on a GPU, and before it on a processor."""
    copied = added([cost, Cost(memory=GATHER_PASSES * gathered / layout.device.reached_bandwidth)])
    waiting = max(0.0, network - copied.total) if layout.device.is_gpu else network
    return added([copied, Cost(network=waiting)])


def with_gathering(
    demand: Demand, layout: Layout, size: ModelSize, cost: Cost, sequences: int, minibatch: int, *, learns: bool
) -> Cost:
    """With what a sharded model must fetch.

    A forward gathers the weights once; learning gathers them twice and scatters gradients in float32, in every
    micro-batch.
    """
    if layout.shard == 1:
        return cost
    passes = passes_over(demand, layout, sequences, minibatch) * (2 if learns else 1)
    weights = size.body * float(demand.width)
    network = passes * layout.collective_seconds(weights, layout.shard, size.layers)
    if learns and demand.rank is None:
        network += passes / 2 * layout.collective_seconds(4.0 * size.body, layout.shard, size.layers)
    return gathering_beside(cost, layout, passes * weights, network)
