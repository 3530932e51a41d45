"""A joint run over a Ray cluster: the command places a trainer, shows what it says, and starts it again if it dies."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tandem.cluster.desk import SIGNALS, open_desk
from tandem.cluster.events import Events
from tandem.cluster.library import ray
from tandem.cluster.placement import Placed, placed
from tandem.config import PpoConfig
from tandem.errors import Interrupted, RunError
from tandem.recipe import RECORD, command_to_resume
from tandem.run import Progress
from tandem.run.checkpoints import kept_checkpoints
from tandem.run.start import CHECKPOINTS
from tandem.stages.trainer import Ended, Order, Trainer

_WARNING = "WARNING: "
_SECONDS_TO_END, _SECONDS_AFTER_ALL = 10.0, 1.0


@dataclass(frozen=True)
class Lost:
    """A trainer of which these processes died; the others were ended."""

    processes: Sequence[int]


def run_over_ray(config: PpoConfig, progress: Progress, *, resume: bool = False) -> dict[str, Any]:
    """As `run_ppo`, with its processes placed by the recipe's [cluster] section.

    Raises InputError, RunError and Interrupted as `run_ppo` does, and RunError where the trainer died too often.
    """
    assert config.cluster is not None
    with ExitStack() as until_the_end:
        with progress.console.status("placing the processes"):
            place = until_the_end.enter_context(placed(config.cluster, config.parallel.processes))
        ended = _lives(config, place, progress, resume)
    if ended.error is not None:
        raise ended.error
    assert ended.summary is not None
    return dict(ended.summary)


def _lives(config: PpoConfig, place: Placed, progress: Progress, resume: bool) -> Ended:
    """One trainer after another, until one ends by itself."""
    assert config.cluster is not None
    run, deaths = Path(config.run.directory), 0
    saved, again = _saved(run), command_to_resume("ppo", run)
    for life in itertools.count():
        goes_on = resume or (life > 0 and (run / RECORD).exists())
        with _collected_signals() as rung:
            ended = _one_life(config, place, progress, goes_on, rung)
        if isinstance(ended, Ended):
            return ended
        before, saved = saved, _saved(run)
        deaths = 1 if saved > before else deaths + 1
        if run.is_dir():
            Events(run).write("trainer lost", processes=ended.processes, goes_on_after_step=saved)
        if rung:
            raise Interrupted(f"ended by a signal. The state after step {saved} is saved; go on with: {again}")
        if deaths > config.cluster.trainer_restarts:
            raise RunError(
                f"the trainer died {deaths} times without a new checkpoint between; the logs of its machine, in "
                f"/tmp/ray/session_latest/logs, say why. The state after step {saved} is saved; go on with: {again}"
            )
        progress.warn(f"the trainer died; a new one goes on after step {saved}.")
    raise AssertionError("there is no last life")


def _one_life(config: PpoConfig, place: Placed, progress: Progress, resume: bool, rung: list[int]) -> Ended | Lost:
    """A trainer from its start to its end. Where one of its processes dies, the others are ended."""
    desk, count = open_desk(), config.parallel.processes
    order = Order(config, place, desk, os.getcwd(), resume)
    trainers = [ray().remote(Trainer).options(**place.options("trainer", rank)).remote(rank) for rank in range(count)]
    meeting = trainers[0].open.remote() if count > 1 else None
    running = [trainer.run.remote(order, meeting) for trainer in trainers]
    try:
        return verdict(_ends(running, desk, progress, rung), count)
    finally:
        for trainer in trainers:
            ray().kill(trainer)


def _ends(running: Sequence[Any], desk: Any, progress: Progress, rung: list[int]) -> Mapping[int, Ended | Exception]:
    """How the processes of a trainer ended, in the order in which they did.

    Once one has, the others have a little time; those that then wait for it in vain have no end here.
    """
    ends: dict[int, Ended | Exception] = {}
    told, lines, deadline = 0, desk.said.remote(), math.inf
    while len(ends) < len(running) and time.monotonic() < deadline:
        going = [answer for rank, answer in enumerate(running) if rank not in ends]
        ready, _ = ray().wait([*going, lines], num_returns=1, timeout=0.2)
        for number in rung[told:]:
            desk.ring.remote(number)
        told = len(rung)
        if lines in ready:
            _show(ray().get(lines), progress)
            lines = desk.said.remote()
        ends |= {rank: _end_of(answer) for rank, answer in enumerate(running) if answer in ready}
        if ends:
            allowed = _SECONDS_AFTER_ALL if _is_decided(ends) else _SECONDS_TO_END
            deadline = min(deadline, time.monotonic() + allowed)
    _show(ray().get(lines), progress)
    return ends


def _end_of(answer: Any) -> Ended | Exception:
    try:
        ended: Ended = ray().get(answer)
    except ray().exceptions.RayError as error:
        return error
    return ended


def _is_decided(ends: Mapping[int, Ended | Exception]) -> bool:
    """Whether no end of another process can change the verdict."""
    return isinstance(ends.get(0), Ended) or bool(_died(ends))


def _died(ends: Mapping[int, Ended | Exception]) -> list[int]:
    return [rank for rank, end in ends.items() if isinstance(end, ray().exceptions.RayActorError)]


def verdict(ends: Mapping[int, Ended | Exception], count: int) -> Ended | Lost:
    """What the ends of its processes say of a trainer. Raises what one of them raised that nobody foresaw.

    The first process speaks for all where it can. A death comes before errors, which others have of it.
    """
    first = ends.get(0)
    if isinstance(first, Ended):
        return first
    if died := _died(ends):
        return Lost(died)
    for end in ends.values():
        if isinstance(end, Exception):
            raise end
        if end.error is not None:
            return end
    return Lost([rank for rank in range(count) if rank not in ends])


def _show(lines: list[str], progress: Progress) -> None:
    for line in lines:
        if line.startswith(_WARNING):
            progress.warn(line.removeprefix(_WARNING))
        else:
            progress.say(line)


@contextmanager
def _collected_signals() -> Iterator[list[int]]:
    """Within it, Ctrl-C and SIGTERM are collected for the trainer; a third one ends the command at once."""
    rung: list[int] = []

    def collect(number: int, frame: FrameType | None) -> None:
        del frame
        rung.append(number)
        if len(rung) > 2:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, collect) for number in SIGNALS}
    try:
        yield rung
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _saved(run: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max((kept.step for kept in kept_checkpoints(run / CHECKPOINTS)), default=0)
