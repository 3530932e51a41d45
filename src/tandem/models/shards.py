"""A model whose weights are cut over several processes (FSDP2), a layer gathered at a time when it is needed.

The gradient that each process makes is summed over all and cut in the same way; nothing is averaged, since losses are
divided by the count of the whole minibatch before. See docs/decisions/0012-several-processes.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tandem.world import World


class Whole(nn.Module):
    """A model as a unit of work: what runs within its forward finds the weights outside of the layers gathered.

    Without it only calls of the model's own forward would, and decoder and head are called one by one here.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def shard(model: nn.Module, layers: Iterable[nn.Module], world: World) -> Whole:
    """Cut a model's weights over the processes, in place: each layer by itself, and what is outside of them together.

    Gradients are added up in float32 whatever the weights are kept in.
    """
    whole = Whole(model)
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in [*layers, whole]:
        fully_shard(module, mesh=world.mesh, reshard_after_forward=True, mp_policy=precision)
    for unit in _units(whole):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    return whole


@contextmanager
def gathered(whole: Whole) -> Iterator[None]:
    """Within it every process holds all of the model's weights, so that passes need not go in step."""
    units = _units(whole)
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


def _units(whole: Whole) -> list[FSDPModule]:
    return [module for module in whole.modules() if isinstance(module, FSDPModule)]


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where it is cut over processes: all of them must ask for it then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Where in the whole tensor the part of it lies that this process holds."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, length) for length in tensor.shape)
    lengths, starts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + length) for start, length in zip(starts, lengths, strict=True))


def like(tensor: Tensor, own: Tensor) -> Tensor:
    """This process's own part, laid out over the processes as the tensor is."""
    if not isinstance(tensor, DTensor):
        return own
    return DTensor.from_local(
        own, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
