"""What a pass through a model multiplies, moves and keeps; nothing here knows of a machine."""

from __future__ import annotations

from tandem.plan.model_size import ModelSize


def trunk_flops(size: ModelSize, tokens: float, length: float) -> float:
    """One forward of all layers over sequences of `length`: two a weight, and causal attention's products."""
    return 2.0 * size.trunk * tokens + attention_flops(size, tokens, length)


def attention_flops(size: ModelSize, tokens: float, length: float) -> float:
    """The products of causal attention in all layers."""
    return 2.0 * size.layers * size.attention * tokens * length


def head_flops(size: ModelSize, rows: float) -> float:
    """One projection of so many positions on the vocabulary."""
    return 2.0 * size.head * rows


def adapted_share(size: ModelSize, upper_layers: int | None) -> float:
    """How much of the trunk is at or above the lowest adapted layer."""
    return (upper_layers or size.layers) / size.layers


def layer_traffic(size: ModelSize) -> float:
    """Numbers read and written for a token in one layer's forward, what the products read and write among them.

    Two norms read and write the hidden state eight times each, with the casts to float32; two additions three times;
    the rotation of queries and keys ten times, attention itself once; the gated feed-forward part its width eight
    times; every matrix reads its input and writes its output.
    """
    widths = 10 * (size.attention + size.keys) + size.attention + 2 * size.keys
    return 22 * size.hidden + widths + 8 * size.inner + size.linear_ends


def activation_bytes(size: ModelSize, width: int) -> float:
    """Bytes that one layer keeps of a token for its backward pass; `width` is 2 (bfloat16) or 4 (float32).

    Of each norm its input in float32, the normed state and the output; queries, keys, values and the attention's
    output; four times the feed-forward part's width.
    """
    norms = 2 * (4 + 2 * width) * size.hidden
    return norms + width * (2 * size.attention + 2 * size.keys + 4 * size.inner)


def working_bytes(size: ModelSize, width: int) -> float:
    """Bytes of a token that live at one time in a forward pass that keeps nothing: about the feed-forward part's."""
    return width * (3 * size.inner + 2 * size.hidden) + 4.0 * size.hidden


def cache_bytes(size: ModelSize, width: int) -> float:
    """Bytes of one token's keys and values in all layers."""
    return 2.0 * width * size.layers * size.keys
