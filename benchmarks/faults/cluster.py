"""Kills each kind of process of real runs over Ray, and writes what was lost: docs/results/cluster-faults.md, .json.

usage: python -m faults.cluster [TIMES]
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from faults.runs import command, environment, prepare
from faults.same import differences
from tandem.cluster.events import read_events
from tandem.errors import InputError
from tandem.run.folder import read_metrics
from tandem.run.lock import NAME as LOCK
from tandem.run.lock import claimed

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SAMPLES_PER_TASK = 4
EVERY_STEPS = 5
OVER_RAY = [
    "--cluster=ray",
    "--cluster.generators=2",
    "--cluster.reward_workers=2",
    f"--cluster.samples_per_task={SAMPLES_PER_TASK}",
    "--cluster.silent_seconds=60",
]
COMMAND = "the command"
REWARD = "def reward(prompts, responses, rows):\n    return [float(len(response) % 7) for response in responses]\n"


@dataclass(frozen=True)
class Placing:
    """How a run is placed over Ray, and the run without a cluster that it must equal."""

    name: str
    over_ray: Sequence[str]
    alone: Sequence[str]


ONE_TRAINER = Placing("one trainer", OVER_RAY, [f"--rollout.sequences_per_batch={SAMPLES_PER_TASK}"])
TWO_TRAINERS = Placing(
    "two trainers",
    [*OVER_RAY, "--processes=2", "--cluster.samples_per_task=1"],
    ["--processes=2", "--rollout.sequences_per_batch=1"],
)


@dataclass(frozen=True)
class Case:
    """What is done to which process, which is known by how its title begins, and how the commands end that it takes.

    Of two trainers it is not the first.
    """

    name: str
    title: str
    number: signal.Signals
    placing: Placing = ONE_TRAINER
    statuses: Sequence[int] = (0,)


CASES = [
    Case("a generator is killed (`kill -9`)", "ray::GeneratorWorker", signal.SIGKILL),
    Case("a generator hangs (SIGSTOP)", "ray::GeneratorWorker", signal.SIGSTOP),
    Case("a reward worker is killed", "ray::RewardWorker", signal.SIGKILL),
    Case("a reward worker hangs", "ray::RewardWorker", signal.SIGSTOP),
    Case("the trainer is killed", "ray::Trainer", signal.SIGKILL),
    Case("one of two trainers is killed, not the first", "ray::Trainer", signal.SIGKILL, TWO_TRAINERS),
    Case("the command is killed, then `--resume`", COMMAND, signal.SIGKILL, statuses=(-signal.SIGKILL, 0)),
    Case("the command gets SIGTERM, then `--resume`", COMMAND, signal.SIGTERM, statuses=(130, 0)),
]


@dataclass(frozen=True)
class Story:
    """A run that was struck once: what its folder tells of it, and how it differs in the end from one left alone."""

    case: str
    after_step: int
    steps_again: int
    lost_samples: int
    events: Sequence[str]
    statuses: Sequence[int]
    differences: Sequence[str]


def main(times: int) -> int:
    if any(processes(case.title) for case in CASES if case.title != COMMAND):
        print("there are runs over Ray on this machine already, which would be struck too; end them first")
        return 2
    with tempfile.TemporaryDirectory(prefix="tandem-faults-") as scratch:
        folder = Path(scratch)
        prepare(folder)
        (folder / "own.py").write_text(REWARD, encoding="utf-8")
        words = words_of(folder)
        for placing in (ONE_TRAINER, TWO_TRAINERS):
            alone = [*placing.alone, f"--run.directory={folder / placing.name}"]
            subprocess.run(command(*words, *alone), env=environment(), check=True, capture_output=True)
        stories = []
        for number in range(times):
            for case in CASES:
                run, untouched = folder / f"{CASES.index(case)}_{number}", folder / case.placing.name
                stories.append(struck(case, words, run, number, untouched))
                print(stories[-1], flush=True)
    lost = [f"{story.case}: {', '.join(story.differences)} differ" for story in stories if story.differences]
    right = {case.name: list(case.statuses) for case in CASES}
    lost += [f"{story.case}: ended with {story.statuses}" for story in stories if story.statuses != right[story.case]]
    RESULTS.mkdir(exist_ok=True)
    found = json.dumps([asdict(story) for story in stories], indent=1)
    (RESULTS / "cluster-faults.json").write_text(found + "\n", encoding="utf-8")
    (RESULTS / "cluster-faults.md").write_text(page(stories), encoding="utf-8")
    print("\n".join(lost) or "nothing was lost")
    return 1 if lost else 0


def words_of(folder: Path) -> list[str]:
    words = ["ppo", f"--policy.model={folder / 'model'}", f"--rewards.0.function={folder / 'own.py'}:reward"]
    words += [f"--data.prompts={folder / 'prompts.jsonl'}", "--value.start=policy", "--steps=16", "--run.trackers=[]"]
    words += ["--rollout.prompts_per_step=8", "--rollout.responses_per_prompt=4", "--rollout.max_new_tokens=48"]
    words += ["--rewards.0.timeout_seconds=20"]
    return [*words, f"--checkpoints.every_steps={EVERY_STEPS}", "--policy.lr=0.001"]


def struck(case: Case, words: Sequence[str], run: Path, seed: int, untouched: Path) -> Story:
    """One run, struck once at a random moment after its first step, brought to its end and held against another."""
    moment = random.Random(seed)
    statuses, started = [], start([*words, *case.placing.over_ray, f"--run.directory={run}"])
    while started.poll() is None and len(rows(run)) == 0:
        time.sleep(0.005)
    time.sleep(moment.uniform(0.0, 3.0))
    if started.poll() is not None:
        raise RuntimeError(f"the run ended by itself, with status {started.returncode}, before it was struck")
    victims = [started.pid] if case.title == COMMAND else processes(case.title)
    if case.placing is TWO_TRAINERS:
        victims.remove(holder(run))
    after = len(rows(run))
    os.kill(moment.choice(victims), case.number)
    statuses.append(started.wait())
    events = read_events(run)
    saved = [event["goes_on_after_step"] for event in events if event["event"] == "trainer lost"]
    if case.title == COMMAND:
        until_free(run, seconds=120)
        saved = [max((int(path.name[5:]) for path in run.glob("checkpoints/step_*")), default=0)]
        statuses.append(start(["ppo", "--resume", str(run)]).wait())
    return Story(
        case=case.name,
        after_step=after,
        steps_again=max(0, after - saved[0]) if saved else 0,
        lost_samples=sum(event.get("lost_samples", 0) for event in events),
        events=[event["event"] for event in events],
        statuses=statuses,
        differences=differences(run, untouched),
    )


def start(words: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command(*words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def rows(run: Path) -> list[dict[str, float]]:
    return read_metrics(run) if (run / "metrics.jsonl").exists() else []


def holder(run: Path) -> int:
    """The process that holds the run's folder: of several that train together the first."""
    process: int = json.loads((run / LOCK).read_text(encoding="utf-8"))["process"]
    return process


