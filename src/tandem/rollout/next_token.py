"""What the generator needs of a policy: the logits of the next token, and a token drawn by them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class LowerLayers(Protocol):
    """A policy's lower layers, where other models share them: what they make of a text is kept for those."""

    def watched(self) -> AbstractContextManager[None]:
        """Within it `last` can be asked for."""
        ...

    def last(self) -> Tensor:
        """[B, S, H]: what they made of the ids of the policy's last pass."""
        ...

    def lower(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """[B, S, H] of ids [B, S], without the layers above; a cache grows in these layers alone."""
        ...

    def keep(self, texts: Sequence[tuple[int, ...]], lower: Sequence[Tensor]) -> None:
        """What they made of whole texts, [L, H] each."""
        ...


class NextToken(Protocol):
    """A policy as the generator sees it."""

    @property
    def device(self) -> torch.device: ...

    @property
    def below(self) -> LowerLayers | None:
        """None where no other model shares such layers."""
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """Within it tokens are asked for one by one, by each process as often as it likes."""
        ...

    def new_cache(self, capacity: int) -> Any:
        """An empty KV cache for rows of up to `capacity` tokens, with `batch_select_indices`."""
        ...

    def next_logits(self, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Any) -> Tensor:
        """Logits [B, V] of the distribution to sample the token after `ids` [B, S] from; the cache grows."""
        ...

    def draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """A token a row [B] from such logits, by numbers [B] from [0, 1), and their log-probabilities [B]."""
        ...
