"""How much a text says again what it has said already."""

from __future__ import annotations

import torch
from torch import Tensor


def repeated_ngrams(ids: Tensor, mask: Tensor, size: int) -> tuple[int, int]:
    """Of all runs of `size` tokens in the responses, how many stood earlier in the same response; and how many in all.

    ids [B, T] int64; mask [B, T] true over each response, from its first token on. The share of the first in the
    second is 0 for a text that never repeats itself and near 1 for one that says a word over and over.
    Source: the rep-n of Welleck et al. 2019, over tokens.
    """
    rows, width = ids.shape
    starts = width - size + 1
    if starts < 1:
        return 0, 0
    whole = mask[:, size - 1 :]
    hashed = torch.zeros(rows, starts, dtype=torch.int64, device=ids.device)
    for offset in range(size):
        # Overflow wraps around: a polynomial over the ring of 64-bit integers, so that equal runs have equal numbers.
        hashed = hashed * _BASE + ids[:, offset : offset + starts] + 1
    alone = torch.arange(starts, device=ids.device).expand(rows, starts)
    ordered, order = torch.where(whole, hashed, alone).sort(dim=1)
    real = whole.gather(1, order)
    again = (ordered[:, 1:] == ordered[:, :-1]) & real[:, 1:] & real[:, :-1]
    return int(again.sum()), int(whole.sum())


_BASE = 6364136223846793005
