"""The index of all samples that a run saved, so that each is read in full only when it is asked for."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem.view.quantities import QUANTITIES, Numbers, Quantity
from tandem.view.reading import FAULTS, ROLLOUTS, RunRecord, objects_of, parse_object
from tandem.view.samples import Sample, parse_sample, short

_FILE_NAME = re.compile(r"(step|heldout)_(\d+|before|after)")
# Of each sample so many tokens, evenly spaced, tell how wide a quantity spreads over the run.
_TOKENS_FOR_SCALE = 16
# Colours are full at this quantile of the distances from the neutral point.
_FULL_COLOUR = 0.98


@dataclass(frozen=True)
class Entry:
    """A sample in the index: where it stands in its file, and what it is searched and sorted by.

    `extremes` holds, for each quantity, the token's value that is furthest from the neutral point; `spread` some of
    its values, to scale colours by. What cannot be told is NaN.
    """

    offset: int
    size: int
    prompt: str
    response: str
    score: float | None
    ended: bool | None
    tokens: int
    kl: float
    extremes: tuple[float, ...]
    spread: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class SampleFile:
    """The samples of one step or evaluation; `order` places it in the run's course."""

    name: str
    path: Path
    kind: str
    label: str
    order: tuple[float, int]


@dataclass(frozen=True)
class IndexedFile:
    file: SampleFile
    stamp: tuple[int, int]
    entries: tuple[Entry, ...]
    unreadable: int


class SampleIndex:
    """An index of a run's samples that is built in one streaming pass, and again for the files that changed."""

    def __init__(self, run: RunRecord) -> None:
        self._run = run
        self._files: list[IndexedFile] = []
        self._lock = threading.Lock()

    def refresh(self, files: Sequence[SampleFile] | None = None) -> list[IndexedFile]:
        """Read what is new, of these files or of all, in the order of the run's course."""
        with self._lock:
            known = {indexed.file.name: indexed for indexed in self._files}
            found = []
            for file in sample_files(self._run.path) if files is None else files:
                try:
                    stamp = _stamp(file.path)
                    earlier = known.get(file.name)
                    found.append(earlier if earlier and earlier.stamp == stamp else self._read(file, stamp))
                except OSError:
                    continue
            self._files = found
            return found

    @property
    def files(self) -> list[IndexedFile]:
        return self._files

    def sample(self, name: str, row: int) -> Sample:
        """One sample in full. Raises LookupError where there is none, or none any more."""
        indexed = next((one for one in self._files if one.file.name == name), None)
        if indexed is None or not 0 <= row < len(indexed.entries):
            raise LookupError(f"{name} has no sample {row}")
        entry = indexed.entries[row]
        try:
            with indexed.file.path.open("rb") as file:
                file.seek(entry.offset)
                found = parse_object(file.read(entry.size))
        except OSError:
            found = None
        sample = None if found is None else parse_sample(found, self._run)
        if sample is None:
            raise LookupError(f"{name} has changed since it was indexed; load the page again")
        return sample

    def _read(self, file: SampleFile, stamp: tuple[int, int]) -> IndexedFile:
        entries, unreadable = [], 0
        for offset, size, row in objects_of(file.path):
            sample = None if row is None else parse_sample(row, self._run)
            if sample is not None:
                entries.append(_entry(sample, offset, size))
            elif row is None or file.kind != "fault":
                unreadable += 1
        return IndexedFile(file, stamp, tuple(entries), unreadable)


def sample_files(run: Path) -> list[SampleFile]:
    """The files of samples, in the order of the run's course: an evaluation after the step that it measures.

    A link that leads out of its folder is no sample of the run.
    """
    found = [
        _sample_file(path, kind)
        for kind in (ROLLOUTS, FAULTS)
        for path in (run / kind).glob("*.jsonl")
        if path.resolve().parent == (run / kind).resolve()
    ]
    return sorted((file for file in found if file is not None), key=lambda file: (file.order, file.name))


