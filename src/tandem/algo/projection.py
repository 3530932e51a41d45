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
    return torch.cat([_Projected.apply(part, ids, logits_of, False)[0] for part, ids in chunks])


def projected_logprobs_and_entropies(
    states: Tensor, targets: Tensor, logits_of: LogitsOf, rows_per_chunk: int
) -> tuple[Tensor, Tensor]:
    """As `projected_logprobs`, with the entropy of each whole distribution in nats: [N] and [N] float32.

    d entropy / d logits = -p (log p + entropy).
    """
    chunks = zip(states.split(rows_per_chunk), targets.split(rows_per_chunk), strict=True)
    parts = [_Projected.apply(part, ids, logits_of, True) for part, ids in chunks]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, logits_of: LogitsOf, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        logits = logits_of(states, targets)
        logprobs = token_logprobs(logits, targets)
        normaliser = logits.gather(1, targets[:, None]).squeeze(1).float() - logprobs
        entropies = torch.special.entr(logits.softmax(-1, dtype=torch.float32)).sum(-1) if with_entropy else None
        ctx.save_for_backward(states, targets, normaliser, entropies)
        ctx.logits_of = logits_of
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, entropy_gradient: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        states, targets, normaliser, entropies = ctx.saved_tensors
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            logits = ctx.logits_of(states, targets)
        with torch.no_grad():
            probabilities = (logits.float() - normaliser[:, None]).exp_()
            if entropies is None:
                upstream = probabilities.mul_(-gradient[:, None])
            else:
                assert entropy_gradient is not None
                by_entropy = torch.special.entr(probabilities) - probabilities * entropies[:, None]
                upstream = by_entropy * entropy_gradient[:, None] - probabilities * gradient[:, None]
            upstream.scatter_add_(1, targets[:, None], gradient[:, None])
        torch.autograd.backward(logits, upstream.to(logits.dtype))
        return states.grad, None, None, None
