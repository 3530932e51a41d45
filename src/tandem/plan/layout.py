"""How the GPUs of a run stand together, and what generates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tandem.plan.devices import GPUS_PER_MACHINE, Device


@dataclass(frozen=True)
class Layout:
    """`gpus` of one kind, in machines of eight; `shard` of them hold every model once between them, and there are
    gpus / shard such groups.

    `generator`: `torch` samples on the policy, which is gathered whole meanwhile where it is cut; `vllm` is sent the
    weights. `generator_copy`: when weights of the generator's own are held. `cache_gib` is room that is set aside for
    keys and values, if it is.
    """

    gpus: int
    device: Device
    shard: int
    activation_checkpointing: bool
    generator: Literal["torch", "vllm"]
    generator_copy: Literal["never", "while sampling", "always"]
    cache_gib: float | None

    @property
    def replicas(self) -> int:
        """Groups that each hold every model."""
        return self.gpus // self.shard

    def collective_seconds(self, bytes_whole: float, members: int, calls: int) -> float:
        """An all-gather that ends with `bytes_whole` on each of `members` GPUs, or the reduce-scatter that undoes it,
        in so many calls.

        Within a machine every GPU receives what it lacks over its link; between machines every machine receives what
        it lacks over the network of all its GPUs together, and the slower of the two sets the pace.
        """
        if members == 1:
            return 0.0
        device, machines = self.device, math.ceil(members / GPUS_PER_MACHINE)
        local = min(members, GPUS_PER_MACHINE)
        inside = bytes_whole * (local - 1) / local / (device.link * device.link_share)
        across = bytes_whole * (machines - 1) / machines / (local * device.network * device.link_share)
        return max(inside, across) + calls * device.hop_seconds * (1 + math.log2(machines))
