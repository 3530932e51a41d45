"""From logits to a token and its log-probability: the same distribution for sampling and for training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BLOCK = 256


def truncate(logits: Tensor, top_k: int | None, top_p: float, keep: Tensor | None = None) -> Tensor:
    """Set to minus infinity what top-k and top-p (nucleus, Holtzman et al. 2019) leave out.

    logits [N, V], already divided by the temperature. `keep` [N] names a token a row that stays in any case:
    when a sampled token is scored under a policy that has moved on, its ratio stays finite. Ties at the k-th
    place all stay. The likeliest token always stays.
    """
    if top_k is None and top_p >= 1.0:
        return logits
    out = torch.zeros_like(logits, dtype=torch.bool)
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        out |= logits < smallest
    if top_p < 1.0:
        ordered, order = logits.masked_fill(out, -math.inf).sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1, dtype=torch.float32)
        before = probabilities.cumsum(-1) - probabilities
        out |= torch.zeros_like(out).scatter(-1, order, before >= top_p)
    if keep is not None:
        out = out.scatter(-1, keep[:, None], False)
    return logits.masked_fill(out, -math.inf)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token]: logits [N, V] of any float type, tokens [N] int64 -> [N] float32."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32).gather(-1, tokens[:, None]).squeeze(-1)


def sample(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token a row by inverting the cumulative distribution.

    logits [N, V] and numbers [N] drawn uniformly from [0, 1) -> tokens [N] int64 and their log-probabilities [N]
    float32. The inversion goes in two levels, first the block that holds the drawn quantile and then the token within
    it: both cumulative sums stay short, which is faster and more exact than one over the whole vocabulary.
    """
    rows, vocabulary = logits.shape
    probabilities = logits.softmax(-1, dtype=torch.float32)
    blocks = math.ceil(vocabulary / _BLOCK)
    if blocks * _BLOCK != vocabulary:
        probabilities = torch.nn.functional.pad(probabilities, (0, blocks * _BLOCK - vocabulary))
    grouped = probabilities.view(rows, blocks, _BLOCK)
    block, rest = _invert(grouped.sum(-1), uniform[:, None])
    within, _ = _invert(grouped[torch.arange(rows, device=logits.device), block], rest, absolute=True)
    tokens = block * _BLOCK + within
    return tokens, probabilities.gather(-1, tokens[:, None]).squeeze(-1).log()


def _invert(weights: Tensor, quantile: Tensor, absolute: bool = False) -> tuple[Tensor, Tensor]:
    """The index whose cumulative weight first exceeds the quantile, and what is left of it inside that index.

    weights [N, K] >= 0; quantile [N, 1] as a share of the total, or as a weight where `absolute`. An index of
    zero weight is never returned.
    """
    cumulative = weights.cumsum(-1)
    target = quantile if absolute else quantile * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    last = (weights > 0).long().mul(torch.arange(1, weights.shape[1] + 1, device=weights.device)).amax(-1) - 1
    index = torch.minimum(index.squeeze(-1), last)
    before = cumulative.gather(-1, index[:, None]) - weights.gather(-1, index[:, None])
    return index, (target - before).clamp(min=0)
