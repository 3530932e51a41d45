"""A joint run over a Ray cluster: the command places a trainer, shows what it says, and starts it again if it dies."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast

from rich.console import Console

from tandem.cluster.desk import SIGNALS, DeskWriter, answer_signals, open_desk
from tandem.cluster.events import Events
from tandem.cluster.library import ray
from tandem.cluster.placement import Placed, placed
from tandem.config import PpoConfig
from tandem.errors import InputError, Interrupted, RunError
from tandem.recipe import RECORD, command_to_resume
from tandem.run import Progress
from tandem.run.checkpoints import kept_checkpoints
from tandem.run.start import CHECKPOINTS
from tandem.stages.ppo import run_ppo
from tandem.stages.workers import RayWorkers, at_home

_WARNING = "WARNING: "


@dataclass(frozen=True)
class Ended:
    """How a trainer came to its end: with a summary, or an error that a person is told of."""

    summary: Mapping[str, Any] | None
    error: InputError | RunError | Interrupted | None


class Trainer:
    """The process that trains: the very same joint stage, with workers to sample and score for it."""

    def run(self, config: PpoConfig, place: Placed, desk: Any, folder: str, life: int, resume: bool) -> Ended:
        """The run, from its start or its last checkpoint. `life` counts the trainers that died before this one."""
        answer_signals(desk)
        writer = DeskWriter(desk)
        try:
            at_home(config, folder)
            run = Path(config.run.directory)
            resume = resume or (life > 0 and (run / RECORD).exists())
            console = Console(file=cast(IO[str], writer), highlight=False, soft_wrap=True, color_system=None)
            with Progress(console) as progress:
                run.mkdir(parents=True, exist_ok=True)
                workers = RayWorkers(config, place, run, progress.warn)
                return Ended(run_ppo(config, progress, resume=resume, workers=workers), None)
        except (InputError, RunError, Interrupted) as error:
            return Ended(None, error)
        except KeyboardInterrupt:
            return Ended(None, Interrupted("stopped."))
        finally:
            writer.wait()


def run_over_ray(config: PpoConfig, progress: Progress, *, resume: bool = False) -> dict[str, Any]:
    """As `run_ppo`, with its processes placed by the recipe's [cluster] section.

    Raises InputError, RunError and Interrupted as `run_ppo` does, and RunError where the trainer died too often.
    """
    assert config.cluster is not None
    with ExitStack() as until_the_end:
        with progress.console.status("placing the processes"):
            place = until_the_end.enter_context(placed(config.cluster))
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
        with _collected_signals() as rung:
            ended = _one_life(config, place, progress, life, resume, rung)
        if ended is not None:
            return ended
        before, saved = saved, _saved(run)
        deaths = 1 if saved > before else deaths + 1
        if run.is_dir():
            Events(run).write("trainer lost", goes_on_after_step=saved)
        if rung:
            raise Interrupted(f"ended by a signal. The state after step {saved} is saved; go on with: {again}")
        if deaths > config.cluster.trainer_restarts:
            raise RunError(
                f"the trainer died {deaths} times without a new checkpoint between; the logs of its machine, in "
                f"/tmp/ray/session_latest/logs, say why. The state after step {saved} is saved; go on with: {again}"
            )
        progress.warn(f"the trainer died; a new one goes on after step {saved}.")
    raise AssertionError("there is no last life")


def _one_life(
    config: PpoConfig, place: Placed, progress: Progress, life: int, resume: bool, rung: list[int]
) -> Ended | None:
    """A trainer from its start to its end; None where it died."""
    desk = open_desk()
    trainer = ray().remote(Trainer).options(**place.options("trainer", 0)).remote()
    running, told, lines = trainer.run.remote(config, place, desk, os.getcwd(), life, resume), 0, desk.said.remote()
    while True:
        ready, _ = ray().wait([running, lines], num_returns=1, timeout=0.2)
        for number in rung[told:]:
            desk.ring.remote(number)
        told = len(rung)
        if lines in ready:
            _show(ray().get(lines), progress)
            lines = desk.said.remote()
        if running in ready:
            _show(ray().get(lines), progress)
            try:
                return ray().get(running)
            except ray().exceptions.RayActorError:
                return None
            finally:
                ray().kill(trainer)
                ray().kill(desk)


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
