"""What a piece of work computed, counted rather than timed, so that a test can hold it on any machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tandem.models.trunk import Trunk


@dataclass
class Counts:
    """`layer_positions`: positions, padding included, that went forward through one layer, summed over layers;
    `head_rows`: rows that were multiplied with a vocabulary; `largest_logits_bytes`: of the largest such product.
    """

    layer_positions: int = 0
    head_rows: int = 0
    largest_logits_bytes: int = 0


@contextmanager
def counting(trunks: Sequence[Trunk]) -> Iterator[Counts]:
    """Count what these models compute within."""
    counts = Counts()

    def through_layer(_: nn.Module, inputs: Any, keywords: dict[str, Any], __: Any) -> None:
        hidden = inputs[0] if inputs else keywords["hidden_states"]
        counts.layer_positions += hidden.shape[0] * hidden.shape[1]

    def through_head(_: nn.Module, __: Any, logits: Tensor) -> None:
        counts.head_rows += logits.numel() // logits.shape[-1]
        counts.largest_logits_bytes = max(counts.largest_logits_bytes, logits.numel() * logits.element_size())

    different = {id(trunk): trunk for trunk in trunks}.values()
    handles = [
        layer.register_forward_hook(through_layer, with_kwargs=True) for trunk in different for layer in trunk.layers
    ]
    heads = [trunk.model.get_output_embeddings() for trunk in different]
    handles += [head.register_forward_hook(through_head) for head in heads if head is not None]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
