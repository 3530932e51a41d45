"""Log-probabilities of tokens from hidden states, without ever holding all their logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tandem.algo.sampling import token_logprobs

LogitsOf = Callable[[Tensor, Tensor], Tensor]


def projected_logprobs(states: Tensor, targets: Tensor, logits_of: LogitsOf, rows_per_chunk: int) -> Tensor:
    """log softmax(logits_of(states, targets))[target], a chunk of rows at a time.

    states [N, H], targets [N] int64 -> [N] float32. `logits_of` maps [n, H] and [n] to logits [n, V]; parameters
    inside it receive gradients. A chunk's logits are dropped and made again in the backward pass, which needs
    only their normaliser: d logprob / d logits = onehot(target) - softmax(logits).
    """
    chunks = zip(states.split(rows_per_chunk), targets.split(rows_per_chunk), strict=True)
    return torch.cat([_ProjectedLogprobs.apply(part, ids, logits_of) for part, ids in chunks])


class _ProjectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, logits_of: LogitsOf) -> Tensor:
        logits = logits_of(states, targets)
        logprobs = token_logprobs(logits, targets)
        normaliser = logits.gather(1, targets[:, None]).squeeze(1).float() - logprobs
        ctx.save_for_backward(states, targets, normaliser)
        ctx.logits_of = logits_of
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        states, targets, normaliser = ctx.saved_tensors
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            logits = ctx.logits_of(states, targets)
        with torch.no_grad():
            upstream = (logits.float() - normaliser[:, None]).exp_().mul_(-gradient[:, None])
            upstream.scatter_add_(1, targets[:, None], gradient[:, None])
        torch.autograd.backward(logits, upstream.to(logits.dtype))
        return states.grad, None, None
