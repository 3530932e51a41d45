"""Which line of a recipe to change where it does not fit; every piece of advice has been tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tandem.plan.demand import Demand
from tandem.plan.layout import Layout
from tandem.plan.memory import memory_of

Change = tuple[str, Demand]


def what_would_fit(demand: Demand, layout: Layout) -> list[str]:
    """Lines of the recipe that together make it fit, the fewest and mildest that do; none where no line does.

    Tried one by one first, from what costs least to what changes what is trained; then one upon the other.
    """
    for line, changed in _changes(demand):
        if _fits(changed, layout):
            return [line]
    lines: dict[str, str] = {}
    while not _fits(demand, layout):
        smaller = [
            change for change in _changes(demand) if memory_of(change[1], layout).peak < memory_of(demand, layout).peak
        ]
        if not smaller:
            return []
        line, demand = smaller[0]
        lines[line.partition(" = ")[0]] = line
    return list(lines.values())


def _fits(demand: Demand, layout: Layout) -> bool:
    return memory_of(demand, layout).peak <= layout.device.memory_gib * 2**30


def _changes(demand: Demand) -> Iterator[Change]:
    """The changes that there are, mildest first; none of the first three changes what is computed."""
    tokens = demand.tokens_per_microbatch
    while tokens // 2 >= demand.lengths.longest:
        tokens //= 2
        yield f"compute.tokens_per_microbatch = {tokens}", replace(demand, tokens_per_microbatch=tokens)
    rows = demand.sequences_per_batch
    while rows > 1:
        rows //= 2
        yield f"rollout.sequences_per_batch = {rows}", replace(demand, sequences_per_batch=rows)
    if demand.keeps_state and demand.spare_copy:
        yield "checkpoints.spare_copy = false", replace(demand, spare_copy=False)
    if demand.width == 4:
        yield 'compute.precision = "bfloat16"', replace(demand, width=2, recompute=True)
    if demand.mode != "adapters":
        line = 'sharing.mode = "adapters" (with value.start = "policy", or a reward model that is an adapter)'
        yield line, replace(demand, mode="adapters", value=None, rank=demand.rank or 16)
    if demand.mode == "adapters":
        layers = demand.upper_layers or demand.policy.layers
        while layers > 1:
            layers //= 2
            yield f"adapters.upper_layers = {layers}", replace(demand, upper_layers=layers)
