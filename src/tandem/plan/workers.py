"""The processes over a cluster that do not train: what each holds, and how long the workers of a kind take together.

A worker is planned as a layout of its own, one GPU whose step is a task.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from tandem.plan.arithmetic import working_bytes
from tandem.plan.cost import Cost, added
from tandem.plan.decoding import rollout
from tandem.plan.demand import Demand
from tandem.plan.devices import GPUS_PER_MACHINE
from tandem.plan.layout import Cluster, Layout, Workers
from tandem.plan.memory import Memory, microbatch_tokens, sampling_bytes, with_reserve
from tandem.plan.model_size import ModelSize
from tandem.plan.passes import through_layers

GENERATORS, SCORERS = "generators", "reward workers"


@dataclass(frozen=True)
class Role:
    """The workers of a kind, and what the fullest of them holds."""

    name: str
    workers: Workers
    memory: Memory

    @property
    def bytes_there(self) -> float:
        return self.workers.device.memory_gib * 2**30


def roles(demand: Demand, layout: Layout) -> Iterator[Role]:
    """Everybody over the cluster but the trainers; nobody where there is none."""
    cluster = layout.cluster
    if cluster is None:
        return
    yield Role(GENERATORS, cluster.generators, _memory_of_generator(demand, layout, cluster))
    if cluster.scorers.count:
        yield Role(SCORERS, cluster.scorers, _memory_of_scorer(demand, cluster))


def sample_seconds(demand: Demand, layout: Layout, cluster: Cluster) -> Cost:
    """All responses of a step, from generators that each take a task after another."""
    task, alone = _task_of_generator(demand, cluster), _generator(layout, cluster)
    return rollout(task, alone).times(_rounds(demand, cluster, cluster.generators))


def score_seconds(demand: Demand, cluster: Cluster) -> Cost:
    """All scores of a step, one reward after another, from workers that each take a task after another."""
    task, samples = _task_of_scorer(demand, cluster), cluster.samples_per_task
    costs = [
        through_layers(task, _alone(cluster.scorers), size, samples, samples, 1.0) for size in _scoring_models(demand)
    ]
    return added([Cost(), *costs]).times(_rounds(demand, cluster, cluster.scorers))


def send_seconds(demand: Demand, layout: Layout) -> Cost:
    """The policy from the trainers to the object store: each weight is gathered, brought to main memory, put there."""
    weights = float(demand.policy.parameters * demand.width)
    gathered = layout.collective_seconds(weights, layout.shard, demand.policy.layers)
    return Cost(network=gathered + 2 * weights / layout.device.host_bandwidth)


def fetch_seconds(demand: Demand, layout: Layout, cluster: Cluster) -> Cost:
    """The policy from the object store to the generators: each of their machines fetches it from the trainers' own,
    one machine after another; each generator copies it, and brings it to its GPU."""
    weights, device = float(demand.policy.parameters * demand.width), layout.device
    machines = math.ceil(cluster.generators.count * cluster.generators.gpus / GPUS_PER_MACHINE)
    apart = machines if layout.gpus_asked_for > GPUS_PER_MACHINE else 0
    return Cost(network=apart * weights / device.ethernet + 2 * weights / device.host_bandwidth)


def _rounds(demand: Demand, cluster: Cluster, workers: Workers) -> int:
    """Tasks that the busiest worker takes."""
    return math.ceil(math.ceil(demand.sequences / cluster.samples_per_task) / workers.count)


def _alone(workers: Workers) -> Layout:
    return Layout(1, workers.device, 1, False, "torch", "never", None)


def _generator(layout: Layout, cluster: Cluster) -> Layout:
    return replace(_alone(cluster.generators), generator=layout.generator, cache_gib=layout.cache_gib)


def _task_of_generator(demand: Demand, cluster: Cluster) -> Demand:
    """A task's prompts, which several of its samples may share; adapters are folded into the weights that are sent."""
    of_a_prompt = min(demand.responses_per_prompt, cluster.samples_per_task)
    prompts = math.ceil(cluster.samples_per_task / of_a_prompt)
    return replace(demand, prompts=prompts, responses_per_prompt=of_a_prompt, rank=None)


def _task_of_scorer(demand: Demand, cluster: Cluster) -> Demand:
    return replace(demand, prompts=cluster.samples_per_task, responses_per_prompt=1)


def _scoring_models(demand: Demand) -> list[ModelSize]:
    """Each by itself: one that is an adapter of the policy has a trunk of its own here."""
    return [*demand.rewards, *[demand.policy] * demand.adapter_rewards]


def _memory_of_generator(demand: Demand, layout: Layout, cluster: Cluster) -> Memory:
    """The whole policy, and what sampling takes; vLLM's engine starts while the policy is there that it is made for."""
    whole = float(demand.policy.parameters * demand.width)
    staying = {"generator's weights": whole, "libraries": cluster.generators.device.runtime_gib * 2**30}
    sampling = sampling_bytes(_task_of_generator(demand, cluster), _generator(layout, cluster))
    phases: dict[str, Mapping[str, float]] = {"rollout": with_reserve(sampling, cluster.generators.device)}
    if layout.cache_gib is not None:
        phases["start"] = {"policy as it was loaded": whole, "keys and values": layout.cache_gib * 2**30}
    return Memory(staying, phases, {})


def _memory_of_scorer(demand: Demand, cluster: Cluster) -> Memory:
    """All reward models whole, and a micro-batch on its way through the largest."""
    device, models = cluster.scorers.device, _scoring_models(demand)
    held = float(sum(size.scalar_parameters for size in models) * demand.width)
    tokens = microbatch_tokens(_task_of_scorer(demand, cluster), cluster.samples_per_task, _alone(cluster.scorers))
    working = max((tokens * working_bytes(size, demand.width) for size in models), default=0.0)
    staying = {"reward models": held, "libraries": device.runtime_gib * 2**30}
    return Memory(staying, {"score": with_reserve({"working set": working}, device)}, {})
