"""What is read off logits [n, V], and their gradient in their own place, a row being a distribution p = softmax(z).

With H = -sum p log p, the entropy:

    d log p[target] / dz = onehot(target) - p        dH / dz = -p (log p + H)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_NUMBERS_IN_CACHE = 2**19


class Found(NamedTuple):
    """Of each row, [n] float32: log p[target], log sum exp(z), and the entropy in nats where it was asked for."""

    logprobs: Tensor
    normalizers: Tensor
    entropies: Tensor | None


class Upstream(NamedTuple):
    """The gradient, [n] float32 each, of log p[target] and of the entropy; None is zero."""

    of_logprobs: Tensor | None
    of_entropies: Tensor | None


def sums_over_rows(logits: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of each row z, [n, 1] float32: its greatest number m, log sum exp(z - m), and the entropy if asked for."""
    z = logits.float()
    greatest = z.amax(-1, keepdim=True)
    below = z - greatest if z is logits else z.sub_(greatest)
    if not with_entropy:
        return greatest, below.exp_().sum(-1, keepdim=True).log(), None
    weights = below.exp()
    total = weights.sum(-1, keepdim=True)
    # What is left out of a truncated distribution is infinitely far below, and adds nothing.
    mean = (weights * torch.where(weights > 0, below, 0.0)).sum(-1, keepdim=True) / total
    return greatest, total.log(), total.log() - mean


def put_slope(
    logits: Tensor, normalizers: Tensor, entropies: Tensor | None, of_logprobs: Tensor, of_entropies: Tensor | None
) -> None:
    """Overwrite logits [n, V] by their gradient, but for the part of the targets' ones; the others are [n, 1]."""
    log_p = logits.float().sub_(normalizers)
    if of_entropies is None:
        slope = log_p.exp_().mul_(-of_logprobs)
    else:
        assert entropies is not None
        p = log_p.exp()
        by_entropy = p * (torch.where(p > 0, log_p, 0.0) + entropies)
        slope = -of_logprobs * p - of_entropies * by_entropy
    if slope is not logits:
        logits.copy_(slope)


@dataclass(frozen=True)
class Passes:
    """How the passes over a chunk of logits are made.

    As they are written, on a CPU, a block of rows at a time that its cache holds; `whole` is for functions that were
    compiled and hold nothing in between.
    """

    sums_over_rows: Callable[[Tensor, bool], tuple[Tensor, Tensor, Tensor | None]] = sums_over_rows
    put_slope: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None], None] = put_slope
    whole: bool = False

    @torch.no_grad()
    def read(self, logits: Tensor, targets: Tensor, *, with_entropy: bool) -> Found:
        """What logits [n, V] say of targets [n] int64."""
        found = [self.sums_over_rows(logits[rows], with_entropy) for rows in self._blocks(logits)]
        of_blocks = list(zip(*found, strict=True))
        greatest, log_sums = (torch.cat(of_all).squeeze(1) for of_all in of_blocks[:2])
        entropies = torch.cat(of_blocks[2]).squeeze(1) if with_entropy else None
        chosen = logits.gather(1, targets[:, None]).squeeze(1).float()
        return Found((chosen - greatest) - log_sums, greatest + log_sums, entropies)

    @torch.no_grad()
    def slope(self, logits: Tensor, targets: Tensor, found: Found, upstream: Upstream) -> Tensor:
        """The gradient of the logits [n, V], in their place."""
        of_logprobs, of_entropies = upstream
        if of_logprobs is None:
            of_logprobs = torch.zeros_like(found.logprobs)
        for rows in self._blocks(logits):
            entropies, by_entropy = (_column(given, rows) for given in (found.entropies, of_entropies))
            normalizers, by_logprob = found.normalizers[rows, None], of_logprobs[rows, None]
            self.put_slope(logits[rows], normalizers, entropies, by_logprob, by_entropy)
        # Where p is nearly one, 1 - p of two rounded numbers would be nothing but rounding.
        at_target = -of_logprobs * torch.expm1(found.logprobs)
        if of_entropies is not None:
            assert found.entropies is not None
            at_target -= of_entropies * found.logprobs.exp() * (found.logprobs + found.entropies)
        # On a CPU torch's scatter would copy all of the logits, twice.
        logits[torch.arange(len(logits), device=logits.device), targets] = at_target.to(logits.dtype)
        return logits

    def _blocks(self, logits: Tensor) -> Iterator[slice]:
        size = len(logits)
        if logits.is_cpu and not self.whole:
            size = max(1, _NUMBERS_IN_CACHE // logits.shape[1])
        return (slice(start, start + size) for start in range(0, len(logits), size))


def _column(of_each: Tensor | None, rows: slice) -> Tensor | None:
    return None if of_each is None else of_each[rows, None]
