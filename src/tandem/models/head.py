"""A policy's log-probabilities by products with its head whose logits are read while they are made (`head.cpp`).

The same as `tandem.algo.projected_logprobs`, where our operators multiply the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tandem.models import kernels
from tandem.models.kernels import HeadLogits


def head_logprobs(states: Tensor, targets: Tensor, weight: Tensor, rows_per_chunk: int) -> Tensor:
    """log softmax(states weight^T)[target], [N] float32, for states [N, H], a head [V, H] and targets [N] int64.

    Logits of a chunk of rows are all that is ever kept. Raises RuntimeError without `tandem.models.kernels`.
    """

    def of_chunk(part: Tensor, ids: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return kernels.head_logprobs(part, weight, ids, keep=False).logprobs
        found: Tensor
        if weight.requires_grad:
            found = _TrainedHead.apply(part, weight, ids, len(targets) <= rows_per_chunk)
        else:
            found = _FrozenHead.apply(part, weight, ids)
        return found

    chunks = zip(states.split(rows_per_chunk), targets.split(rows_per_chunk), strict=True)
    return torch.cat([of_chunk(part, ids) for part, ids in chunks])


class _FrozenHead(torch.autograd.Function):
    """What a row's state is to receive is known up to a factor, so no logits outlive the forward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        found = kernels.head_logprobs(states, weight, targets, keep=True)
        ones = torch.ones_like(found.logprobs)
        ctx.save_for_backward(kernels.head_states_gradient(found, weight, targets, ones))
        return found.logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (by_state,), (factor,) = ctx.saved_tensors, upstream
        return by_state * factor[:, None].to(by_state.dtype), None, None


class _TrainedHead(torch.autograd.Function):
    """The backward pass needs the chunk's logits: they are held, or made again from the states."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, hold: bool) -> Tensor:
        found = kernels.head_logprobs(states, weight, targets, keep=hold)
        ctx.held = found if hold else None
        ctx.save_for_backward(states, weight, targets)
        return found.logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, targets = ctx.saved_tensors
        found: HeadLogits = ctx.held or kernels.head_logprobs(states, weight, targets, keep=True)
        ctx.held = None
        factor = upstream[0].contiguous()
        of_states = kernels.head_states_gradient(found, weight, targets, factor) if ctx.needs_input_grad[0] else None
        of_weight = kernels.head_weight_gradient(found, states, targets, factor, len(weight))
        return of_states, of_weight, None, None
