"""What the ways of `tandem.models` and `tandem.algo.logits` on a CPU save on this machine, in milliseconds.

usage: python benchmarks/cpu_kernels.py

Each is timed in turn with the way in whose place it stands, and the shortest of some calls counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tandem.algo import Passes, Upstream, put_slope, sums_over_rows
from tandem.allocator import keep_memory
from tandem.models.attention import attend_on_cpu
from tandem.models.packing import packed

SHAPES = [(21, 6, 6, 96, 48), (32, 9, 3, 48, 64), (8, 9, 3, 256, 64), (4, 9, 3, 512, 64), (2, 9, 3, 1024, 64)]
"""Rows, query heads, key heads, tokens and the width of a head."""
MATRICES = [(288, 288), (288, 32_000), (576, 576), (576, 1_536), (576, 49_152)]
CALLS = 10


def in_turn(ways: list[Callable[[], object]]) -> list[float]:
    """Milliseconds of each way's shortest call."""
    best = [float("inf")] * len(ways)
    for number in range(CALLS + 1):
        for index, way in enumerate(ways):
            start = time.perf_counter()
            way()
            if number:
                best[index] = min(best[index], 1e3 * (time.perf_counter() - start))
    return best


class Layer(nn.Module):
    """What an attention function asks of the layer that calls it."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def attention(dtype: torch.dtype) -> None:
    for rows, heads, key_heads, length, width in SHAPES:
        layer = Layer(heads // key_heads)
        query, key, value = (
            torch.randn(rows, length, count, width, dtype=dtype).transpose(1, 2).requires_grad_()
            for count in (heads, key_heads, key_heads)
        )
        upstream = torch.randn(rows, length, heads, width, dtype=dtype)

        def backward(attend: Callable[..., tuple[Tensor, None]]) -> None:
            # The names are bound anew for each shape, after the calls.
            found = attend(layer, query, key, value, None)[0]  # noqa: B023
            torch.autograd.grad(found, (query, key, value), upstream)  # noqa: B023

        fused, ours = in_turn([lambda: backward(sdpa_attention_forward), lambda: backward(attend_on_cpu)])
        name = f"{rows} rows, {heads} heads on {key_heads}, {length} tokens of {width}"
        print(f"attention and its backward pass, {dtype}, {name}: fused kernel {fused:.2f}, ours {ours:.2f}")


@torch.no_grad()
def one_token() -> None:
    query = torch.randn(64, 9, 1, 64, dtype=torch.bfloat16)
    key, value = (torch.randn(64, 3, 96, 64, dtype=torch.bfloat16)[:, :, :64] for _ in range(2))
    by_head, ours = in_turn(
        [
            lambda: scaled_dot_product_attention(query, key, value, enable_gqa=True),
            lambda: attend_on_cpu(Layer(3), query, key, value, None),
        ]
    )
    print(f"one token, 64 rows, 9 heads on 3, 64 tokens of 64: by query head {by_head:.2f}, by key head {ours:.2f}")


@torch.no_grad()
def matrices() -> None:
    for width, height in MATRICES:
        layer, rows = nn.Linear(width, height, bias=False, dtype=torch.bfloat16), torch.randn(64, width).bfloat16()
        plain = layer.forward
        with packed(nn.Sequential(layer)):
            as_is, laid_out = in_turn([partial(plain, rows), partial(layer, rows)])
        print(f"64 rows by a matrix {width} x {height}: as it is {as_is:.3f}, laid out {laid_out:.3f}")


def vocabulary(dtype: torch.dtype) -> None:
    """Log-probabilities of 1,344 tokens from their logits, and the gradient in the logits' place."""
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(1_344, 32_000, generator=chance).to(dtype)
    targets, upstream = torch.arange(len(logits)), torch.randn(len(logits), generator=chance)
    compiled = Passes(torch.compile(sums_over_rows, dynamic=True), torch.compile(put_slope, dynamic=True), whole=True)

    def read(passes: Passes) -> None:
        # What is overwritten is small after a few calls, and takes as long.
        passes.slope(logits, targets, passes.read(logits, targets, with_entropy=False), Upstream(upstream, None))

    written, by_compiler = in_turn([lambda: read(Passes()), lambda: read(compiled)])
    print(f"log-probabilities of 1,344 x 32,000 and their slopes, {dtype}: {written:.1f}, compiled {by_compiler:.1f}")


if __name__ == "__main__":
    keep_memory()
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        attention(dtype)
        vocabulary(dtype)
    one_token()
    matrices()
