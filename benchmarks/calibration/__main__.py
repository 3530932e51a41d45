"""How well health rules judge: docs/diagnosis/calibration.md and .json.

usage: python -m calibration MODEL SOURCE [--seeds N] [--only WORD ...] [--judge]

Runs every healthy case and every fault on every seed, one after the other, and keeps each run's rows in
runs/calibration/, so that it can be ended and begun again, and so that other thresholds can be tried on the same runs
(`--judge` runs nothing).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

from calibration import tables
from calibration.cases import FAULTS, HEALTHY, Case, Story, Table
from calibration.report import judged, of_folder, page, summary_of
from calibration.stories import run_story
from tandem.recipe import without_none

ROOT = Path(__file__).parents[2]
DOCS, RUNS = ROOT / "docs" / "diagnosis", ROOT / "runs" / "calibration"


def kept_at(case: Case, seed: int) -> Path:
    """Where the rows and the recipe of a run are kept."""
    name = "".join(letter if letter.isalnum() else "-" for letter in case.name.lower())
    return RUNS / ("faults" if case.rules else "healthy") / f"{case.place}-{name}-{seed}.json"


def finished(case: Case, seed: int, model: Path, source: Path) -> float:
    """Have a run's rows on disk; returns the seconds that it took, 0 where they were there."""
    path, started = kept_at(case, seed), time.monotonic()
    if path.exists():
        return 0.0
    if isinstance(case.run, Table):
        steps = tables.STEPS // 4 if case.rules else tables.STEPS
        rows, config = tables.rows_of(case.run, seed, steps, constant_rate=bool(case.rules))
        recipe = without_none(config.model_dump())
    else:
        rows, recipe = story_rows(case, seed, path.with_suffix(""), model, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps({"rows": rows, "recipe": recipe}), encoding="utf-8")
    aside.replace(path)
    return time.monotonic() - started


def story_rows(case: Case, seed: int, folder: Path, model: Path, source: Path) -> tuple[list[dict], dict]:
    """Run the story model in a process of its own; its folder is not kept."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    assert isinstance(case.run, Story)
    # A fork has the libraries loaded already, and what one run does to them ends with it.
    process = multiprocessing.get_context("fork").Process(
        target=run_story, args=(case.run, seed, model, source, folder, bool(case.rules))
    )
    process.start()
    process.join()
    if not (folder / "metrics.jsonl").exists():
        raise RuntimeError(f"{case.name}, seed {seed}: the run left no metrics")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    recipe = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    return rows, recipe


def all_runs(seeds: int, healthy_seeds: int, only: list[str]) -> Iterator[tuple[Case, int]]:
    """Everything on the first seed, then the faults on the others, then the healthy cases on theirs."""
    planned = [(case, 0) for case in [*FAULTS, *HEALTHY]]
    planned += [(case, seed) for seed in range(1, seeds) for case in FAULTS]
    planned += [(case, seed) for seed in range(1, healthy_seeds) for case in HEALTHY]
    for case, seed in planned:
        if not only or any(word in f"{case.place} {case.name}" for word in only):
            yield case, seed


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="calibration", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("--seeds", type=int, default=5, help="of each fault")
    parser.add_argument("--healthy-seeds", type=int, default=2, help="of each healthy case")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="folders of other healthy runs, to judge too")
    parser.add_argument("--judge", action="store_true", help="run nothing, judge what there is")
    given = parser.parse_args()
    runs = list(all_runs(given.seeds, given.healthy_seeds, given.only))
    for number, (case, seed) in enumerate(runs, start=1):
        if not given.judge:
            seconds = finished(case, seed, given.model, given.source)
            if seconds:
                print(f"{number}/{len(runs)}  {case.place}: {case.name}, seed {seed}  ({seconds:.0f} s)", flush=True)
    there = [(case, seed) for case, seed in runs if kept_at(case, seed).exists()]
    found = [judged(case, seed, json.loads(kept_at(case, seed).read_text(encoding="utf-8"))) for case, seed in there]
    everything = summary_of(found, [of_folder(path) for path in given.also])
    if given.only:
        print(page(everything))
        return 0
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "calibration.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    (DOCS / "calibration.md").write_text(page(everything), encoding="utf-8")
    print(everything["verdict"])
    return 0 if everything["reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
