"""The time of a joint step by phase, on the GPUs that train."""

from __future__ import annotations

import math

from tandem.plan.arithmetic import adapted_share
from tandem.plan.cost import Cost, added
from tandem.plan.demand import Demand
from tandem.plan.layout import Layout
from tandem.plan.memory import LOGITS_PER_CHUNK, keeps_below, microbatch_tokens, optimiser_shard, shares_below
from tandem.plan.model_size import ModelSize
from tandem.plan.passes import on_vocabulary, sequences_of_one, through_layers, with_gathering
from tandem.types import rows_tried

# Passes over an array of logits to read log-probabilities of, and to learn from.
READING_PASSES, LEARNING_PASSES = 4, 10
# Bytes that an optimiser step reads and writes for a weight: clipping, AdamW, the compute weight.
OPTIMISER_BYTES = 46


def score(demand: Demand, layout: Layout) -> Cost:
    """Every reward model reads every sequence; lower layers that all share are read here, once."""
    sequences = sequences_of_one(demand, layout)
    costs = [Cost()]
    for size in demand.rewards:
        read = through_layers(demand, layout, size, sequences, demand.sequences, 1.0)
        costs.append(with_gathering(demand, layout, size, read, sequences, demand.sequences, learns=False))
    size, share = demand.policy, adapted_share(demand.policy, demand.upper_layers)
    for _ in range(demand.adapter_rewards):
        read = through_layers(demand, layout, size, sequences, demand.sequences, share, demand.rank or 0)
        costs.append(with_gathering(demand, layout, size, read, sequences, demand.sequences, learns=False))
    return added([*costs, read_below(demand, layout)])


def read_below(demand: Demand, layout: Layout) -> Cost:
    """The lower layers that all models share, read once for a step's sequences, where there are such layers.

    That is for an eighth of them where sampling has read all.
    """
    if not shares_below(demand, layout):
        return Cost()
    sequences, share = sequences_of_one(demand, layout), 1 - adapted_share(demand.policy, demand.upper_layers)
    again = rows_tried(sequences) if keeps_below(layout) else sequences
    return through_layers(demand, layout, demand.policy, again, demand.sequences, share)


def evaluate(demand: Demand, layout: Layout) -> Cost:
    """Value model, reference, and the policy: all its rows, or an eighth where the sampler's numbers can stand."""
    sequences, size = sequences_of_one(demand, layout), demand.policy
    upper = adapted_share(size, demand.upper_layers) if shares_below(demand, layout) else 1.0
    again = sequences if demand.recompute else rows_tried(sequences)
    rank = demand.rank or 0

    def read(model: ModelSize, rows: int, rank: int) -> Cost:
        layers = through_layers(demand, layout, model, rows, demand.sequences, upper, rank)
        return with_gathering(demand, layout, model, layers, rows, demand.sequences, learns=False)

    heads = on_vocabulary(demand, layout, sequences + again, 1, READING_PASSES)
    return added(
        [read(size, sequences, 0), read(size, again, rank), read(demand.value or size, sequences, rank), heads]
    )


def update(demand: Demand, layout: Layout) -> Cost:
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
    sequences = sequences_of_one(demand, layout)
    upper = adapted_share(size, demand.upper_layers) if shares_below(demand, layout) else 1.0
    forward = through_layers(demand, layout, size, sequences, minibatch, upper, demand.rank or 0)
    extra = 1.0 if layout.activation_checkpointing else 0.0
    products = 3.0 if demand.rank is None else 2.0
    cost = Cost((products + extra) * forward.products, (3 + extra) * forward.memory, (3 + extra) * forward.calls)
    cost = with_gathering(demand, layout, size, cost, sequences, minibatch, learns=True)
    steps = math.ceil(demand.sequences / minibatch)
    bandwidth = layout.device.reached_bandwidth
    moving = OPTIMISER_BYTES * trained / optimiser_shard(demand, layout) / bandwidth
    members = layout.replicas if demand.rank is None else layout.gpus
    own = 4.0 * trained / optimiser_shard(demand, layout)
    summing = 2 * layout.collective_seconds(own, members, size.layers)
    return added([cost, Cost(memory=moving, network=summing).times(steps)]).times(epochs)


def _learning_head(demand: Demand, layout: Layout) -> Cost:
    """Three products a row, two under a frozen head; one more where a chunk makes its logits again."""
    sequences, lengths = sequences_of_one(demand, layout), demand.lengths
    rows = microbatch_tokens(demand, demand.policy_minibatch, layout) * lengths.longest_response / lengths.longest
    again = demand.rank is None and rows > LOGITS_PER_CHUNK // demand.policy.vocabulary
    return on_vocabulary(demand, layout, sequences, (3 if demand.rank is None else 2) + again, LEARNING_PASSES)
