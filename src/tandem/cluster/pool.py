"""A pool of workers that take tasks as they become free. Workers that die, or fall silent, cost their task alone."""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from tandem.cluster.events import Events
from tandem.cluster.library import ray, signals_held
from tandem.errors import RunError

Task = TypeVar("Task", bound="Sized")
Answer = TypeVar("Answer")
LOSSES_ALLOWED = 3
# A worker that loads its models may be silent for so many times as long as one that has a task.
LOADING_PATIENCE = 4
_LOOK_EVERY_SECONDS = 0.1


class Sized(Protocol):
    def __len__(self) -> int:
        """How many samples the task holds."""
        ...


@dataclass(frozen=True)
class Patience:
    """When a task counts as late, as a multiple of the median time of the tasks beside it; and after how many seconds
    without an answer a worker is given up."""

    late_after: float
    silent_seconds: float


@dataclass(frozen=True)
class Job:
    """A task on its way at a worker: its number in the call of `run` that handed it out, or None while the worker
    prepares itself."""

    answer: Any
    call: int
    task: int | None
    since: float


@dataclass
class Worker:
    """A place in the pool: the process that fills it now, what that is doing, and the deaths since the last answer."""

    number: int
    process: Any
    job: Job | None
    deaths: int = 0


@dataclass
class Call(Generic[Task]):
    """One call of `run`: what is to be done, what is, and how long tasks took."""

    number: int
    tasks: Sequence[Task]
    waiting: deque[int]
    answers: dict[int, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    losses: Counter[int] = field(default_factory=Counter)


class Pool:
    """Workers of one kind. `start(number)` makes a process, an actor with a method `prepare`.

    Dead processes are replaced, and `warn` is told. What is handed out must give the same answer whoever works on it,
    and however often.
    """

    def __init__(
        self,
        name: str,
        count: int,
        start: Callable[[int], Any],
        patience: Patience,
        events: Events,
        warn: Callable[[str], None],
    ) -> None:
        self.name = name
        self._start = start
        self._patience = patience
        self._events = events
        self._warn = warn
        self._calls = 0
        self._workers = [Worker(number, None, None) for number in range(count)]
        for worker in self._workers:
            self._fill(worker)

    @property
    def alive(self) -> int:
        """How many workers are ready or at work, as far as is known."""
        return sum(worker.job is None or worker.job.task is not None for worker in self._workers)

    def run(
        self, tasks: Sequence[Task], ask: Callable[[Any, Task], Any], check: Callable[[], None] = lambda: None
    ) -> list[Any]:
        """The answers to all tasks, in their order. They are handed out in that order: the longest should come first.

        `ask(process, task)` sends a task and returns Ray's reference to the answer; `check` is called while they are
        waited for, and may raise. Raises what a task raised, and RunError where a task, or a worker that prepares
        itself, was lost too often.
        """
        self._calls += 1
        call = Call(self._calls, tasks, deque(range(len(tasks))))
        while len(call.answers) < len(tasks):
            check()
            with signals_held():
                self._hand_out(call, ask)
                self._collect(call)
        return [call.answers[number] for number in range(len(tasks))]

    def _hand_out(self, call: Call[Task], ask: Callable[[Any, Task], Any]) -> None:
        for worker in self._workers:
            if worker.job is not None:
                continue
            task = call.waiting.popleft() if call.waiting else self._late(call)
            if task is None:
                return
            worker.job = Job(ask(worker.process, call.tasks[task]), call.number, task, time.monotonic())

    def _late(self, call: Call[Task]) -> int | None:
        """The task that has been out for longest, if it is late and no second worker has it; it goes out again."""
        if not call.seconds:
            return None
        limit = self._patience.late_after * statistics.median(call.seconds)
        now, out = time.monotonic(), self._out(call)
        late = [
            (job.since, task)
            for task, jobs in out.items()
            if len(jobs) == 1 and now - (job := jobs[0]).since > limit and task not in call.answers
        ]
        if not late:
            return None
        _, task = min(late)
        self._events.write("given twice", pool=self.name, samples=len(call.tasks[task]))
        return task

    def _out(self, call: Call[Task]) -> dict[int, list[Job]]:
        """The jobs of this call by their task."""
        out: dict[int, list[Job]] = {}
        for worker in self._workers:
            job = worker.job
            if job is not None and job.call == call.number and job.task is not None:
                out.setdefault(job.task, []).append(job)
        return out

    def _collect(self, call: Call[Task]) -> None:
        """Wait a moment, and take what has come."""
        jobs = {worker.job.answer: worker for worker in self._workers if worker.job is not None}
        ready, _ = ray().wait(list(jobs), num_returns=1, timeout=_LOOK_EVERY_SECONDS)
        for answer in ready:
            self._take(call, jobs[answer])
        now = time.monotonic()
        for worker in self._workers:
            if worker.job is None:
                continue
            allowed = self._patience.silent_seconds * (LOADING_PATIENCE if worker.job.task is None else 1)
            if now - worker.job.since > allowed:
                ray().kill(worker.process)
                self._lose(call, worker, f"no answer for {allowed:g} s")

    def _take(self, call: Call[Task], worker: Worker) -> None:
        job = worker.job
        assert job is not None
        try:
            answer = ray().get(job.answer)
        except ray().exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except ray().exceptions.RayError as error:
            self._lose(call, worker, type(error).__name__)
            return
        worker.job, worker.deaths = None, 0
        if job.call == call.number and job.task is not None and job.task not in call.answers:
            call.answers[job.task] = answer
            call.seconds.append(time.monotonic() - job.since)

    def _lose(self, call: Call[Task], worker: Worker, reason: str) -> None:
        """A worker is gone: another takes its place, and its task waits again unless somebody else has it."""
        job = worker.job
        assert job is not None
        worker.job = None
        lost = 0
        task = job.task if job.call == call.number and job.task not in call.answers else None
        if task is not None and task not in self._out(call):
            lost = len(call.tasks[task])
            call.losses[task] += 1
            call.waiting.appendleft(task)
        self._events.write("worker lost", pool=self.name, worker=worker.number, reason=reason, lost_samples=lost)
        self._warn(f"{self.name} {worker.number} was lost ({reason}); its {lost} unfinished samples are done again.")
        worker.deaths += 1
        if worker.deaths > LOSSES_ALLOWED or (task is not None and call.losses[task] > LOSSES_ALLOWED):
            raise RunError(
                f"{self.name} {worker.number} was lost {worker.deaths} times in a row ({reason}); the logs of its "
                "machine, in /tmp/ray/session_latest/logs, say why. If its memory ran out, lower "
                "cluster.samples_per_task, or place fewer workers on a machine."
            )
        self._fill(worker)

    def _fill(self, worker: Worker) -> None:
        """A new process for this place, which prepares itself."""
        worker.process = self._start(worker.number)
        worker.job = Job(worker.process.prepare.remote(), self._calls, None, time.monotonic())