def _sample_file(path: Path, folder: str) -> SampleFile | None:
    match = _FILE_NAME.fullmatch(path.stem)
    if match is None:
        return None
    what, when = match.groups()
    step = {"before": 0.0, "after": float("inf")}.get(when) if not when.isdigit() else float(when)
    assert step is not None
    if folder == FAULTS:
        return SampleFile(f"fault_{when}", path, "fault", f"step {int(step)}, skipped", (step, 1))
    if what == "step":
        return SampleFile(path.stem, path, "step", f"step {int(step)}", (step, 0))
    moment = f"after step {int(step)}" if when.isdigit() else f"{when} training"
    return SampleFile(path.stem, path, "heldout", f"held out, {moment}", (step, 2))


def index_content(files: Sequence[IndexedFile]) -> dict[str, Any]:
    """The index as the page gets it: a column for each thing that samples are searched and sorted by."""
    entries = [(place, entry) for place, indexed in enumerate(files) for entry in indexed.entries]
    prompts: dict[str, int] = {}
    return {
        "files": [
            {
                "name": indexed.file.name,
                "label": indexed.file.label,
                "kind": indexed.file.kind,
                "samples": len(indexed.entries),
            }
            for indexed in files
        ],
        "unreadable": sum(indexed.unreadable for indexed in files),
        "file": [place for place, _ in entries],
        "prompt": [prompts.setdefault(entry.prompt, len(prompts)) for _, entry in entries],
        "prompts": list(prompts),
        "response": [entry.response for _, entry in entries],
        "score": [entry.score for _, entry in entries],
        "ended": [entry.ended for _, entry in entries],
        "tokens": [entry.tokens for _, entry in entries],
        "kl": short(np.array([entry.kl for _, entry in entries])),
        "extremes": {
            quantity.name: short(np.array([entry.extremes[place] for _, entry in entries]))
            for place, quantity in enumerate(QUANTITIES)
        },
        "quantities": [
            _quantity_content(quantity, [value for _, entry in entries for value in entry.spread[place]])
            for place, quantity in enumerate(QUANTITIES)
        ],
    }


def _quantity_content(quantity: Quantity, spread: Sequence[float]) -> dict[str, Any]:
    """A quantity with the neutral point of its colours and the distance at which they are full."""
    values = np.array(spread)
    middle = {"zero": 0.0, "one": 1.0, "mean": float(values.mean()) if spread else 0.0}[quantity.middle]
    limit = float(np.quantile(abs(quantity.distances(values, middle)), _FULL_COLOUR)) if spread else 0.0
    return {
        "name": quantity.name,
        "title": quantity.title,
        "formula": quantity.formula,
        "meaning": quantity.meaning,
        "unit": quantity.unit,
        "scale": quantity.scale,
        "middle": middle,
        "limit": max(limit, quantity.least),
    }


def _entry(sample: Sample, offset: int, size: int) -> Entry:
    numbers = [quantity.of(sample.numbers) for quantity in QUANTITIES]
    present = {q.name: values[~np.isnan(values)] for q, values in zip(QUANTITIES, numbers, strict=True)}
    return Entry(
        offset=offset,
        size=size,
        prompt=sample.prompt,
        response=sample.response,
        score=sample.score,
        ended=sample.ended,
        tokens=len(sample.tokens),
        kl=float(present["kl"].sum()) if present["kl"].size else np.nan,
        extremes=tuple(_furthest(quantity, present[quantity.name]) for quantity in QUANTITIES),
        spread=tuple(
            tuple(values[:: -(-len(values) // _TOKENS_FOR_SCALE) or 1].tolist()) for values in present.values()
        ),
    )


def _furthest(quantity: Quantity, values: Numbers) -> float:
    """The value furthest from the neutral point; the largest, where that point is the run's mean."""
    if not values.size:
        return np.nan
    if quantity.middle == "mean":
        return float(values.max())
    middle = 1.0 if quantity.middle == "one" else 0.0
    return float(values[abs(quantity.distances(values, middle)).argmax()])


def _stamp(path: Path) -> tuple[int, int]:
    """Tells a file from what it was before."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size
