"""Rows that decode together: prompts padded on the left, each different one read once, then a token after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tandem.rollout.next_token import LowerLayers, NextToken

Ids = Sequence[int]


class Decoding:
    """Reads prompts, and then the tokens that are sampled. `rows` [n] are those of the prompts that go on.

    A row that stops leaves before its last token is read; or after it, where other models share the policy's lower
    layers, and what those make of every token is kept.
    """

    rows: Tensor
    logits: Tensor
    """[n, V]: of each row's next token."""

    def __init__(self, policy: NextToken, prompts: Sequence[Ids], longest: int) -> None:
        """`longest` is how many tokens may follow a prompt."""
        different = list(dict.fromkeys(prompts))
        ids, mask = _pad_left(different, policy.device)
        self._policy = policy
        self._width = ids.shape[1]
        self._cache = policy.new_cache(self._width + longest)
        self._positions = mask.sum(1)
        # [n, prompts + longest], or None where no prompt needs padding.
        self._mask = _mask_ahead(mask, longest)
        self.rows = torch.arange(len(prompts), device=policy.device)
        self.logits = policy.next_logits(ids, self._mask_so_far, (mask.cumsum(1) - 1).clamp(min=0), self._cache)
        numbers = {prompt: number for number, prompt in enumerate(different)}
        of_row = torch.tensor([numbers[prompt] for prompt in prompts], device=policy.device)
        self._kept = None if policy.below is None else _Kept(policy.below, of_row, longest)
        if len(different) < len(prompts):
            self._select(of_row)
            self.logits = self.logits[of_row]

    def go_on(self, tokens: Tensor, stopped: Tensor) -> None:
        """Add a token [n] to every row. Those that it was the last one of, `stopped` [n], leave; some must stay."""
        staying = _staying(stopped) if bool(stopped.any()) else None
        if staying is not None and self._kept is None:
            self._leave(staying)
            tokens = tokens[staying]
        self.logits = self._policy.next_logits(*self._one_more(tokens))
        if self._kept is not None:
            self._kept.add(self.rows)
            if staying is not None:
                self._leave(staying)
                self.logits = self.logits[staying]

    def end(self, tokens: Tensor) -> None:
        """Add a token [n] to every row, the last of each: nothing is asked of it but what is kept."""
        if self._kept is not None:
            self._kept.add_last(self.rows, *self._one_more(tokens))

    def lower(self, lengths: Sequence[tuple[int, int]]) -> list[Tensor]:
        """What was kept of each text, [L, H], by the lengths of its prompt and response; nothing where nothing was."""
        return [] if self._kept is None else self._kept.of(lengths)

    def _one_more(self, tokens: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Any]:
        """What a policy is given to read a token [n] more of every row."""
        self._width += 1
        places, self._positions = self._positions[:, None], self._positions + 1
        return tokens[:, None], self._mask_so_far, places, self._cache

    @property
    def _mask_so_far(self) -> Tensor | None:
        return None if self._mask is None else self._mask[:, : self._width]

    def _leave(self, staying: Tensor) -> None:
        self.rows = self.rows[staying]
        self._select(staying)

    def _select(self, rows: Tensor) -> None:
        """Let what was read as row n be what was read as row `rows[n]`."""
        self._cache.batch_select_indices(rows)
        self._positions = self._positions[rows]
        self._mask = None if self._mask is None else self._mask[rows]


class _Kept:
    """What lower layers made of prompts [different, P, H], padded on the left, and of the tokens after [B, T, H]."""

    def __init__(self, layers: LowerLayers, of_row: Tensor, longest: int) -> None:
        """After the policy has read the prompts; `of_row` [B] says which is each row's."""
        self._layers = layers
        self._of_row = of_row
        self._prompts = layers.last()
        self._responses = self._prompts.new_zeros(len(of_row), longest, self._prompts.shape[2])
        self._length = 0

    def add(self, rows: Tensor) -> None:
        """After the policy has read a token more of some rows [n]."""
        self._put(rows, self._layers.last())

    def add_last(self, rows: Tensor, *asked: Any) -> None:
        """Where the policy is not asked what follows it."""
        self._put(rows, self._layers.lower(*asked))

    def _put(self, rows: Tensor, made: Tensor) -> None:
        self._responses[rows, self._length] = made[:, 0]
        self._length += 1

    def of(self, lengths: Sequence[tuple[int, int]]) -> list[Tensor]:
        width = self._prompts.shape[1]
        return [
            torch.cat([self._prompts[number, width - prompt :], self._responses[row, :response]])
            for row, (number, (prompt, response)) in enumerate(zip(self._of_row.tolist(), lengths, strict=True))
        ]


def _staying(stopped: Tensor) -> Tensor:
    """The rows that go on, those from the end in the places of those that stopped: few have to move."""
    staying = (~stopped).nonzero().squeeze(1)
    count = len(staying)
    places = torch.arange(count, device=stopped.device)
    places[stopped[:count]] = staying[staying >= count]
    return places


def _pad_left(rows: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, P] and mask [B, P] with every row's last token in the last column."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(width, device=device)[None, :] >= width - lengths[:, None]
    return ids, mask.long()


def _mask_ahead(mask: Tensor, following: int) -> Tensor | None:
    """The prompts' mask with so many columns of response to come, or None where nothing is padded."""
    if bool(mask.all()):
        return None
    return torch.cat([mask, mask.new_ones(len(mask), following)], dim=1)
