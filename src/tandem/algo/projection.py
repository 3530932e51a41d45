"""Log-probabilities of tokens from hidden states, without ever holding all their logits.

For a row with logits z, p = softmax(z) and entropy H = -sum p log p:

    d log p[target] / dz = onehot(target) - p        dH / dz = -p (log p + H)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

LogitsOf = Callable[[Tensor, Tensor], Tensor]
Found = tuple[Tensor, Tensor | None]
_NUMBERS_IN_CACHE = 2**20


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
            return _read(logits_of(part, ids), ids, with_entropy, leave_probabilities=False)
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
            of_logits, p = get_gradient_edge(logits), logits.detach()
        found = _read(p, targets, with_entropy, leave_probabilities=True)
        ones = torch.ones_like(found[0])
        by_state = []
        if with_entropy:
            slope = _slope(p.clone(), targets, found, None, ones)
            by_state.append(torch.autograd.grad(of_logits, leaf, slope, retain_graph=True)[0])
        by_state.insert(0, torch.autograd.grad(of_logits, leaf, _slope(p, targets, found, ones, None))[0])
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
        if hold:
            ctx.leaf, ctx.of_logits = leaf, get_gradient_edge(logits)
        found = _read(logits.detach(), targets, with_entropy, leave_probabilities=hold)
        ctx.logits_of, ctx.held = logits_of, logits.detach() if hold else None
        ctx.save_for_backward(states, targets, *found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, entropy_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        """The probabilities held become the gradient of the logits, so a second pass makes its own."""
        states, targets, *found = ctx.saved_tensors
        p, ctx.held = ctx.held, None
        if p is not None:
            leaf, of_logits = ctx.leaf, ctx.of_logits
        else:
            with torch.enable_grad():
                leaf = states.detach().requires_grad_(states.requires_grad)
                of_logits = ctx.logits_of(leaf, targets)
            p = of_logits.detach()
            _read(p, targets, False, leave_probabilities=True)
        torch.autograd.backward(of_logits, _slope(p, targets, found, gradient, entropy_gradient))
        return leaf.grad, None, None, None, None


def _read(logits: Tensor, targets: Tensor, with_entropy: bool, *, leave_probabilities: bool) -> Found:
    """What is asked of a chunk; its logits [n, V] are overwritten, by the probabilities if they are to be left."""
    logprobs = logits.new_empty(len(logits), dtype=torch.float32)
    entropies = torch.empty_like(logprobs) if with_entropy else None
    for rows, log_p in _in_float32(logits):
        if log_p.is_cpu:
            torch.log_softmax(log_p, dim=-1, out=log_p)
        else:
            log_p = torch.log_softmax(log_p, dim=-1)
        logprobs[rows] = log_p.gather(1, targets[rows, None]).squeeze(1)
        if with_entropy or leave_probabilities:
            p = log_p.exp_()
            if entropies is not None:
                entropies[rows] = torch.special.entr(p).sum(-1)
            if leave_probabilities:
                _put_back(p, logits[rows])
    return logprobs, entropies


def _slope(
    p: Tensor, targets: Tensor, found: Sequence[Tensor | None], gradient: Tensor | None, entropy_gradient: Tensor | None
) -> Tensor:
    """The gradient of the logits [n, V], in the place of p, from those of log-probabilities and entropies [n]."""
    logprobs, entropies = found
    assert logprobs is not None
    if gradient is None:
        gradient = torch.zeros_like(logprobs)
    for rows, part in _in_float32(p):
        chosen, upstream = targets[rows, None], gradient[rows, None]
        part.scatter_(1, chosen, logprobs[rows, None].exp())
        by_entropy: Tensor | None = None
        if entropy_gradient is not None:
            assert entropies is not None
            by_entropy = (torch.special.entr(part) - part * entropies[rows, None]).mul_(entropy_gradient[rows, None])
        part.mul_(-upstream).scatter_add_(1, chosen, upstream)
        _put_back(part if by_entropy is None else part.add_(by_entropy), p[rows])
    return p


def _in_float32(chunk: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a chunk [n, V] in float32, and which they are: on a CPU as many as stay in its cache.

    They may be overwritten: where the chunk is float32, they are its own.
    """
    size = max(1, _NUMBERS_IN_CACHE // chunk.shape[1]) if chunk.is_cpu else len(chunk)
    room = None
    if chunk.dtype != torch.float32:
        room = torch.empty(min(size, len(chunk)), chunk.shape[1], device=chunk.device)
    for start in range(0, len(chunk), size):
        part = chunk[start : start + size]
        yield slice(start, start + size), part if room is None else room[: len(part)].copy_(part)


def _put_back(part: Tensor, place: Tensor) -> None:
    """Into the chunk that it was made of, unless it is a part of it."""
    if part.data_ptr() != place.data_ptr():
        place.copy_(part)