def until_free(run: Path, seconds: float) -> None:
    """Wait until no process holds the run's folder; a trainer lives on for a moment when its command is killed.

    Raises InputError where one still does in the end.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            with claimed(run):
                return
        except InputError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def processes(title: str) -> list[int]:
    """The processes whose title begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(title.encode()):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def page(stories: Sequence[Story]) -> str:
    lines = [
        "# Runs over Ray whose processes are killed",
        "",
        "Made by `make cluster-faults`. Runs of 16 steps of 32 samples over two generators, two reward workers and a "
        f"trainer, each a process of its own on one machine; tasks of {SAMPLES_PER_TASK} samples, a checkpoint every "
        f"{EVERY_STEPS} steps. Each run is struck once, at a random moment after its first step, and in the end held "
        "against the same run in one process that nobody touched: metrics, summary, samples, weights. The run of two "
        "trainers, whose tasks are of one sample, is held against an untouched run in two processes without a cluster.",
        "",
        "| what was done | times | samples lost, sampled or scored again | steps done again | what the run's folder "
        "says | exit status | in the end |",
        "|---|---:|---|---|---|---|---|",
    ]
    for case in CASES:
        chosen = [story for story in stories if story.case == case.name]
        said = sorted({event for story in chosen for event in story.events})
        ended = dict.fromkeys(", then ".join(map(str, story.statuses)) for story in chosen)
        same = sum(not story.differences for story in chosen)
        lost, again = ([getattr(story, name) for story in chosen] for name in ("lost_samples", "steps_again"))
        lines.append(
            f"| {case.name} | {len(chosen)} | {', '.join(map(str, lost))} | {', '.join(map(str, again))} | "
            f"{', '.join(said) or '-'} | {'; '.join(ended)} | {same} of {len(chosen)} bit-identical |"
        )
    lines += [
        "",
        "*given twice*: a task that was late went to a second worker; *worker lost*: it died, or was silent for "
        "`cluster.silent_seconds`, and was replaced; a worker that is struck between two tasks loses none. "
        "A trainer takes its workers along, and the new one loads them again; one of two takes the other along too.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3))
