"""Responses before and after training, side by side, for the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tandem.view.reading import RunRecord
from tandem.view.sample_index import IndexedFile, SampleIndex, sample_files

LONGEST_TEXT = 3000


@dataclass(frozen=True)
class Pair:
    """Rows of two responses to one prompt, before and after, and by how much the later one scored better."""

    before: int
    after: int
    gain: float


def before_and_after(run: RunRecord) -> dict[str, Any]:
    """Responses to the same held-out prompts at the beginning and at the end, from the largest gain to the largest
    loss; empty where there are none."""
    samples, evaluations = SampleIndex(run), [file for file in sample_files(run.path) if file.kind == "heldout"]
    found = samples.refresh([evaluations[0], evaluations[-1]]) if len(evaluations) > 1 else []
    if len(found) < 2:
        return {}
    first, last = found
    pairs = sorted(pairs_of(first, last), key=lambda pair: -pair.gain)
    places = {"largest gain": 0.0, "upper quartile": 0.25, "middle": 0.5, "lower quartile": 0.75, "largest loss": 1.0}
    chosen = {round(share * (len(pairs) - 1)): name for name, share in reversed(places.items())} if pairs else {}

    def said(indexed: IndexedFile, row: int) -> dict[str, Any]:
        sample = samples.sample(indexed.file.name, row)
        return {"response": cut(sample.response), "score": sample.score, "scores": sample.scores}

    return {
        "before": first.file.label,
        "after": last.file.label,
        "count": len(pairs),
        "rows": [
            {
                "place": name,
                "prompt": cut(first.entries[pairs[at].before].prompt),
                "gain": pairs[at].gain,
                "before": said(first, pairs[at].before),
                "after": said(last, pairs[at].after),
            }
            for at, name in sorted(chosen.items())
        ],
    }


def pairs_of(first: IndexedFile, last: IndexedFile) -> list[Pair]:
    """The first response to each prompt with the first, the second with the second, where both have a score."""
    earlier: dict[str, list[tuple[int, float]]] = {}
    for row, entry in enumerate(first.entries):
        if entry.score is not None:
            earlier.setdefault(entry.prompt, []).append((row, entry.score))
    pairs = []
    for row, entry in enumerate(last.entries):
        if entry.score is not None and earlier.get(entry.prompt):
            before, score = earlier[entry.prompt].pop(0)
            pairs.append(Pair(before, row, entry.score - score))
    return pairs


def cut(text: str) -> str:
    """A text as long as a page shows it."""
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} [...]"
