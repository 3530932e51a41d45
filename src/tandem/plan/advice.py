"""Which lines of a recipe to change where it does not fit, or could be faster; every piece of advice has been tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tandem.plan.demand import Demand
from tandem.plan.layout import Cluster, Layout, Workers
from tandem.plan.memory import samples_by_layer
from tandem.plan.planned import Plan, planned

# A line is worth saying where it makes a step so many times as fast.
WORTH_SAYING = 1.1
# Numbers of trainers that are tried, at most.
SPLITS = 64


@dataclass(frozen=True)
class Change:
    """Lines of a recipe, and what is to be done where as they say it."""

    lines: Sequence[str]
    demand: Demand
    layout: Layout

    @cached_property
    def plan(self) -> Plan:
        return planned(self.demand, self.layout)


@dataclass(frozen=True)
class Faster:
    """Lines that together make a step so many times as fast."""

    lines: Sequence[str]
    times: float

    def record(self) -> dict[str, Any]:
        return {"lines": list(self.lines), "times": self.times}


def what_would_fit(demand: Demand, layout: Layout) -> list[str]:
    """Lines of the recipe that together make it fit; none where no line does.

    One change alone is looked for first, from what costs least to what changes what is trained; then one upon the
    other; last, to do without a cluster.
    """
    alone = (change for change in _smaller(demand, layout) if change.plan.fits)
    without = (change for change in _without_cluster(demand, layout) if change.plan.fits)
    if (change := next(alone, None)) is not None:
        return list(change.lines)
    if together := _one_upon_the_other(demand, layout):
        return together
    return next((list(change.lines) for change in without), [])


def _one_upon_the_other(demand: Demand, layout: Layout) -> list[str]:
    said: dict[str, str] = {}
    lacking = planned(demand, layout).lacking
    while lacking != (0, 0.0):
        better = next((change for change in _smaller(demand, layout) if change.plan.lacking < lacking), None)
        if better is None:
            return []
        said |= _by_key(better.lines)
        demand, layout, lacking = better.demand, better.layout, better.plan.lacking
    return list(said.values())


def what_would_be_faster(plan: Plan) -> Faster | None:
    """Lines that change who samples, and how much at a time, each the best that there is after those before it."""
    said: dict[str, str] = {}
    best = plan
    while True:
        fitting = [change for change in _quicker(best.demand, best.layout) if change.plan.fits]
        change = max(fitting, key=lambda change: change.plan.tokens_per_day, default=None)
        if change is None or change.plan.tokens_per_day < WORTH_SAYING * best.tokens_per_day:
            break
        said |= _by_key(change.lines)
        best = change.plan
    return Faster(list(said.values()), best.tokens_per_day / plan.tokens_per_day) if said else None


def _by_key(lines: Sequence[str]) -> dict[str, str]:
    return {line.partition(" = ")[0]: line for line in lines}


def _smaller(demand: Demand, layout: Layout) -> Iterator[Change]:
    """The changes that there are, mildest first: up to the precision, none changes what is computed."""
    tokens = demand.tokens_per_microbatch
    while tokens // 2 >= demand.lengths.longest:
        tokens //= 2
        line = f"compute.tokens_per_microbatch = {tokens}"
        yield Change([line], replace(demand, tokens_per_microbatch=tokens), layout)
    if layout.cluster is not None:
        yield from _smaller_cluster(demand, layout, layout.cluster)
    else:
        yield from _fewer_rows(demand, layout)
        if layout.gpus > 1 and layout.generator == "torch" and not samples_by_layer(demand, layout):
            yield Change(['rollout.gather = "layer"'], demand, replace(layout, gather="layer"))
    if layout.cache_gib is not None and layout.cache_gib > 1:
        yield Change(["rollout.vllm.kv_cache_gib = 1.0"], demand, replace(layout, cache_gib=1.0))
    if not layout.activation_checkpointing:
        checkpointing = replace(layout, activation_checkpointing=True)
        yield Change(["parallel.activation_checkpointing = true"], demand, checkpointing)
    if demand.keeps_state and demand.spare_copy:
        yield Change(["checkpoints.spare_copy = false"], replace(demand, spare_copy=False), layout)
    if demand.width == 4:
        yield Change(['compute.precision = "bfloat16"'], replace(demand, width=2, recompute=True), layout)
    if demand.mode == "separate":
        line = 'sharing.mode = "adapters" (with value.start = "policy")'
        yield Change([line], replace(demand, mode="adapters", value=None, rank=16), layout)
    if demand.mode == "adapters":
        layers = demand.upper_layers or demand.policy.layers
        while layers > 1:
            layers //= 2
            yield Change([f"adapters.upper_layers = {layers}"], replace(demand, upper_layers=layers), layout)


def _fewer_rows(demand: Demand, layout: Layout) -> Iterator[Change]:
    rows = demand.sequences_per_batch
    while rows > 1 and layout.cache_gib is None:
        rows //= 2
        yield Change([f"rollout.sequences_per_batch = {rows}"], replace(demand, sequences_per_batch=rows), layout)


def _smaller_cluster(demand: Demand, layout: Layout, cluster: Cluster) -> Iterator[Change]:
    """Smaller tasks, and the GPUs that there are dealt out otherwise, as little as it takes."""
    samples = cluster.samples_per_task
    while samples > 1 and layout.cache_gib is None:
        samples //= 2
        smaller = replace(layout, cluster=replace(cluster, samples_per_task=samples))
        yield Change([f"cluster.samples_per_task = {samples}"], demand, smaller)
    yield from sorted(_splits(demand, layout, cluster), key=lambda change: _moved(layout, change.layout))


def _moved(before: Layout, after: Layout) -> float:
    """How much another share of the processes trains."""
    shares = [
        layout.gpus / (layout.gpus + layout.cluster.generators.count)
        for layout in (before, after)
        if layout.cluster is not None
    ]
    return abs(shares[0] - shares[1])


def _without_cluster(demand: Demand, layout: Layout) -> Iterator[Change]:
    """All GPUs train and sample, a layer at a time if need be."""
    cluster = layout.cluster
    if cluster is not None and _can_train(demand, cluster.gpus_there):
        gpus = cluster.gpus_there
        alone = replace(layout, gpus=gpus, shard=gpus, generator="torch", cache_gib=None, gather="auto", cluster=None)
        lines = ["no [cluster] (--cluster none)", f"parallel.processes = {gpus}"]
        lines += ['rollout.generator = "torch"'] * (layout.generator != "torch")
        lines += ["rollout.staleness = 0"] * cluster.ahead
        yield Change(lines, demand, alone)


def _can_train(demand: Demand, processes: int) -> bool:
    """Whether each process would have a row of every minibatch."""
    return processes <= min(demand.policy_minibatch, demand.value_minibatch)


def _quicker(demand: Demand, layout: Layout) -> Iterator[Change]:
    """Changes of who samples and of how many rows decode together; none changes what is computed, but for a staleness
    of 1."""
    cluster = layout.cluster
    if layout.cache_gib is not None:
        for gib in (2.0 * layout.cache_gib, 4.0 * layout.cache_gib, 8.0 * layout.cache_gib):
            yield Change([f"rollout.vllm.kv_cache_gib = {gib}"], demand, replace(layout, cache_gib=gib))
    if cluster is None:
        if samples_by_layer(demand, layout):
            yield Change(['rollout.gather = "model"'], demand, replace(layout, gather="model"))
            yield from generators_of_their_own(demand, layout)
            yield from engines_beside(demand, layout)
        if layout.generator == "torch":
            yield from _more_rows(demand, layout)
        return
    yield from _other_tasks(Change([], demand, layout))
    for change in (*_splits(demand, layout, cluster), *_fewer_generators(demand, layout, cluster)):
        yield change
        yield from _other_tasks(change)
    if not cluster.ahead:
        ahead = replace(layout, cluster=replace(cluster, ahead=True))
        yield Change(["rollout.staleness = 1"], replace(demand, recompute=True), ahead)


def _fewer_generators(demand: Demand, layout: Layout, cluster: Cluster) -> Iterator[Change]:
    """Weights go to the machines of the generators one after another: of many, some may cost more than they do."""
    count = cluster.generators.count
    while count > 1:
        count //= 2
        fewer = replace(cluster, generators=replace(cluster.generators, count=count))
        yield Change([f"cluster.generators = {count}"], demand, replace(layout, cluster=fewer))


def _other_tasks(change: Change) -> Iterator[Change]:
    """After a change, tasks of which every generator takes as many: one, two or more smaller ones; nobody is idle."""
    demand, cluster = change.demand, change.layout.cluster
    assert cluster is not None
    for rounds in (1, 2, 4):
        samples = -(-demand.sequences // (cluster.generators.count * rounds))
        rows = max(samples, demand.sequences_per_batch)
        lines = [*change.lines, f"cluster.samples_per_task = {samples}"]
        lines += [f"rollout.sequences_per_batch = {rows}"] * (rows > demand.sequences_per_batch)
        layout = replace(change.layout, cluster=replace(cluster, samples_per_task=samples))
        if max(cluster.generators.count, cluster.scorers.count) <= -(-demand.sequences // samples):
            yield Change(lines, replace(demand, sequences_per_batch=rows), layout)


def _more_rows(demand: Demand, layout: Layout) -> Iterator[Change]:
    rows, here = demand.sequences_per_batch, -(-demand.sequences // layout.gpus)
    while rows < here:
        rows *= 2
        yield Change([f"rollout.sequences_per_batch = {rows}"], replace(demand, sequences_per_batch=rows), layout)


def _splits(demand: Demand, layout: Layout, cluster: Cluster) -> Iterator[Change]:
    """The GPUs that there are, dealt out between trainers and generators."""
    if layout.replicas > 1 or cluster.trainer_gpus != 1:
        return
    each = cluster.generators.gpus
    both = layout.gpus + cluster.generators.count * each + layout.gpus_spare
    most, tasks = int(both - each), -(-demand.sequences // cluster.samples_per_task)
    for trainers in range(1, most + 1, max(1, most // SPLITS)):
        generators = min(tasks, int((both - trainers) / each + 1e-9))
        if _can_train(demand, trainers) and generators:
            moved = replace(cluster, generators=replace(cluster.generators, count=generators))
            lines = [f"parallel.processes = {trainers}", f"cluster.generators = {generators}"]
            yield Change(lines, demand, replace(layout, gpus=trainers, shard=trainers, cluster=moved))


def engines_beside(demand: Demand, layout: Layout) -> Iterator[Change]:
    """vLLM on the GPUs that train, an engine on each or on several of a machine, which give their memory back."""
    if not layout.device.is_gpu:
        return
    for parts in (1, 2, 4, 8):
        if layout.gpus % parts:
            continue
        rows = max(demand.sequences_per_batch, -(-demand.sequences * parts // layout.gpus))
        for gib in (2.0, 4.0, 8.0, 16.0):
            lines = ['rollout.generator = "vllm"', f"rollout.vllm.kv_cache_gib = {gib}"]
            lines += [f"rollout.vllm.tensor_parallel = {parts}"] * (parts > 1)
            lines += [f"rollout.sequences_per_batch = {rows}"] * (rows > demand.sequences_per_batch)
            lines += ['rollout.gather = "auto"'] * (layout.gather != "auto")
            engines = replace(
                layout,
                generator="vllm",
                generator_copy="while sampling",
                cache_gib=gib,
                gather="auto",
                engine_gpus=parts,
            )
            yield Change(lines, replace(demand, sequences_per_batch=rows, recompute=True), engines)


def generators_of_their_own(demand: Demand, layout: Layout) -> Iterator[Change]:
    """A part of the GPUs each with a copy of the policy, in the place of gathering layers."""
    nobody, gpus = Workers(0, 0.0, layout.device), layout.gpus
    for generators in sorted({gpus // part for part in (2, 3, 4, 8)} - {0}):
        for ahead in (False, True):
            workers = Workers(generators, 1.0, layout.device)
            cluster = Cluster(gpus, 1.0, workers, nobody, samples_per_task=1, ahead=ahead)
            trainers = gpus - generators
            apart = replace(layout, gpus=trainers, shard=trainers, gather="auto", cluster=cluster)
            lines = ['cluster.kind = "ray"', "cluster.trainer_gpus = 1", "cluster.generator_gpus = 1"]
            lines += [f"parallel.processes = {trainers}", f"cluster.generators = {generators}"]
            lines += ['rollout.gather = "auto"'] * (layout.gather != "auto")
            lines += ["rollout.staleness = 1"] * ahead
            if layout.replicas == 1:
                yield from _other_tasks(Change(lines, replace(demand, recompute=demand.recompute or ahead), apart))
