"""What a stage does differently where several processes train together: little, and only here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

from tandem.algo import Sums
from tandem.errors import InputError, Interrupted
from tandem.run import Progress
from tandem.run.lock import claimed
from tandem.run.record import Recipe
from tandem.run.start import Start, start_of
from tandem.view import reported
from tandem.world import world

Asked = TypeVar("Asked")
Found = TypeVar("Found")


@contextmanager
def begun(path: Path, stage: str, config: Recipe, resume: bool, progress: Progress) -> Iterator[Start]:
    """Hold the run's folder and find where to begin. The first process does so, and tells the others.

    All of them stay until each has done its part: one that ended before the first had saved the models would have it
    ended by what started them.

    Raises InputError where the recipe is for several processes and this is one alone.
    """
    if config.parallel.processes != world().size:
        raise InputError(
            f"parallel.processes = {config.parallel.processes}, and this is one process of {world().size}; start it by "
            f"tandem {stage} --processes {config.parallel.processes}, or leave parallel.processes out."
        )
    with ExitStack() as held:

        def begin() -> Start:
            held.enter_context(claimed(path))
            return start_of(path, stage, config, resume, progress)

        try:
            yield world().from_first(begin)
        except Interrupted:
            world().wait_for_all()
            raise
        world().wait_for_all()


def reported_once(path: Path, warn: Callable[[str], None]) -> AbstractContextManager[None]:
    """`report.html`, by the first process."""
    return reported(path, warn) if world().first else nullcontext()


def of_all(own: Sums) -> Sums:
    """What all processes have gathered of a minibatch."""
    return own if world().alone else Sums.together(world().gather(own))


def by_first(score: Callable[[Asked], Found]) -> Callable[[Asked], Found]:
    """What is asked by the first process alone; it tells the others what was answered."""
    return score if world().alone else lambda asked: world().from_first(lambda: score(asked))
