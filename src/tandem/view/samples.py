"""A saved sample: parsed, and as the page shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.view.pieces import pieces_of
from tandem.view.quantities import QUANTITIES, Numbers, Quantity, TokenNumbers, outcomes
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

    def quantity(self, quantity: Quantity) -> Numbers:
        """[T], None where it cannot be told."""
        return quantity.compute(self.numbers)


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
        final_value=number_or_none(row.get("final_value")),
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
        "quantities": {quantity.name: short(sample.quantity(quantity)) for quantity in QUANTITIES},
        "outcomes": short(outcomes(sample.numbers)),
        "targets": short(sample.numbers["returns"]),
    }


def short(values: Sequence[float | None]) -> Numbers:
    """To the six decimals that runs are saved with."""
    return [None if value is None else round(value, 6) for value in values]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _numbers(value: Any, length: int) -> Numbers:
    """So many numbers, None for those that are missing."""
    found = [number_or_none(item) for item in _list(value)[:length]]
    return found + [None] * (length - len(found))
