"""A parameter as one process holds it: whole, or the part that is its own where it is cut over several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class Part:
    """How a parameter of a shape is laid out; `mesh` is None where every process has it whole."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    mesh: DeviceMesh | None
    placements: Sequence[Any]

    @property
    def cut(self) -> bool:
        return self.mesh is not None

    def own(self, tensor: Tensor) -> Tensor:
        """What of a tensor laid out in this way this process holds, in the same memory."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def of_whole(self, own: Tensor) -> Tensor:
        """This process's part as a part of the whole; a single number is everybody's."""
        if self.mesh is None or own.dim() == 0:
            return own
        return DTensor.from_local(
            own, self.mesh, self.placements, run_check=False, shape=torch.Size(self.shape), stride=self.stride
        )

    def from_whole(self, tensor: Tensor) -> Tensor:
        """This process's part of a whole tensor that every process has; a single number is everybody's."""
        if self.mesh is None or tensor.dim() == 0 or isinstance(tensor, DTensor):
            return self.own(tensor)
        cut = distribute_tensor(tensor.to(self.mesh.device_type), self.mesh, self.placements, src_data_rank=None)
        return self.own(cut)


def part_of(parameter: Tensor) -> Part:
    """How a parameter is laid out."""
    shape, stride = tuple(parameter.shape), tuple(parameter.stride())
    if isinstance(parameter, DTensor):
        return Part(shape, stride, parameter.device_mesh, parameter.placements)
    return Part(shape, stride, None, ())
