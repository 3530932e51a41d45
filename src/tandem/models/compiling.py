"""Layers computed by code that torch's compiler makes: between two products, one pass over memory in place of many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from tandem.models.cache import RoomyLayer

Forward = Callable[..., Any]
_VARIANTS = 64
"""How many ways a layer may be called, each with code of its own: with a gradient or without, by adapter, a token."""


def compile_layers(layers: nn.ModuleList) -> Callable[[], None]:
    """Let the layers of a decoder compute by compiled code; what is returned undoes it.

    Code is made at the first call of each kind, for all layers that are alike and for batches of any size. Two kinds
    stay as they are: a batch of a single row, and reading prompts into an empty cache.
    """
    compiled: dict[Any, Forward] = {}
    for place, layer in enumerate(layers):
        kind = type(layer).forward
        if kind not in compiled:
            compiled[kind] = torch.compile(kind, dynamic=True, recompile_limit=_VARIANTS)  # type: ignore[call-overload]
        layer.forward = _by_call(layer, place, compiled[kind])

    def undo() -> None:
        for layer in layers:
            del layer.forward

    return undo


def _by_call(layer: Any, place: int, compiled: Forward) -> Forward:
    """The forward of the layer in this place."""
    plain: Forward = layer.forward

    def forward(hidden_states: Tensor, *inputs: Any, **named: Any) -> Any:
        cache = next((given for given in (*inputs, *named.values()) if isinstance(given, Cache)), None)
        if hidden_states.shape[0] == 1:
            return plain(hidden_states, *inputs, **named)
        if cache is None:
            return compiled(layer, hidden_states, *inputs, **named)
        held = cache.layers[place]
        if type(held) is not RoomyLayer or not held.has_room or hidden_states.shape[1] > 1:
            return plain(hidden_states, *inputs, **named)

        # Code that is to do for every layer must not look for its own part of the cache.
        def own(given: Any) -> Any:
            return held if given is cache else given

        return compiled(layer, hidden_states, *map(own, inputs), **{name: own(given) for name, given in named.items()})

    return forward
