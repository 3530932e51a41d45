"""The gold scorer: how positive a text is by VADER, a lexicon rated by people (Hutto and Gilbert 2014).

It labels the preference pairs and judges the result; the policy is never trained on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from tandem.errors import InputError


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError:
        raise InputError("the demo needs vaderSentiment: pip install 'tandem-rlhf[demo]'.") from None
    return SentimentIntensityAnalyzer()


def gold(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """VADER's compound score of each response alone, from -1 to 1."""
    del prompts, rows
    return [_analyzer().polarity_scores(response)["compound"] for response in responses]
