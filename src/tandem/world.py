"""The processes that train together: which one this is, and the few things that they say to each other.

All of them run the same program on the same data in the same order. A minibatch is the same for all of them; each
passes its own share of the rows through the models, and sums and counts are added up over all. With one process every
method here does nothing.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tandem.errors import RunError
from tandem.types import split_by_tokens

RENDEZVOUS = "TANDEM_RENDEZVOUS"
_PATIENCE = timedelta(hours=2)
Part = TypeVar("Part")
Found = TypeVar("Found")


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`; weights are cut into size / replicate parts, and each part is kept `replicate` times.

    `checkpointing`: activations are computed again in the backward pass, a layer at a time. `group` is the one in which
    they talk; None is the one that they met in.
    """

    rank: int = 0
    size: int = 1
    replicate: int = 1
    checkpointing: bool = False
    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this is the one process that writes and speaks."""
        return self.rank == 0

    def apart(self) -> World:
        """The same processes, for a second thread: what is said there does not mix with what is said here.

        All of them must ask for it at the same point.
        """
        return self if self.alone else replace(self, group=dist.new_group(backend="gloo", timeout=_PATIENCE))

    def deal(self, lengths: Tensor, tokens_per_microbatch: int) -> Iterator[tuple[Tensor, float]]:
        """This process's micro-batches of rows with these lengths [B]: rows, and the weight 1.

        All processes pass through a sharded model equally often, since its layers are gathered from all of them. One
        that has fewer micro-batches than another goes along with a row of someone else's, of weight 0.
        """
        order = torch.argsort(lengths, descending=True, stable=True)
        shares = [order] if self.alone else [order[self._places(rank, len(order))] for rank in range(self.size)]
        groups = [[share[rows] for rows in split_by_tokens(lengths[share], tokens_per_microbatch)] for share in shares]
        return self.in_step(groups, order[-1:])

    def _places(self, rank: int, count: int) -> Tensor:
        """A process's places in an order from the longest to the shortest, there and back, so that all get as much."""
        places = torch.arange(count)
        turn, place = places // self.size, places % self.size
        return places[torch.where(turn % 2 == 0, place, self.size - 1 - place) == rank]

    def in_order(self, items: Sequence[Part]) -> list[Sequence[Part]]:
        """Each process's items: as many for each, side by side."""
        return dealt_in_order(items, self.size)

    def in_step(self, shares: Sequence[Sequence[Part]], idle: Part) -> Iterator[tuple[Part, float]]:
        """This process's own parts, weight 1, then the idle one, weight 0, until all have had as many."""
        own = shares[self.rank]
        for part in own:
            yield part, 1.0
        for _ in range(max(len(share) for share in shares) - len(own)):
            yield idle, 0.0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, the same for all, in the place of the tensor."""
        if not self.alone:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, part: Found) -> list[Found]:
        """What every process has, by rank."""
        if self.alone:
            return [part]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, part, group=self.group)
        return parts

    def any(self, flag: bool) -> bool:
        """Whether it is so for any process."""
        return any(self.gather(flag))

    def from_first(self, make: Callable[[], Found]) -> Found:
        """What the first process makes, for all; what it raises is raised by all."""
        if self.alone:
            return make()
        told: list[Any] = [None]
        if self.first:
            try:
                told = [(make(), None)]
            except Exception as error:
                told = [(None, _told(error))]
        dist.broadcast_object_list(told, src=0, group=self.group)
        made, fault = told[0]
        if fault is not None:
            raise fault
        return made

    def each(self, make: Callable[[], Found]) -> Found:
        """What this process makes; what any of them raises is raised by all, the lowest rank's first."""
        if self.alone:
            return make()
        fault: Exception | None = None
        try:
            made = make()
        except Exception as error:
            fault = _told(error)
        for told in self.gather(fault):
            if told is not None:
                raise told
        return made

    def wait_for_all(self) -> None:
        """Until every process has come here."""
        if not self.alone:
            dist.barrier(group=self.group)


def dealt_in_order(items: Sequence[Part], count: int) -> list[Sequence[Part]]:
    """Items dealt to so many: as many for each, side by side."""
    cuts = [len(items) * number // count for number in range(count + 1)]
    return [items[start:end] for start, end in pairwise(cuts)]


def _told(error: Exception) -> Exception:
    """An error as others can be told of it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RunError(f"{type(error).__name__}: {error}")
    return error


_world = World()


def world() -> World:
    """The processes that this one trains with; itself alone, unless `join` was called."""
    return _world


def worker() -> bool:
    """Whether this process was started as one of several, by `tandem ... --processes N` or by torchrun."""
    return world_size() > 1


def world_size() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of several processes this one is."""
    return int(os.environ.get("RANK", "0")) if worker() else 0


def join(device: str, replicate: int, checkpointing: bool) -> World:
    """Meet the processes that this one was started with. `device` is what models compute on, cpu or cuda."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    shared_file = os.environ.get(RENDEZVOUS)
    place = f"file://{shared_file}" if shared_file else "env://"
    return _meet(device, replicate, checkpointing, rank=rank(), world_size=world_size(), init_method=place)


def join_at(store: dist.Store, number: int, size: int, device: str, replicate: int, checkpointing: bool) -> World:
    """Meet others at a store, as process `number` of `size`, each on the first of the GPUs that it was given."""
    if device == "cuda":
        torch.cuda.set_device(0)
    return _meet(device, replicate, checkpointing, rank=number, world_size=size, store=store)


def _meet(device: str, replicate: int, checkpointing: bool, **place: Any) -> World:
    global _world
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=_PATIENCE, **place)
    size = dist.get_world_size()
    mesh = (
        init_device_mesh(device, (size,), mesh_dim_names=("fsdp",))
        if replicate == 1
        else init_device_mesh(device, (replicate, size // replicate), mesh_dim_names=("replicate", "fsdp"))
    )
    _world = World(dist.get_rank(), size, replicate, checkpointing, mesh)
    return _world


def settle(checkpointing: bool) -> None:
    """Train in this process alone."""
    global _world
    _world = World(checkpointing=checkpointing)


def speaks_for_all() -> bool:
    """Whether this process is the one to say why all of them end: the first of them to ask."""
    if not worker():
        return True
    if not dist.is_initialized():
        return rank() == 0
    try:
        return bool(dist.distributed_c10d._get_default_store().add("told", 1) == 1)
    except Exception:
        return False


def leave() -> None:
    """Part from the other processes. Groups that a library has made for a process alone stay its own to end."""
    global _world
    met, _world = not _world.alone, World()
    if met and dist.is_initialized():
        dist.destroy_process_group()


def end(status: int) -> NoReturn:
    """End this process, with all done and written.

    One of several does so without taking down the interpreter: threads of torch's process groups abort it there now and
    then ("terminate called without an active exception"), which would make a failed run of a finished one.
    """
    if not worker():
        raise SystemExit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
