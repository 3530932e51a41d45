"""Which line of a recipe to change where it does not fit; every piece of advice has been tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tandem.plan.demand import Demand
from tandem.plan.layout import Layout
from tandem.plan.memory import memory_of

Change = tuple[str, Demand, Layout]


def what_would_fit(demand: Demand, layout: Layout) -> list[str]:
    """Lines of the recipe that together make it fit; none where no line does.

    One alone is looked for first, from what costs least to what changes what is trained; then one upon the other.
    """
    for line, smaller, otherwise in _changes(demand, layout):
        if _spare(smaller, otherwise) >= 0:
            return [line]
    lines: dict[str, str] = {}
    while _spare(demand, layout) < 0:
        changes = [change for change in _changes(demand, layout) if _spare(*change[1:]) > _spare(demand, layout)]
        if not changes:
            return []
        line, demand, layout = changes[0]
        lines[line.partition(" = ")[0]] = line
    return list(lines.values())


def _spare(demand: Demand, layout: Layout) -> float:
    """Bytes that are left, negative where it does not fit."""
    return layout.device.memory_gib * 2**30 - memory_of(demand, layout).peak


def _changes(demand: Demand, layout: Layout) -> Iterator[Change]:
    """The changes that there are, mildest first: up to the precision, none changes what is computed."""
    tokens = demand.tokens_per_microbatch
    while tokens // 2 >= demand.lengths.longest:
        tokens //= 2
        yield f"compute.tokens_per_microbatch = {tokens}", replace(demand, tokens_per_microbatch=tokens), layout
    rows = demand.sequences_per_batch
    while rows > 1 and layout.cache_gib is None:
        rows //= 2
        yield f"rollout.sequences_per_batch = {rows}", replace(demand, sequences_per_batch=rows), layout
    if not layout.activation_checkpointing:
        yield "parallel.activation_checkpointing = true", demand, replace(layout, activation_checkpointing=True)
    if demand.keeps_state and demand.spare_copy:
        yield "checkpoints.spare_copy = false", replace(demand, spare_copy=False), layout
    if demand.width == 4:
        yield 'compute.precision = "bfloat16"', replace(demand, width=2, recompute=True), layout
    if demand.mode == "separate":
        line = 'sharing.mode = "adapters" (with value.start = "policy")'
        yield line, replace(demand, mode="adapters", value=None, rank=16), layout
    if demand.mode == "adapters":
        layers = demand.upper_layers or demand.policy.layers
        while layers > 1:
            layers //= 2
            yield f"adapters.upper_layers = {layers}", replace(demand, upper_layers=layers), layout
