"""A plan: what fits where, how fast, and who is waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.plan.cost import Cost
from tandem.plan.decoding import gathered_for_a_pass, rollout
from tandem.plan.demand import Demand
from tandem.plan.layout import Cluster, Layout
from tandem.plan.memory import Memory, memory_of, samples_by_layer, shares_below
from tandem.plan.timing import evaluate, read_below, score, update
from tandem.plan.workers import (
    GENERATORS,
    SCORERS,
    Role,
    fetch_seconds,
    roles,
    sample_seconds,
    score_seconds,
    send_seconds,
)

SECONDS_A_DAY = 86_400
TRAINERS = "trainers"


@dataclass(frozen=True)
class Plan:
    """What a joint run takes in a layout: the memory of a GPU that trains and of the other processes over a cluster,
    and the time of each phase of a step, with who does it."""

    demand: Demand
    layout: Layout
    memory: Memory
    roles: Sequence[Role]
    phases: Mapping[str, Cost]
    who: Mapping[str, str]

    @property
    def fits(self) -> bool:
        return self.lacking == (0, 0.0)

    @property
    def lacking(self) -> tuple[int, float]:
        """GPUs that are too few, and bytes, added up over the kinds of process that need more than their GPU has."""
        left = [self.layout.device.memory_gib * 2**30 - self.memory.peak]
        left += [role.bytes_there - role.memory.peak for role in self.roles]
        return max(0, -self.layout.gpus_spare), -sum(min(0.0, spare) for spare in left)

    @property
    def seconds(self) -> float:
        """Of one step. Where responses are sampled ahead, the weights are sent first; then the generators and all
        others work at the same time."""
        cluster = self.layout.cluster
        if cluster is None or not cluster.ahead:
            return sum(cost.total for cost in self.phases.values())
        sent = self.phases["send weights"].total
        generators = self.busy(GENERATORS)
        others = sum(cost.total for cost in self.phases.values()) - generators - sent
        return sent + max(generators, others)

    def busy(self, name: str) -> float:
        """Seconds of a step in which those of this name work."""
        return sum(cost.total for phase, cost in self.phases.items() if self.who[phase] == name)

    @property
    def slowest(self) -> str:
        """Who works for the largest part of a step."""
        return max(dict.fromkeys(self.who.values()), key=self.busy)

    @property
    def tokens_per_day(self) -> float:
        """Response tokens that are sampled and learnt from in a day."""
        return self.demand.sequences * self.demand.lengths.mean_response / self.seconds * SECONDS_A_DAY

    @property
    def by_layer(self) -> tuple[float, float] | None:
        """Bytes of weights that every GPU is sent for each token where the policy is gathered a layer at a time to
        sample, and the seconds of that; None where it is not."""
        return gathered_for_a_pass(self.demand, self.layout) if samples_by_layer(self.demand, self.layout) else None

    def record(self) -> dict[str, Any]:
        """For scripts: bytes and seconds."""
        memory, lengths, by_layer = self.memory, self.demand.lengths, self.by_layer
        return {
            "gpus": self.layout.gpus_asked_for,
            "device": self.layout.device.name,
            "shard": self.layout.shard,
            "generator": self.layout.generator,
            "activation_checkpointing": self.layout.activation_checkpointing,
            "fits": self.fits,
            "memory": {
                **_bytes(memory, self.layout.device.memory_gib * 2**30),
                "main_memory": dict(memory.main_memory),
            },
            "time": {
                "seconds_a_step": self.seconds,
                "phases": {
                    name: {"seconds": cost.total, "mostly": cost.mostly, "who": self.who[name]}
                    for name, cost in self.phases.items()
                },
                "response_tokens_a_day": self.tokens_per_day,
            },
            "gathered_for_each_token": None if by_layer is None else {"bytes": by_layer[0], "seconds": by_layer[1]},
            "cluster": self._cluster_record(),
            "lengths": {"mean_prompt": lengths.mean_prompt, "mean_response": lengths.mean_response},
        }

    def _cluster_record(self) -> dict[str, Any] | None:
        cluster = self.layout.cluster
        if cluster is None:
            return None
        trainers = {"processes": self.layout.gpus, "gpus_each": cluster.trainer_gpus, "busy": self.busy(TRAINERS)}
        others = {
            role.name: {
                "processes": role.workers.count,
                "gpus_each": role.workers.gpus,
                "busy": self.busy(role.name),
                "memory": _bytes(role.memory, role.bytes_there),
            }
            for role in self.roles
        }
        return {"ahead": cluster.ahead, "slowest": self.slowest, "roles": {TRAINERS: trainers, **others}}


def _bytes(memory: Memory, there: float) -> dict[str, Any]:
    return {
        "bytes_there": there,
        "bytes_needed": memory.peak,
        "fullest_in": memory.peak_phase,
        "components": memory.at_peak,
    }


def planned(demand: Demand, layout: Layout) -> Plan:
    """What the layout takes for the demand, whether or not it fits."""
    phases = _phases(demand, layout)
    costs, who = {name: cost for name, (_, cost) in phases.items()}, {name: by for name, (by, _) in phases.items()}
    return Plan(demand, layout, memory_of(demand, layout), list(roles(demand, layout)), costs, who)


def _phases(demand: Demand, layout: Layout) -> dict[str, tuple[str, Cost]]:
    """Each phase of a joint step: who does it, and how long the one that has the most to do takes."""
    learning = {"evaluate": (TRAINERS, evaluate(demand, layout)), "update": (TRAINERS, update(demand, layout))}
    cluster = layout.cluster
    if cluster is not None:
        return _before_learning(demand, layout, cluster) | learning
    phases = {"rollout": (TRAINERS, rollout(demand, layout)), "score": (TRAINERS, score(demand, layout)), **learning}
    if layout.generator == "vllm":
        weights = float(demand.policy.parameters * demand.width)
        network = layout.collective_seconds(weights, layout.shard, demand.policy.layers + 1)
        phases["weight sync"] = (TRAINERS, Cost(memory=2 * weights / layout.device.reached_bandwidth, network=network))
    return phases


def _before_learning(demand: Demand, layout: Layout, cluster: Cluster) -> dict[str, tuple[str, Cost]]:
    phases = {
        "send weights": (TRAINERS, send_seconds(demand, layout)),
        "fetch weights": (GENERATORS, fetch_seconds(demand, layout, cluster)),
        "rollout": (GENERATORS, sample_seconds(demand, layout, cluster)),
    }
    if not cluster.scorers.count:
        return {**phases, "score": (TRAINERS, score(demand, layout))}
    phases["score"] = (SCORERS, score_seconds(demand, cluster))
    if shares_below(demand, layout):
        phases["lower layers"] = (TRAINERS, read_below(demand, layout))
    return phases
