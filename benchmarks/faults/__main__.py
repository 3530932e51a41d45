"""Ends real runs in every way that is known, and writes what was lost: docs/reliability.md and .json.

usage: python -m faults [KILLS]
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from faults.disk import run_full
from faults.report import page
from faults.runs import Story, Task, in_one_piece, prepare, tasks, told_by_signals
from faults.slow import run_slow_update
from faults.suites import run_suite

DOCS = Path(__file__).parents[2] / "docs"
LIVES = 6
SUITES = [
    ("test_resume.py", "damaged or two_runs"),
    ("test_faults.py", ""),
    ("test_rewards.py", ""),
    ("test_remote_rewards.py", ""),
    ("test_bad_input.py", ""),
    ("test_properties.py", ""),
]


def main(kills: int) -> int:
    with tempfile.TemporaryDirectory(prefix="tandem-faults-") as scratch:
        folder = Path(scratch)
        prepare(folder)
        todo = tasks(folder)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda task: in_one_piece(task, folder), todo))
            jobs = [(task, signal.SIGKILL, seed) for task, seed in _rounds(todo, -(-kills // LIVES))]
            jobs += [(todo[0], number, seed) for number in (signal.SIGTERM, signal.SIGINT) for seed in (100, 101)]
            stories = list(pool.map(lambda job: _told(folder, *job), jobs))
        found: dict[str, Any] = {
            "stories": [asdict(story) | {"signal": job[1].name} for job, story in zip(jobs, stories, strict=True)],
            "slow_update": asdict(run_slow_update(folder)),
            "full_disk": (full := run_full(todo[0], folder)) and asdict(full),
        }
    found["suites"] = [asdict(run_suite(*suite)) for suite in SUITES]
    DOCS.mkdir(exist_ok=True)
    (DOCS / "reliability.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text, lost = page(found)
    (DOCS / "reliability.md").write_text(text, encoding="utf-8")
    print("\n".join(lost) or "nothing was lost")
    return 1 if lost else 0


def _rounds(todo: list[Task], stories: int) -> list[tuple[Task, int]]:
    return [(todo[number % len(todo)], number // len(todo)) for number in range(stories)]


def _told(folder: Path, task: Task, number: signal.Signals, seed: int) -> Story:
    story = told_by_signals(task, folder, number, LIVES, seed)
    print(f"{task.name}, {number.name}: {len(story.ends)} ends, {story.differences or 'identical'}", flush=True)
    return story


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 60))
