"""The time of attention, apart from the layers' matrices: of whole sequences, and of one token after them."""

from __future__ import annotations

from tandem.plan.arithmetic import attention_flops, cache_bytes
from tandem.plan.cost import Cost
from tandem.plan.layout import Layout
from tandem.plan.model_size import ModelSize

# Attention's products are as narrow as a head; narrower than this they reach so much less of the rate.
WIDE_HEAD = 64
# Keys and values are read, and the scores over them written and read.
CACHE_PASSES = 2


def of_sequences(layout: Layout, size: ModelSize, tokens: float, length: float) -> Cost:
    """So many tokens of sequences of `length` in all layers: as it was measured, or by its products."""
    device = layout.device
    if device.attention is not None:
        return Cost(memory=tokens * length * size.heads * size.layers * device.attention.sequence)
    flops = attention_flops(size, tokens, length) * max(1.0, WIDE_HEAD / size.head_width)
    return Cost(products=flops / device.reached_flops)


def of_one_token(layout: Layout, size: ModelSize, rows: float, context: float, width: int) -> Cost:
    """A token of each of so many rows, after `context` others, in all layers: as it was measured, or by what is read.

    Keys and values are read once for all query heads that share them; a number has `width` bytes.
    """
    device = layout.device
    if device.attention is not None:
        return Cost(memory=rows * context * size.heads * size.layers * device.attention.token)
    moved = rows * context * cache_bytes(size, width) * CACHE_PASSES
    return Cost(memory=moved / device.reached_bandwidth)
