"""How the GPUs of a run stand together, and who does what on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tandem.config import Gather
from tandem.plan.devices import GPUS_PER_MACHINE, Device

GeneratorCopy = Literal["never", "while sampling", "always"]


@dataclass(frozen=True)
class Workers:
    """Processes of one kind over a cluster: how many, the GPUs that each is given, and what each computes on: one GPU,
    or its share of one."""

    count: int
    gpus: float
    device: Device


@dataclass(frozen=True)
class Cluster:
    """A run over a cluster of so many GPUs: `generators` sample and `scorers` score, `samples_per_task` at a time;
    without scorers the trainers score. `ahead`: the next step's responses are sampled while this step trains."""

    gpus_there: int
    trainer_gpus: float
    generators: Workers
    scorers: Workers
    samples_per_task: int
    ahead: bool


@dataclass(frozen=True)
class Layout:
    """`gpus` processes train, each on a GPU, in machines of eight; `shard` of them hold every model once between them,
    and there are gpus / shard such groups.

    `generator`: `torch` samples on the policy, which is gathered meanwhile where it is cut, as `gather` says; `vllm` is
    sent the weights. `generator_copy`: when weights of the generator's own are held. `cache_gib` is room that is set
    aside for keys and values, if it is. With a `cluster` nothing of that is on the GPUs that train. So many as
    `engine_gpus` share a vLLM engine, each with a part of its weights and of keys and values.
    """

    gpus: int
    device: Device
    shard: int
    activation_checkpointing: bool
    generator: Literal["torch", "vllm"]
    generator_copy: GeneratorCopy
    cache_gib: float | None
    gather: Gather = "auto"
    cluster: Cluster | None = None
    engine_gpus: int = 1

    @property
    def replicas(self) -> int:
        """Groups that each hold every model."""
        return self.gpus // self.shard

    @property
    def gathers_to_sample(self) -> bool:
        """Whether the policy that trains, cut over several GPUs, is gathered from them to sample: whole or by layer."""
        return self.shard > 1 and self.generator_copy == "never" and self.cluster is None

    @property
    def gpus_asked_for(self) -> int:
        """GPUs of all processes together."""
        cluster = self.cluster
        if cluster is None:
            return self.gpus
        workers = [(pool.gpus, pool.count) for pool in (cluster.generators, cluster.scorers)]
        return _packed([gpus for gpus, count in [(cluster.trainer_gpus, self.gpus), *workers] for _ in range(count)])

    @property
    def gpus_spare(self) -> int:
        """GPUs that nobody is given; negative where there are too few."""
        return 0 if self.cluster is None else self.cluster.gpus_there - self.gpus_asked_for

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


def _packed(asked: Sequence[float]) -> int:
    """GPUs that it takes where a process has whole ones or a share of one, and shares fill a GPU as far as they fit."""
    whole = sum(int(gpus) for gpus in asked if gpus >= 1)
    left: list[float] = []
    for share in sorted((gpus for gpus in asked if 0 < gpus < 1), reverse=True):
        place = next((number for number, room in enumerate(left) if room >= share - 1e-9), None)
        if place is None:
            left.append(1.0 - share)
        else:
            left[place] -= share
    return whole + len(left)
