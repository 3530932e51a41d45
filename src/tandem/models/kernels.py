"""Operators of our own on a CPU: C++ (`kernels.cpp`, `attention.cpp`, `head.cpp`).

In sampling a few rows meet every matrix, key and value once a token. What there is for it in torch and oneDNN reads
them at a third to a half of the rate at which memory gives them. In training, oneDNN finds a narrow matrix's gradient
at half of the rate of its other products, compiled code takes the exponentials of what no query reads, and logits are
written and read three times where once is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tandem.models.building import built_library

_WIDTHS = (16, 32, 48, 64, 80, 96, 128)
"""Of heads, that the source is compiled for."""
_TYPES = (torch.float32, torch.bfloat16)
_LONGEST = 4096
"""Texts that `attend_texts` is given: of what it keeps of a head, each thread holds length times length numbers."""


_loaded = False
_has_matrix_units = False


def load_kernels() -> None:
    """Build the operators where this machine has not built them yet, and make them known to torch.

    Raises RuntimeError where they cannot be built.
    """
    global _loaded, _has_matrix_units
    if _loaded:
        return
    torch.ops.load_library(built_library())
    _has_matrix_units = torch.ops.tandem_cpu.has_matrix_units()
    torch.library.register_fake("tandem_cpu::multiply_packed", _shape_of_product)
    torch.library.register_fake("tandem_cpu::attend_one", _shape_of_one_token)
    torch.library.register_fake("tandem_cpu::weight_gradients", _shapes_of_gradients)
    torch.library.register_fake("tandem_cpu::rotate", _shape_of_rotated)
    torch.library.register_autograd("tandem_cpu::rotate", _back_from_rotated, setup_context=_keep_for_rotation)
    torch.library.register_fake("tandem_cpu::attend_texts", _shapes_of_attention)
    torch.library.register_fake("tandem_cpu::attend_texts_gradients", _shapes_of_attention_gradients)
    torch.library.register_autograd("tandem_cpu::attend_texts", _back_from_attention, setup_context=_keep_for_attention)
    _loaded = True


def are_loaded() -> bool:
    """Whether this process has loaded the operators."""
    return _loaded


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """`tandem.algo.sample`, without ever writing a probability."""
    tokens, logprobs = torch.ops.tandem_cpu.draw(logits, uniform)
    return tokens, logprobs


def draws(logits: Tensor) -> bool:
    """Whether `draw` knows logits of this type."""
    return logits.dtype in _TYPES


def attends_one(query: Tensor, value: Tensor) -> bool:
    """Whether a single query [B, heads, 1, D] attends by `attend_one` to values [B, key heads, S, D]."""
    width = query.shape[3]
    return _loaded and query.dtype in _TYPES and width in _WIDTHS and value.shape[3] == width


def attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """[B, 1, heads, D]; the mask [1 or B, 1, 1, S] is True where the query reads."""
    found: Tensor = torch.ops.tandem_cpu.attend_one(query, key, value, mask, scaling)
    return found


def rotates(heads: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the operator `rotate` turns such heads [B, heads, T, D] by cos and sin [1 or B, 1, T, D].

    For a single token, code that also does what comes before and after it is as fast.
    """
    known = _loaded and heads.device.type == "cpu" and heads.dtype in _TYPES and heads.dim() == 4
    alike = all(
        angle.dtype == heads.dtype and angle.dim() == 4 and angle.shape[1] == 1 and not angle.requires_grad
        for angle in (cos, sin)
    )
    return known and alike and heads.shape[3] % 2 == 0 and heads.shape[2] != 1


