"""Log-probabilities of tokens from hidden states, without ever holding all their logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from tandem.algo.logits import Found, Passes, Upstream

LogitsOf = Callable[[Tensor, Tensor], Tensor]
Read = tuple[Tensor, Tensor | None]
AS_WRITTEN = Passes()


def projected_logprobs(
    states: Tensor,
    targets: Tensor,
    logits_of: LogitsOf,
    rows_per_chunk: int,
    *,
    with_entropy: bool = False,
    head_trains: bool = True,
    passes: Passes = AS_WRITTEN,
) -> Read:
    """log softmax(logits_of(states, targets))[target], and each whole distribution's entropy in nats if asked for.

    states [N, H], targets [N] int64 -> [N] float32 each. `logits_of` maps [n, H] and [n] to logits [n, V], each row
    from its own state; parameters inside it receive gradients where `head_trains`. Rows go a chunk at a time, each by
    the way that makes its backward pass cheapest: what exists of the size [n, V] at one time is a few copies of one
    chunk, whatever N is. `passes` says how they are read.
    """

    def of_chunk(part: Tensor, ids: Tensor) -> Read:
        if not torch.is_grad_enabled():
            found = passes.read(logits_of(part, ids), ids, with_entropy=with_entropy)
            return found.logprobs, found.entropies
        read: Read
        if head_trains:
            hold = len(targets) <= rows_per_chunk
            read = _TrainedHead.apply(part, ids, logits_of, passes, with_entropy, hold)
        else:
            read = _FrozenHead.apply(part, ids, logits_of, passes, with_entropy)
        return read

    chunks = zip(states.split(rows_per_chunk), targets.split(rows_per_chunk), strict=True)
    logprobs, entropies = zip(*(of_chunk(part, ids) for part, ids in chunks), strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


class _FrozenHead(torch.autograd.Function):
    """Under a head that does not train, what a row's state is to receive is known up to a factor: it is made at once.

    So nothing of the size of the vocabulary outlives the forward pass, and logits are made once.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, logits_of: LogitsOf, passes: Passes, with_entropy: bool
    ) -> Read:
        with torch.enable_grad():
            leaf = states.detach().requires_grad_()
            logits = logits_of(leaf, targets)
            of_logits, z = get_gradient_edge(logits), logits.detach()
        found = passes.read(z, targets, with_entropy=with_entropy)
        ones = torch.ones_like(found.logprobs)
        by_state = []
        if with_entropy:
            slope = passes.slope(z.clone(), targets, found, Upstream(None, ones))
            by_state.append(torch.autograd.grad(of_logits, leaf, slope, retain_graph=True)[0])
        slope = passes.slope(z, targets, found, Upstream(ones, None))
        by_state.insert(0, torch.autograd.grad(of_logits, leaf, slope)[0])
        ctx.save_for_backward(*by_state)
        return found.logprobs, found.entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [
            by_state * factor[:, None].to(by_state.dtype)
            for by_state, factor in zip(ctx.saved_tensors, upstream, strict=False)
            if factor is not None
        ]
        return sum(given[1:], given[0]), None, None, None, None


class _TrainedHead(torch.autograd.Function):
    """The backward pass needs the chunk's logits: they are held, or made again from the states."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, logits_of: LogitsOf, passes: Passes, with_entropy: bool, hold: bool
    ) -> Read:
        with torch.set_grad_enabled(hold):
            leaf = states.detach().requires_grad_(states.requires_grad)
            logits = logits_of(leaf, targets)
        if hold:
            ctx.leaf, ctx.of_logits = leaf, get_gradient_edge(logits)
        found = passes.read(logits.detach(), targets, with_entropy=with_entropy)
        ctx.logits_of, ctx.passes, ctx.held = logits_of, passes, logits.detach() if hold else None
        ctx.save_for_backward(states, targets, *found)
        return found.logprobs, found.entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """The logits held become their own gradient, so a second pass makes its own."""
        states, targets, *found = ctx.saved_tensors
        z, ctx.held = ctx.held, None
        if z is not None:
            leaf, of_logits = ctx.leaf, ctx.of_logits
        else:
            with torch.enable_grad():
                leaf = states.detach().requires_grad_(states.requires_grad)
                of_logits = ctx.logits_of(leaf, targets)
            z = of_logits.detach()
        slope = ctx.passes.slope(z, targets, Found(*found), Upstream(*upstream))
        torch.autograd.backward(of_logits, slope)
        return leaf.grad, None, None, None, None, None
