"""How much texts differ from each other, by the runs of tokens that they are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations


def distinct_ngrams(texts: Sequence[Sequence[int]], size: int) -> float:
    """Of all runs of `size` tokens in the texts, the share of different ones; NaN where there is no such run.

    It falls as texts get longer or more, so compare it between as many texts of about one length.
    Source: Li et al. 2016, distinct-n.
    """
    found = [run for text in texts for run in ngrams(text, size)]
    return len(set(found)) / len(found) if found else math.nan


def distance_between(texts: Sequence[Sequence[int]], size: int) -> float:
    """How little two of the texts have in common, on average over all pairs: 0 where all are equal, 1 for nothing.

        1 - |A and B| / |A or B|, A and B the runs of `size` tokens of two texts

    A pair of which neither has such a run is left out; NaN where that leaves none. Source: Jaccard 1912.
    """
    sets = [set(ngrams(text, size)) for text in texts]
    apart = [1 - len(one & other) / len(one | other) for one, other in combinations(sets, 2) if one | other]
    return sum(apart) / len(apart) if apart else math.nan


def ngrams(text: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """The runs of `size` tokens of a text, in their order."""
    return [tuple(text[start : start + size]) for start in range(len(text) - size + 1)]
