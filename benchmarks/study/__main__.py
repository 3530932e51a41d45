"""PPO, A2C, DPO and best-of-n on the demo's task at equal KL: docs/results/study.md, .json and .png.

usage: python -m study MODEL DEMO [DEMO ...]

MODEL is the model that the demos began with, a DEMO the folder of a finished `tandem demo`, one for each seed. What is
trained and sampled is kept in runs/study, so that it can be ended and begun again.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from study.best_of_n import candidates
from study.report import page, plot, summary_of
from study.training import JOINT_METHODS, ROOT, Demo, dpo_course, joint_course
from tandem.run import Progress

AT_ONCE = 2
RESULTS, RUNS = ROOT / "docs" / "results", ROOT / "runs" / "study"


def found(demo: Demo, part: str) -> Any:
    """What one method comes to on one seed; run where it has not been."""
    if part in JOINT_METHODS:
        course: Any = joint_course(demo, part)
    elif part == "DPO":
        course = dpo_course(demo)
    else:
        course = candidates(demo, Progress(Console(quiet=True)))
    print(f"seed {demo.seed}: {part}", flush=True)
    return course


def main() -> None:
    parser = argparse.ArgumentParser(prog="study", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("demos", type=Path, nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(1)
    demos = [Demo(given.model, folder.resolve(), RUNS / f"seed-{number}") for number, folder in enumerate(given.demos)]
    jobs = [(demo, part) for demo in demos for part in ("best of n", *JOINT_METHODS, "DPO")]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        courses = list(pool.map(lambda job: found(*job), jobs))
    everything = summary_of([(demo.seed, part, course) for (demo, part), course in zip(jobs, courses, strict=True)])
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "study.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "study.md").write_text(page(everything), encoding="utf-8")
    plot(everything, RESULTS / "study.png")


if __name__ == "__main__":
    main()
