"""The processes that train over a cluster: the joint stage as it is, with workers to sample and score for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console
from torch.distributed import Store

from tandem.cluster.desk import DeskWriter, answer_signals
from tandem.cluster.meeting import Address, keep_to_the_cluster, open_store, store_at
from tandem.cluster.placement import Placed
from tandem.config import ParallelSection, PpoConfig
from tandem.errors import InputError, Interrupted, RunError
from tandem.run import Progress
from tandem.run.progress import silent_console
from tandem.stages.ppo import run_ppo
from tandem.stages.workers import RayWorkers, at_home
from tandem.world import join_at, settle


@dataclass(frozen=True)
class Order:
    """What all processes of a trainer are told: what to run, in which folder, and whether to go on with a run there."""

    config: PpoConfig
    place: Placed
    desk: Any
    folder: str
    resume: bool


@dataclass(frozen=True)
class Ended:
    """How a process of the trainer came to its end: with a summary, or an error that a person is told of."""

    summary: Mapping[str, Any] | None
    error: InputError | RunError | Interrupted | None


class Trainer:
    """One of the processes that train together. The first has the workers, speaks for all, and hears of signals."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._store: Store | None = None

    def open(self) -> Address:
        """Where the others meet this process."""
        self._store, address = open_store()
        return address

    def run(self, order: Order, meeting: Address | None) -> Ended:
        """The run, from its start or its last checkpoint; with others where there is a place to meet them."""
        voice = DeskWriter(order.desk) if self._rank == 0 else None
        if voice is not None:
            answer_signals(order.desk)
        try:
            device = at_home(order.config, order.folder).device.type
            self._meet(order.config.parallel, device, meeting)
            with Progress(silent_console() if voice is None else _speaking(voice)) as progress:
                return Ended(_run(order, progress), None)
        except (InputError, RunError, Interrupted) as error:
            return Ended(None, error)
        except KeyboardInterrupt:
            return Ended(None, Interrupted("stopped."))
        finally:
            if voice is not None:
                voice.wait()

    def _meet(self, parallel: ParallelSection, device: str, meeting: Address | None) -> None:
        if meeting is None:
            settle(parallel.activation_checkpointing)
            return
        keep_to_the_cluster()
        store = store_at(meeting) if self._store is None else self._store
        join_at(store, self._rank, parallel.processes, device, parallel.replicate, parallel.activation_checkpointing)


def _run(order: Order, progress: Progress) -> dict[str, Any]:
    config = order.config
    workers = RayWorkers(config, order.place, Path(config.run.directory), progress.warn)
    return run_ppo(config, progress, resume=order.resume, workers=workers)


def _speaking(voice: DeskWriter) -> Console:
    return Console(file=cast(IO[str], voice), highlight=False, soft_wrap=True, color_system=None)
