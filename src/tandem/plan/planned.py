"""A plan: what fits where, and how fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.plan.demand import Demand
from tandem.plan.layout import Layout
from tandem.plan.memory import Memory, memory_of
from tandem.plan.timing import Cost, step_costs

SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Plan:
    """What a joint run takes in a layout."""

    demand: Demand
    layout: Layout
    memory: Memory
    phases: Mapping[str, Cost]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.layout.device.memory_gib * 2**30

    @property
    def seconds(self) -> float:
        """Of one step."""
        return sum(cost.total for cost in self.phases.values())

    @property
    def tokens_per_day(self) -> float:
        """Response tokens that are sampled and learnt from in a day."""
        return self.demand.sequences * self.demand.lengths.mean_response / self.seconds * SECONDS_A_DAY

    def record(self) -> dict[str, Any]:
        """For scripts: bytes and seconds."""
        memory, lengths = self.memory, self.demand.lengths
        return {
            "gpus": self.layout.gpus,
            "device": self.layout.device.name,
            "shard": self.layout.shard,
            "generator": self.layout.generator,
            "activation_checkpointing": self.layout.activation_checkpointing,
            "fits": self.fits,
            "memory": {
                "bytes_there": self.layout.device.memory_gib * 2**30,
                "bytes_needed": memory.peak,
                "fullest_in": memory.peak_phase,
                "components": memory.at_peak,
                "main_memory": dict(memory.main_memory),
            },
            "time": {
                "seconds_a_step": self.seconds,
                "phases": {name: {"seconds": cost.total, "mostly": cost.mostly} for name, cost in self.phases.items()},
                "response_tokens_a_day": self.tokens_per_day,
            },
            "lengths": {"mean_prompt": lengths.mean_prompt, "mean_response": lengths.mean_response},
        }


def planned(demand: Demand, layout: Layout) -> Plan:
    """What the layout takes for the demand, whether or not it fits."""
    return Plan(demand, layout, memory_of(demand, layout), step_costs(demand, layout))
