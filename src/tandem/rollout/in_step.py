"""Sampling in several processes from a policy whose weights are cut over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tandem.rollout.next_token import NextToken
from tandem.world import world


class InStep:
    """A policy that is gathered whole for a batch of responses, or else a layer at a time, at every token.

    A layer is gathered from all processes, so all of them make each pass together then. Before each they agree that
    somebody has one to make, and those that have none go along with a token of their own, whose answer is dropped.
    """

    def __init__(self, policy: NextToken, by_layer: Callable[[], bool]) -> None:
        """`by_layer` is asked before each batch; where one process says yes, all do so."""
        self._policy = policy
        self._wants_layers = by_layer
        self._by_layer = False

    @property
    def device(self) -> torch.device:
        return self._policy.device

    @property
    def below(self) -> None:
        """Nothing: several processes share no activations."""

    @contextmanager
    def gathered(self) -> Iterator[None]:
        self._by_layer = world().any(self._wants_layers())
        if not self._by_layer:
            with self._policy.gathered():
                yield
            return
        yield
        while self._somebody_goes_on(False):
            self._go_along()

    def new_cache(self, capacity: int) -> Any:
        return self._policy.new_cache(capacity)

    def next_logits(self, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Any) -> Tensor:
        if self._by_layer:
            self._somebody_goes_on(True)
        return self._policy.next_logits(ids, attention_mask, position_ids, cache)

    def draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        return self._policy.draw(logits, uniform)

    def _somebody_goes_on(self, this_one: bool) -> bool:
        return bool(world().sum(torch.tensor(int(this_one))))

    def _go_along(self) -> None:
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self._policy.next_logits(token, None, token, self.new_cache(1))