def attends_texts(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend_texts` knows such queries [B, heads, T, D], keys and values [B, key heads, T, D]."""
    if not (_loaded and query.device.type == "cpu" and query.dtype == key.dtype == value.dtype == torch.bfloat16):
        return False
    width = query.shape[3]
    alike = query.shape[2] == key.shape[2] <= _LONGEST and key.shape[3] == value.shape[3] == width
    return _has_matrix_units and alike and width in _WIDTHS


def attend_texts(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """[B, T, heads, D]: every query reads the keys up to its own place."""
    found: Tensor = torch.ops.tandem_cpu.attend_texts(query, key, value, scaling)[0]
    return found


def multiplies(weight: Tensor) -> bool:
    """Whether there are matrix units for this matrix [outputs, inputs], and it consists of whole tiles of theirs."""
    outputs, inputs = weight.shape
    tiles = outputs % 16 == 0 and (inputs % 32 == 0 or inputs in (8, 16))
    return tiles and weight.dtype == torch.bfloat16 and _has_matrix_units


def finds_gradient(upstream: Tensor, rows: Tensor) -> bool:
    """Whether `weight_gradients` multiplies such matrices [N, outputs] and [N, inputs]: tiles of the matrix units."""
    if not (_loaded and upstream.device.type == "cpu" and upstream.dtype == rows.dtype == torch.bfloat16):
        return False
    widths = (upstream.shape[1], rows.shape[1])
    tiles = all(isinstance(width, int) and width % 16 == 0 for width in widths)
    return tiles and _has_matrix_units


def weight_gradients(upstream: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """[outputs, inputs] for each upstream gradient [N, outputs] of what matrices made of the same rows [N, inputs]."""
    found: list[Tensor] = torch.ops.tandem_cpu.weight_gradients(upstream, rows)
    return found


def reads_head(head: nn.Module) -> bool:
    """Whether `head_logprobs` multiplies this head [V, H]: a matrix in bfloat16 without a bias, whole tiles of it."""
    weight = head.weight if type(head) is nn.Linear and head.bias is None and "forward" not in vars(head) else None
    if not (_loaded and weight is not None and weight.device.type == "cpu" and weight.dtype == torch.bfloat16):
        return False
    whole = weight.is_contiguous() and all(size % 32 == 0 for size in weight.shape)
    return whole and _has_matrix_units


class HeadLogits(NamedTuple):
    """Of states [N, H] under a head [V, H]: log p[target] and log sum exp(logits), [N] float32 each, and the logits.

    They lie as the units left them, in squares of 32 tokens by 32 rows; none where they were not to be kept.
    """

    logprobs: Tensor
    normalizers: Tensor
    squares: Tensor


def head_logprobs(states: Tensor, weight: Tensor, targets: Tensor, *, keep: bool) -> HeadLogits:
    """Log-probabilities of targets [N] int64, from logits that are read while they are made."""
    return HeadLogits(*torch.ops.tandem_cpu.head_logprobs(states, weight, targets, keep))


def head_states_gradient(found: HeadLogits, weight: Tensor, targets: Tensor, upstream: Tensor) -> Tensor:
    """[N, H] bfloat16, given the log-probabilities' gradient [N] float32; the logits must have been kept."""
    logprobs, normalizers, squares = found
    gradient: Tensor = torch.ops.tandem_cpu.head_states_gradient(
        squares, weight, targets, logprobs, normalizers, upstream
    )
    return gradient


def head_weight_gradient(
    found: HeadLogits, states: Tensor, targets: Tensor, upstream: Tensor, vocabulary: int
) -> Tensor:
    """[V, H] bfloat16 for a vocabulary of V, as `head_states_gradient`."""
    logprobs, normalizers, squares = found
    gradient: Tensor = torch.ops.tandem_cpu.head_weight_gradient(
        squares, states, targets, logprobs, normalizers, upstream, vocabulary
    )
    return gradient


@torch.no_grad()
def packed_product(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The layer's product, from a copy of its weights in the order in which the matrix units read them."""
    weight, bias = layer.weight.detach(), layer.bias
    packed = torch.ops.tandem_cpu.pack(weight)

    def multiplied(rows: Tensor) -> Tensor:
        found: Tensor = torch.ops.tandem_cpu.multiply_packed(rows, packed, weight, bias)
        return found

    return multiplied


def _shape_of_product(rows: Tensor, _: Tensor, weight: Tensor, __: Tensor | None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], weight.shape[0])


def _shapes_of_gradients(upstream: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    return [rows.new_empty(gradient.shape[1], rows.shape[1]) for gradient in upstream]


def _shape_of_one_token(query: Tensor, _: Tensor, value: Tensor, *__: Any) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[3])


def _shape_of_rotated(heads: Tensor, _: Tensor, __: Tensor, back: bool) -> Tensor:
    rows, count, length, width = heads.shape
    return heads.new_empty(rows, length, count, width).transpose(1, 2) if back else heads.new_empty(heads.shape)


def _keep_for_rotation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch names it)
    _, cos, sin, _ = inputs
    ctx.save_for_backward(cos, sin)


def _back_from_rotated(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return torch.ops.tandem_cpu.rotate(gradient, *ctx.saved_tensors, True), None, None, None


def _shapes_of_attention(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, heads, length, width = query.shape
    normalizers = query.new_empty(rows, heads, (length + 31) // 32 * 32, dtype=torch.float32)
    return query.new_empty(rows, length, heads, width), normalizers


def _shapes_of_attention_gradients(_: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return tuple(one.new_empty(one.transpose(1, 2).shape).transpose(1, 2) for one in given[:3])


def _keep_for_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *given, ctx.scaling = inputs
    ctx.save_for_backward(*given, *output)


def _back_from_attention(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    return *torch.ops.tandem_cpu.attend_texts_gradients(gradient, *ctx.saved_tensors, ctx.scaling), None
