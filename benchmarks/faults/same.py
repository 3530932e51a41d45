"""Whether two runs are the same run, to the last bit of every number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tandem.run.folder import read_metrics

_CLOCKED = (
    "time/",
    "throughput/",
    "memory/",
    "cluster",
    "seconds",
    "peak_memory_gib",
    "health/memory_grows",
    "health/throughput_falls",
)


def differences(one: Path, other: Path) -> list[str]:
    """What differs in metrics, summary, samples and saved models of two finished runs, but for the clock.

    Of pipelines, what differs in any of their stages and in the summary of the whole.
    """
    stages = sorted({path.parent.name for run in (one, other) for path in run.glob("*/metrics.jsonl")})
    if stages:
        found = [f"{stage}/{name}" for stage in stages for name in _of_run(one / stage, other / stage, (one, other))]
        return [*found, *_of_summary(one, other, (one, other))]
    return list(_of_run(one, other, (one, other)))


def _of_run(one: Path, other: Path, places: tuple[Path, Path]) -> Iterator[str]:
    if timeless(read_metrics(one)) != timeless(read_metrics(other)):
        yield "metrics.jsonl"
    yield from _of_summary(one, other, places)
    yield from _of_samples(one, other)
    yield from _of_models(one, other)


def timeless(tree: Any) -> Any:
    """What a run wrote, without what depends on the clock, or on what befell its workers."""
    if isinstance(tree, dict):
        return {name: timeless(value) for name, value in tree.items() if not name.startswith(_CLOCKED)}
    if isinstance(tree, list):
        return [timeless(value) for value in tree if not (isinstance(value, dict) and value.get("about") == "machine")]
    return tree


def _of_summary(one: Path, other: Path, places: tuple[Path, Path]) -> Iterator[str]:
    """`places` are where the two runs are kept, which their summaries may name."""
    texts = [(run / "summary.json").read_text(encoding="utf-8") for run in (one, other)]
    here = [json.loads(text.replace(str(place), "RUN")) for text, place in zip(texts, places, strict=True)]
    if timeless(here[0]) != timeless(here[1]):
        yield "summary.json"


def _of_samples(one: Path, other: Path) -> Iterator[str]:
    for name in sorted(_names(one, "rollouts/*.jsonl") | _names(other, "rollouts/*.jsonl")):
        paths = one / name, other / name
        if not all(path.is_file() for path in paths) or paths[0].read_bytes() != paths[1].read_bytes():
            yield name


def _of_models(one: Path, other: Path) -> Iterator[str]:
    names = _names(one, "*model/*.safetensors") | _names(other, "*model/*.safetensors")
    if not names:
        yield "no model"
    for name in sorted(names):
        if not (one / name).is_file() or not (other / name).is_file() or not _same_tensors(one / name, other / name):
            yield name


def _same_tensors(one: Path, other: Path) -> bool:
    mine, theirs = load_file(one), load_file(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def _names(run: Path, pattern: str) -> set[str]:
    return {str(path.relative_to(run)) for path in run.glob(pattern)}
