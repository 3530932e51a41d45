"""Responses before and after training, side by side, for the report."""

from __future__ import annotations

from typing import Any

from tandem.view.reading import RunRecord
from tandem.view.sample_index import IndexedFile, SampleIndex, sample_files

_LONGEST_TEXT = 3000


def before_and_after(run: RunRecord) -> dict[str, Any]:
    """Responses to the same held-out prompts at the beginning and at the end, from the largest gain to the largest
    loss; empty where there are none."""
    samples, evaluations = SampleIndex(run), [file for file in sample_files(run.path) if file.kind == "heldout"]
    found = samples.refresh([evaluations[0], evaluations[-1]]) if len(evaluations) > 1 else []
    if len(found) < 2:
        return {}
    first, last = found
    both = sorted(_pairs(first, last), key=lambda pair: pair[1][1] - pair[0][1], reverse=True)
    places = {"largest gain": 0.0, "upper quartile": 0.25, "middle": 0.5, "lower quartile": 0.75, "largest loss": 1.0}
    chosen = {round(share * (len(both) - 1)): name for name, share in reversed(places.items())} if both else {}
    return {
        "before": first.file.label,
        "after": last.file.label,
        "count": len(both),
        "rows": [
            _pair_content(name, samples, (first, both[at][0][0]), (last, both[at][1][0]))
            for at, name in sorted(chosen.items())
        ],
    }


def _pairs(first: IndexedFile, last: IndexedFile) -> list[tuple[tuple[int, float], tuple[int, float]]]:
    """Rows and scores of responses to the same prompt, the first to the first, the second to the second."""
    places: dict[str, list[tuple[int, float]]] = {}
    for row, entry in enumerate(first.entries):
        if entry.score is not None:
            places.setdefault(entry.prompt, []).append((row, entry.score))
    found = []
    for row, entry in enumerate(last.entries):
        if places.get(entry.prompt) and entry.score is not None:
            found.append((places[entry.prompt].pop(0), (row, entry.score)))
    return found


def _pair_content(
    name: str, samples: SampleIndex, before: tuple[IndexedFile, int], after: tuple[IndexedFile, int]
) -> dict[str, Any]:
    sides = {"before": before, "after": after}
    full = {side: samples.sample(indexed.file.name, row) for side, (indexed, row) in sides.items()}
    return {
        "place": name,
        "prompt": _cut(full["before"].prompt),
        **{
            side: {"response": _cut(sample.response), "score": sample.score, "scores": sample.scores}
            for side, sample in full.items()
        },
    }


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} [...]"
