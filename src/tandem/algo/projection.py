"""Log-probabilities of tokens from hidden states, without ever holding all their logits.

For a row with logits z, p = softmax(z) and entropy H = -sum p log p:

    d log p[target] / dz = onehot(target) - p        dH / dz = -p (log p + H)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

LogitsOf = Callable[[Tensor, Tensor], Tensor]
Found = tuple[Tensor, Tensor | None]


def projected_logprobs(
    states: Tensor, targets: Tensor, logits_of: LogitsOf, rows_per_chunk: int, *, head_trains: bool = True
) -> Tensor:
    """log softmax(logits_of(states, targets))[target], a chunk of rows at a time.

    states [N, H], targets [N] int64 -> [N] float32. `logits_of` maps [n, H] and [n] to logits [n, V], each row from
    its own state; parameters inside it receive gradients where `head_trains`. What exists of the size [n, V] at one
    time is a few copies of one chunk, whatever N is.
    """
    return _in_chunks(states, targets, logits_of, rows_per_chunk, head_trains, with_entropy=False)[0]


def projected_logprobs_and_entropies(
    states: Tensor, targets: Tensor, logits_of: LogitsOf, rows_per_chunk: int, *, head_trains: bool = True
) -> tuple[Tensor, Tensor]:
    """As `projected_logprobs`, with the entropy of each whole distribution in nats: [N] and [N] float32."""
    logprobs, entropies = _in_chunks(states, targets, logits_of, rows_per_chunk, head_trains, with_entropy=True)
    assert entropies is not None
    return logprobs, entropies


def _in_chunks(
    states: Tensor, targets: Tensor, logits_of: LogitsOf, rows_per_chunk: int, head_trains: bool, *, with_entropy: bool
) -> Found:
    """Each chunk by the way that makes its backward pass cheapest."""

    def of_chunk(part: Tensor, ids: Tensor) -> Found:
        if not torch.is_grad_enabled():
            return _read(logits_of(part, ids), ids, with_entropy)[0]
        found: Found
        if head_trains:
            found = _TrainedHead.apply(part, ids, logits_of, with_entropy, len(targets) <= rows_per_chunk)
        else:
            found = _FrozenHead.apply(part, ids, logits_of, with_entropy)
        return found

    chunks = zip(states.split(rows_per_chunk), targets.split(rows_per_chunk), strict=True)
    logprobs, entropies = zip(*(of_chunk(part, ids) for part, ids in chunks), strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


class _FrozenHead(torch.autograd.Function):
    """Under a head that does not train, what a row's state is to receive is known up to a factor: it is made at once.

    So nothing of the size of the vocabulary outlives the forward pass, and logits are made once.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, logits_of: LogitsOf, with_entropy: bool) -> Found:
        with torch.enable_grad():
            leaf = states.detach().requires_grad_()
            logits = logits_of(leaf, targets)
            of_logits, dtype = get_gradient_edge(logits), logits.dtype
        found, log_p = _read(logits.detach(), targets, with_entropy)
        p, ones = log_p.exp_(), torch.ones_like(found[0])
        by_state = []
        if with_entropy:
            slope = _slope(p.clone(), targets, None, ones, found[1]).to(dtype)
            by_state.append(torch.autograd.grad(of_logits, leaf, slope, retain_graph=True)[0])
        slope = _slope(p, targets, ones, None, None).to(dtype)
        by_state.insert(0, torch.autograd.grad(of_logits, leaf, slope)[0])
        ctx.save_for_backward(*by_state)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [
            by_state * factor[:, None].to(by_state.dtype)
            for by_state, factor in zip(ctx.saved_tensors, upstream, strict=False)
            if factor is not None
        ]
        return sum(given[1:], given[0]), None, None, None


class _TrainedHead(torch.autograd.Function):
    """The backward pass needs the chunk's probabilities: they are held, or made again from the states."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, logits_of: LogitsOf, with_entropy: bool, hold: bool
    ) -> Found:
        with torch.set_grad_enabled(hold):
            leaf = states.detach().requires_grad_(states.requires_grad)
            logits = logits_of(leaf, targets)
        chosen = logits.detach().gather(1, targets[:, None]).squeeze(1).float()
        if hold:
            ctx.leaf, ctx.of_logits, ctx.dtype = leaf, get_gradient_edge(logits), logits.dtype
        found, log_p = _read(logits.detach(), targets, with_entropy)
        ctx.logits_of, ctx.held = logits_of, log_p.exp_() if hold else None
        ctx.save_for_backward(states, targets, chosen - found[0], found[1])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, entropy_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        """The probabilities held become the gradient of the logits, so a second pass makes its own."""
        states, targets, normaliser, entropies = ctx.saved_tensors
        p, ctx.held = ctx.held, None
        if p is not None:
            leaf, of_logits, dtype = ctx.leaf, ctx.of_logits, ctx.dtype
        else:
            with torch.enable_grad():
                leaf = states.detach().requires_grad_(states.requires_grad)
                of_logits = ctx.logits_of(leaf, targets)
            dtype = of_logits.dtype
            p = (of_logits.detach().float() - normaliser[:, None]).exp_()
        torch.autograd.backward(of_logits, _slope(p, targets, gradient, entropy_gradient, entropies).to(dtype))
        return leaf.grad, None, None, None, None


def _read(logits: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Found, Tensor]:
    """What is asked of a chunk, and log p [n, V] in float32; the logits may be overwritten."""
    log_p = logits.float()
    if log_p.is_cpu:
        torch.log_softmax(log_p, dim=-1, out=log_p)
    else:
        log_p = torch.log_softmax(log_p, dim=-1)
    logprobs = log_p.gather(1, targets[:, None]).squeeze(1)
    return (logprobs, torch.special.entr(log_p.exp()).sum(-1) if with_entropy else None), log_p


def _slope(
    p: Tensor, targets: Tensor, gradient: Tensor | None, entropy_gradient: Tensor | None, entropies: Tensor | None
) -> Tensor:
    """The gradient of the logits [n, V], in the place of p, from those of log-probabilities and entropies [n]."""
    if gradient is None:
        gradient = torch.zeros_like(p[:, 0])
    by_entropy: Tensor | None = None
    if entropy_gradient is not None:
        assert entropies is not None
        by_entropy = (torch.special.entr(p) - p * entropies[:, None]).mul_(entropy_gradient[:, None])
    slope = p.mul_(-gradient[:, None]).scatter_add_(1, targets[:, None], gradient[:, None])
    return slope if by_entropy is None else slope.add_(by_entropy)
