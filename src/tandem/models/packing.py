"""Matrices laid out for a CPU's matrix units while tokens are sampled one by one.

A product of few rows in bfloat16 spends as long on bringing the matrix into the order that the units read as on
multiplying. In sampling the same matrices are met at every token, so it is done once for a batch of responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tandem.models import kernels

_ROWS = 64
"""For about how many rows the layout is chosen; any number can be multiplied."""


@contextmanager
def packed(model: nn.Module, by_kernels: bool = False) -> Iterator[None]:
    """Within it every matrix of a bfloat16 model on a CPU is multiplied from a laid out copy.

    `by_kernels` is for a process that has loaded `tandem.models.kernels`, whose product serves where it can. The
    copies take the memory of the weights once more, and weights that change within it are not seen. Within another it
    does nothing.
    """
    with ExitStack() as until_the_end:
        for layer in model.modules():
            if type(layer) is nn.Linear and "forward" not in vars(layer) and _can_be_packed(layer.weight):
                own = by_kernels and kernels.multiplies(layer.weight)
                product = kernels.packed_product(layer) if own else _from_packed(layer)
                until_the_end.enter_context(_computing(layer, product))
        yield


def _can_be_packed(weight: Tensor) -> bool:
    units = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return units and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.no_grad()
def _from_packed(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The layer's product, from a copy of its weights as oneDNN wants them: what torch's own compiler calls for it."""
    laid_out, bias = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS), layer.bias

    def multiplied(rows: Tensor) -> Tensor:
        return torch.ops.tandem.multiply_packed(rows, laid_out, bias)

    return multiplied


_OPERATORS = torch.library.Library("tandem", "DEF")
_OPERATORS.define("multiply_packed(Tensor rows, Tensor laid_out, Tensor? bias) -> Tensor")


@torch.library.impl(_OPERATORS, "multiply_packed", "CompositeExplicitAutograd")
def _multiply_packed(rows: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    """As an operator of its own, since compiled code takes oneDNN's from constants alone."""
    return torch.ops.mkldnn._linear_pointwise.default(rows, laid_out, bias, "none", [], "")


@torch.library.register_fake("tandem::multiply_packed")
def _shape_of_product(rows: Tensor, laid_out: Tensor, _: Tensor | None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], laid_out.shape[0])


@contextmanager
def _computing(layer: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
