"""The KV cache of sampling: room for the whole response is taken once, and each token is written into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values [B, heads, length, D] as views of room for `capacity` positions.

    transformers' own layer copies all that it holds for every token that is added, and again for every row that
    leaves.
    """

    keys: Any
    values: Any

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self.length = 0
        """How many positions are held. Compiled code is told this, and the room, but not `keys`, a view of the room.

        torch sometimes takes a tensor and what a view beside it is a view of for two, and then fails.
        """
        self._room: tuple[Tensor, Tensor] | None = None
        self.repeat: Any = None
        """What compiled code keeps of a token for the next one (`tandem.models.repeating`)."""

    @property
    def is_empty(self) -> bool:
        """Whether the next positions are a prompt's, the first."""
        return not self.is_initialized

    def make_room(self) -> bool:
        """Take room after the prompt; whether one more token fits into it."""
        if self._room is None:
            self._take_room(self.length)
        assert self._room is not None
        return self.length < self._room[0].shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add positions; returns all there are. The first ones, a prompt's, are kept as they come."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values, self.length = key_states, value_states, key_states.shape[2]
            return key_states, value_states
        start, end = self.length, self.length + key_states.shape[2]
        if self._room is None or self._room[0].shape[2] < end:
            self._take_room(end)
        assert self._room is not None
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:end] = states
        if torch.compiler.is_compiling():
            # What compiled code gives back besides its output costs as much as one of its steps.
            return self._room[0][:, :, :end], self._room[1][:, :, :end]
        self.show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Let row n be what row `indices[n]` was. Rows that stay where they are cost nothing; a row may be repeated."""
        if self._room is None or len(indices) > len(self._room[0]):
            self._take_room(self.length, indices)
            return
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(1)
        for room, held in zip(self._room, (self.keys, self.values), strict=True):
            room[moved, :, : self.length] = held[indices[moved]]
        # Code for a token is made for room of as many rows as there are, which is not a view to it.
        self._room = (self._room[0][: len(indices)].data, self._room[1][: len(indices)].data)
        self.show(self.length)

    def show(self, length: int) -> None:
        """Hold what lies in the room so far; compiled code writes into it and leaves this to its caller."""
        assert self._room is not None
        self.length = length
        self.keys, self.values = (room[:, :, :length] for room in self._room)

    def _take_room(self, length: int, indices: Tensor | None = None) -> None:
        rows = len(self.keys) if indices is None else len(indices)
        rooms = []
        for held in (self.keys, self.values):
            room = held.new_empty(rows, held.shape[1], max(self._capacity, length), held.shape[3])
            room[:, :, : self.length] = held if indices is None else held[indices]
            rooms.append(room)
        self._room = (rooms[0], rooms[1])
        self.show(self.length)


def roomy_cache(model: PreTrainedModel, capacity: int) -> DynamicCache:
    """An empty cache for sequences of up to `capacity` tokens.

    Layers of other kinds than full attention (a sliding window, a recurrent state) are transformers' own.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
