"""What the ways of `tandem.models` and `tandem.algo.logits` on a CPU save on this machine, in milliseconds.

usage: python benchmarks/cpu_kernels.py

Each is timed in turn with the way in whose place it stands, and the shortest of some calls counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tandem.algo import Passes, Upstream, projected_logprobs, put_slope, sample, sums_over_rows
from tandem.allocator import keep_memory
from tandem.models.attention import _LONGEST_IN_PRODUCTS, _in_products, _one_token_in_sums, attend_on_cpu
from tandem.models.head import head_logprobs
from tandem.models.kernels import attend_one, attend_texts, draw, load_kernels, packed_product, weight_gradients
from tandem.models.packing import packed

SHAPES = [(21, 6, 6, 96, 48), (32, 9, 3, 48, 64), (8, 9, 3, 256, 64), (4, 9, 3, 512, 64), (2, 9, 3, 1024, 64)]
"""Rows, query heads, key heads, tokens and the width of a head."""
MATRICES = [(288, 288), (288, 32_000), (576, 576), (576, 1_536), (576, 49_152)]
NUMBERS = 2**25
"""Of all matrices of a shape together, so that they come from memory."""
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
def one_token_by_layer() -> None:
    """As compiled layers do: every layer has keys and values of its own, which no near cache holds."""
    compiled = torch.compile(_one_token_in_sums, dynamic=True)
    for rows, heads, key_heads, width, layers in [(64, 6, 6, 48, 6), (64, 9, 3, 64, 30)]:
        query = torch.randn(rows, heads, 1, width, dtype=torch.bfloat16)
        rooms = [torch.randn(2, rows, key_heads, 96, width, dtype=torch.bfloat16)[..., :64, :] for _ in range(layers)]

        def each(way: Callable[..., object]) -> None:
            for keys, values in rooms:  # noqa: B023
                way(query, keys, values, None, 0.125)  # noqa: B023

        sums, kernel = (
            milliseconds / layers for milliseconds in in_turn([partial(each, compiled), partial(each, attend_one)])
        )
        name = f"{rows} rows, {heads} heads on {key_heads}, 64 tokens of {width}, {layers} layers"
        print(f"one token, {name}: compiled sums {sums:.3f}, our kernel {kernel:.3f}")


def texts() -> None:
    """Whole texts attend, and their heads are rotated: by compiled code or the fused kernel, and by our operators."""

    def by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _in_products(query, key, value, None, 0.125)

    def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def by_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend_texts(query, key, value, 0.125)

    def as_written(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = heads.shape[-1] // 2
        return heads * cos + torch.cat((-heads[..., half:], heads[..., :half]), dim=-1) * sin

    def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        found: Tensor = torch.ops.tandem_cpu.rotate(heads, cos, sin, False)
        return found

    def once(way: Callable[..., Tensor], learns: bool, given: Sequence[Tensor]) -> None:
        with torch.set_grad_enabled(learns):
            found = way(*given)
        if learns:
            torch.autograd.grad(found, given[0], torch.ones_like(found))

    compiled = {way: torch.compile(way, dynamic=True) for way in (by_products, as_written)}
    for rows, heads, key_heads, length, width in [*SHAPES, (1, 9, 3, 4096, 64)]:
        query, key, value = (
            torch.randn(rows, length, count, width).bfloat16().transpose(1, 2).requires_grad_()
            for count in (heads, key_heads, key_heads)
        )
        angles = [torch.randn(rows, 1, length, width).bfloat16() for _ in range(2)]
        short = length <= _LONGEST_IN_PRODUCTS
        said, before = ("compiled products", compiled[by_products]) if short else ("fused kernel", fused)
        for name, old, ours, given in [
            (f"attention, {said}", before, by_kernel, (query, key, value)),
            ("rotation, compiled", compiled[as_written], turned, (query, *angles)),
        ]:
            times = [in_turn([partial(once, way, learns, given) for way in (old, ours)]) for learns in (False, True)]
            alone, learnt = (f"{then:.2f}, by our kernel {now:.2f}" for then, now in times)
            each = f"{rows} texts, {heads} heads on {key_heads}, {length} tokens of {width}"
            print(f"{each}: {name} {alone}; with its gradient {learnt}")


@torch.no_grad()
def matrices() -> None:
    """As many as no near cache holds, as a model's are when a token is sampled."""
    for count in (32, 64):
        for width, height in MATRICES:
            layers = [
                nn.Linear(width, height, bias=False, dtype=torch.bfloat16)
                for _ in range(max(1, NUMBERS // (width * height)))
            ]
            rows = torch.randn(count, width).bfloat16()

            def each(products: list[Callable[[Tensor], Tensor]]) -> None:
                for product in products:
                    product(rows)  # noqa: B023

            plain = [layer.forward for layer in layers]
            own = [packed_product(layer) for layer in layers]
            with packed(nn.Sequential(*layers)):
                by_onednn = [layer.forward for layer in layers]
            times = in_turn([partial(each, ways) for ways in (plain, by_onednn, own)])
            as_is, laid_out, kernel = (milliseconds / len(layers) for milliseconds in times)
            name = f"{count} rows by a matrix {width} x {height}"
            print(f"{name}: as it is {as_is:.3f}, laid out by oneDNN {laid_out:.3f}, by our kernel {kernel:.3f}")


def gradients() -> None:
    """Of a layer's matrices that met the same rows: oneDNN one after the other, and our operator."""
    for outputs, inputs in [((288,) * 3, 288), ((768,) * 2, 288), ((288,), 768), ((576, 192, 192), 576)]:
        rows = torch.randn(1_536, inputs).bfloat16()
        upstream = [torch.randn(1_536, width).bfloat16() for width in outputs]
        ways: list[Callable[[], object]] = [
            lambda: [gradient.T @ rows for gradient in upstream],  # noqa: B023
            lambda: weight_gradients(upstream, rows),  # noqa: B023
        ]
        one_by_one, ours = in_turn(ways)
        name = f"gradients of matrices {' and '.join(f'{width} x {inputs}' for width in outputs)} of 1,536 rows"
        print(f"{name}: by oneDNN {one_by_one:.3f}, by our kernel {ours:.3f}")


@torch.no_grad()
def draws() -> None:
    for vocabulary in (32_000, 49_152):
        logits, uniform = torch.randn(64, vocabulary).bfloat16(), torch.rand(64)
        written, kernel = in_turn([lambda: sample(logits, uniform), lambda: draw(logits, uniform)])  # noqa: B023
        print(f"a token of {vocabulary:,} for 64 rows: as it is written {written:.2f}, by our kernel {kernel:.2f}")


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


def heads() -> None:
    """Log-probabilities of 1,024 tokens from their states; with the gradient of the states, and of the head too."""
    compiled = Passes(torch.compile(sums_over_rows, dynamic=True), torch.compile(put_slope, dynamic=True), whole=True)
    targets = torch.arange(1_024)
    for width, vocabulary in [(288, 32_000), (576, 49_152)]:
        given, head = torch.randn(1_024, width).bfloat16(), torch.randn(vocabulary, width).bfloat16() / width**0.5

        def by_passes(states: Tensor, weight: Tensor) -> Tensor:
            def logits_of(part: Tensor, _: Tensor) -> Tensor:
                return part @ weight.T

            trains, rows = weight.requires_grad, len(states)
            return projected_logprobs(states, targets, logits_of, rows, head_trains=trains, passes=compiled)[0]

        def by_kernels(states: Tensor, weight: Tensor) -> Tensor:
            return head_logprobs(states, targets, weight, len(states))

        def once(read: Callable[..., Tensor], learns: bool, trains: bool) -> None:
            states, weight = given.clone().requires_grad_(learns), head.detach().requires_grad_(trains)  # noqa: B023
            with torch.set_grad_enabled(learns):
                found = read(states, weight)
            if learns:
                found.sum().backward()

        for learns, trains, said in [(False, False, "read"), (True, False, "states"), (True, True, "states and head")]:
            passes, ours = in_turn([partial(once, way, learns, trains) for way in (by_passes, by_kernels)])
            name = f"a head {width} x {vocabulary:,}, 1,024 rows, {said}"
            print(f"{name}: by passes {passes:.1f}, by our kernels {ours:.1f}")


if __name__ == "__main__":
    keep_memory()
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        attention(dtype)
        vocabulary(dtype)
    one_token()
    load_kernels()
    one_token_by_layer()
    if torch.ops.tandem_cpu.has_matrix_units():
        texts()
        matrices()
        gradients()
        heads()
    draws()
