"""The time of sampling on one GPU: prompts are read, then every token is a pass of a few rows."""

from __future__ import annotations

import math

from tandem.plan import attending
from tandem.plan.cost import Cost, added
from tandem.plan.demand import Demand
from tandem.plan.layout import Layout
from tandem.plan.memory import rows_together, samples_by_layer
from tandem.plan.passes import calling, gathering_beside, reading, sequences_of_one, token_traffic

# Passes over an array of logits to sample from.
SAMPLING_PASSES = 6


def rollout(demand: Demand, layout: Layout) -> Cost:
    """All responses of a step that one GPU samples, or those of one engine together, a batch of rows after another."""
    here, rank = sequences_of_one(demand, layout) * layout.engine_gpus, demand.rank or 0
    batches = math.ceil(here / rows_together(demand, layout))
    prompts = -(-here // demand.responses_per_prompt) * demand.lengths.mean_prompt
    calls = Cost(calls=batches * calling(layout, demand.policy, rank if layout.generator == "torch" else 0))
    passed = reading(demand, layout, demand.policy, prompts, demand.lengths.mean_prompt, rank)
    read = added([passed.times(1 / layout.engine_gpus), between_parts(demand, layout, prompts), calls])
    tokens = batches * demand.lengths.longest_response
    decoded = token(demand, layout).times(tokens)
    if samples_by_layer(demand, layout):
        gathered, network = gathered_for_a_pass(demand, layout)
        return added(
            [
                gathering_beside(read, layout, batches * gathered, batches * network),
                gathering_beside(decoded, layout, tokens * gathered, tokens * network),
            ]
        )
    whole = Cost()
    if layout.gathers_to_sample:
        size, weights = demand.policy, demand.policy.parameters * float(demand.width)
        network = layout.collective_seconds(weights, layout.shard, size.layers + 1)
        whole = gathering_beside(Cost(), layout, weights, network)
    return added([whole, read, decoded])


def token(demand: Demand, layout: Layout) -> Cost:
    """One token more for all rows that decode together.

    On a GPU the weights are read while they are multiplied; a processor does one after the other. GPUs of one engine
    do each a part of it.
    """
    size, lengths, device = demand.policy, demand.lengths, layout.device
    flops, bandwidth = layout.device.reached_flops, layout.device.reached_bandwidth
    rank = demand.rank or 0
    going = rows_together(demand, layout) * lengths.mean_response / lengths.longest_response
    weights = size.trunk + size.head
    multiplying = (2.0 * weights * going) / flops
    fetching = weights * demand.width / bandwidth
    context = lengths.mean_prompt + lengths.mean_response / 2
    moved = going * (size.layers * token_traffic(size, rank) * demand.width + size.vocabulary * 4.0 * SAMPLING_PASSES)
    if device.is_gpu:
        multiplying, fetching = (multiplying, 0.0) if multiplying >= fetching else (0.0, fetching)
    if layout.generator == "vllm":
        calls = device.pass_seconds + size.layers * device.graph_layer_seconds
    else:
        calls = calling(layout, size, rank)
    attention = attending.of_one_token(layout, size, going, context, demand.width)
    computing = added([Cost(multiplying, fetching + moved / bandwidth), attention]).times(1 / layout.engine_gpus)
    return added([computing, between_parts(demand, layout, going), Cost(calls=calls)])


def between_parts(demand: Demand, layout: Layout, tokens: float) -> Cost:
    """What GPUs that share an engine tell each other of so many tokens of a pass: twice in each layer the sum of what
    all of them have, an all-gather and its reverse each."""
    size = demand.policy
    whole = 4.0 * size.layers * tokens * size.hidden * demand.width
    return Cost(network=layout.collective_seconds(whole, layout.engine_gpus, 4 * size.layers))


def gathered_for_a_pass(demand: Demand, layout: Layout) -> tuple[float, float]:
    """Where a layer is gathered at a time, for every pass: bytes of all weights, and the seconds that they take on
    their way, with the vote on whether anybody goes on."""
    size = demand.policy
    weights = size.parameters * float(demand.width)
    vote = layout.collective_seconds(0.0, layout.gpus, 1)
    return weights, layout.collective_seconds(weights, layout.shard, size.layers + 1) + vote
