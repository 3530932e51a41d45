"""A saved sample: parsed, and as the page shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tandem.view.pieces import pieces_of
from tandem.view.quantities import QUANTITIES, Numbers, TokenNumbers, outcomes
from tandem.view.reading import RunRecord, number_or_none

_ARRAYS = (
    "behaviour_logprobs",
    "logprobs",
    "reference_logprobs",
    "values",
    "rewards",
    "advantages",
    "returns",
)


@dataclass(frozen=True)
class Sample:
    """One saved response with its numbers; `tokens` is empty where a step came no further than sampling."""

    prompt: str
    response: str
    ended: bool | None
    score: float | None
    scores: Mapping[str, float | None]
    tokens: tuple[str, ...]
    numbers: TokenNumbers


def parse_sample(row: Mapping[str, Any], run: RunRecord) -> Sample | None:
    """A saved line as a sample; None where it is none. Arrays are brought to the number of tokens."""
    response = row.get("response")
    if not isinstance(response, str):
        return None
    tokens = tuple(str(token) for token in _list(row.get("tokens")))
    scores = row.get("scores")
    ended = row.get("ended")
    cut = ended is False and run.setting("advantage", "at_limit", "score") == "bootstrap"
    gamma = number_or_none(run.setting("advantage", "gamma", 1.0))
    numbers = TokenNumbers(
        length=len(tokens),
        arrays={name: _numbers(row[name], len(tokens)) for name in _ARRAYS if name in row},
        gamma=1.0 if gamma is None else gamma,
        bootstrapped=cut,
        final_value=number_or_nan(row.get("final_value")),
    )
    return Sample(
        prompt=str(row.get("prompt", "")),
        response=response,
        ended=ended if isinstance(ended, bool) else None,
        score=number_or_none(row.get("score")),
        scores={str(k): number_or_none(v) for k, v in scores.items()} if isinstance(scores, Mapping) else {},
        tokens=tokens,
        numbers=numbers,
    )


def sample_content(sample: Sample) -> dict[str, Any]:
    """What the page needs to show one sample."""
    pieces = pieces_of(sample.tokens, sample.response)
    return {
        "prompt": sample.prompt,
        "response": sample.response,
        "ended": sample.ended,
        "score": sample.score,
        "scores": sample.scores,
        "pieces": [piece.text for piece in pieces],
        "kinds": {index: piece.kind for index, piece in enumerate(pieces) if piece.kind != "text"},
        "quantities": {quantity.name: short(quantity.of(sample.numbers)) for quantity in QUANTITIES},
        "outcomes": short(outcomes(sample.numbers)),
        "targets": short(sample.numbers["returns"]),
    }


def short(values: Numbers) -> list[float | None]:
    """To the six decimals that runs are saved with, None for NaN."""
    return [None if value != value else round(value, 6) for value in values.tolist()]


def number_or_nan(value: Any) -> float:
    found = number_or_none(value)
    return np.nan if found is None else found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _numbers(value: Any, length: int) -> Numbers:
    """So many numbers, NaN for those that are missing or none."""
    found = np.full(length, np.nan)
    given = _list(value)[:length]
    try:
        found[: len(given)] = given
    except (ValueError, TypeError, OverflowError):
        found[: len(given)] = [number_or_nan(item) for item in given]
    return np.where(np.isfinite(found), found, np.nan)
