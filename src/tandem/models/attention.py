"""Attention on a CPU by the kernel that is the fastest there for what is asked; elsewhere a model's own.

torch's fused kernel has, on a CPU, a backward pass in bfloat16 that takes five times as long as the products that it is
made of, and one that reads keys and values once for every query head when a single token attends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tandem.models import kernels

ON_CPU = "tandem_cpu"
_LONGEST_IN_PRODUCTS = 512
"""From this length on the fused kernel is as fast, and needs no array of the size of length times length."""


def attend_on_cpu(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
    """Attention [B, T, heads, D] of queries [B, heads, T, D] to keys and values [B, key heads, S, D].

    `mask` [B, 1, T, S] is True where a query reads; None is causal, or all for a single query. As transformers calls
    it: returns a pair, the second of which would be the probabilities.
    """
    plain = not more.get("dropout") and more.get("position_bias") is None and more.get("is_causal") is None
    if not plain or (mask is not None and mask.dtype != torch.bool):
        return sdpa_attention_forward(module, query, key, value, mask, **more)
    scaling = more.get("scaling") or query.shape[-1] ** -0.5
    if query.shape[2] == 1:
        return _way_of_one_token(query, value)(query, key, value, mask, scaling), None
    if query.dtype != torch.float32 and getattr(module, "is_causal", True):
        if mask is None and torch.compiler.is_compiling() and kernels.attends_texts(query, key, value):
            return kernels.attend_texts(query, key, value, scaling), None
        if key.shape[2] <= _LONGEST_IN_PRODUCTS:
            return _in_products(query, key, value, mask, scaling), None
    return sdpa_attention_forward(module, query, key, value, mask, **more)


def _way_of_one_token(query: Tensor, value: Tensor) -> Callable[..., Tensor]:
    if not torch.compiler.is_compiling():
        return _one_token
    return kernels.attend_one if kernels.attends_one(query, value) else _one_token_in_sums


def _one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """The query heads that share keys attend together, as if they were several queries."""
    rows, heads, _, width = query.shape
    shared = query.view(rows, key.shape[1], heads // key.shape[1], width)
    found = torch.nn.functional.scaled_dot_product_attention(shared, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(rows, 1, heads, value.shape[3])


def _one_token_in_sums(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Sums of elementwise products in float32, which compiled code takes in one pass over keys and one over values."""
    rows, heads, _, width = query.shape
    shared = query.view(rows, key.shape[1], heads // key.shape[1], 1, width).float() * scaling
    scores = (shared * key[:, :, None].float()).sum(-1)
    if mask is not None:
        scores = scores.masked_fill(~mask, _least(scores))
    found = (scores.softmax(-1)[..., None] * value[:, :, None].float()).sum(-2)
    return found.to(query.dtype).reshape(rows, 1, heads, value.shape[3])


def _in_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Batched products with a softmax in float32 between; query heads that share keys are more rows of one product."""
    rows, heads, length, width = query.shape
    key_heads, read = key.shape[1], key.shape[2]
    if mask is None:
        mask = torch.ones(length, read, dtype=torch.bool, device=query.device).tril(read - length)
    else:
        mask = mask.unsqueeze(2)
    unread = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, _least(query))
    queries = (query * scaling).reshape(rows * key_heads, -1, width)
    keys, values = (given.reshape(rows * key_heads, read, -1) for given in (key, value))
    found: Tensor = _Products.apply(queries, keys, values, unread, (rows, key_heads, -1, length, read))
    return found.view(rows, heads, length, -1).transpose(1, 2).contiguous()


class _Products(torch.autograd.Function):
    """softmax(queries keys^T + unread) values, for N sets of queries [N, Q, D], keys [N, S, D] and values [N, S, E].

    `unread` is added to what `shape` makes of the scores [N, Q, S]. The backward pass is written out: compiled code for
    autograd's own takes the exponentials again, and leaves the keys' gradient with rows and columns exchanged.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, unread: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        scores = torch.bmm(queries, keys.transpose(1, 2))
        p = torch.softmax(scores.view(shape) + unread, dim=-1).to(scores.dtype).view(scores.shape)
        ctx.save_for_backward(queries, keys, values, p)
        return torch.bmm(p, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, p = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_values = torch.bmm(p.transpose(1, 2), gradient)
        weighed = torch.bmm(gradient, values.transpose(1, 2)).float() * p
        of_scores = (weighed - p * weighed.sum(-1, keepdim=True)).to(p.dtype)
        return torch.bmm(of_scores, keys), torch.bmm(of_scores.transpose(1, 2), queries), of_values, None, None


def _least(scores: Tensor) -> float:
    """Finite, so that a row that reads nothing is a mean rather than no number."""
    return torch.finfo(scores.dtype).min


def attend_by_device(model: PreTrainedModel) -> None:
    """Let a model on a CPU that uses torch's fused kernel attend by `attend_on_cpu`."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ON_CPU)


AttentionInterface.register(ON_CPU, attend_on_cpu)
AttentionMaskInterface.register(ON_CPU, sdpa_mask)
