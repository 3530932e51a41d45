"""Ctrl-C and SIGTERM: what is at hand is finished or given up, and the run's state is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from tandem.world import world


class Terminated(BaseException):
    """SIGTERM came, and what is at hand is given up for it."""


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Where no work within listens to it, SIGTERM raises Terminated at once, as Ctrl-C raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Signals:
    """Within it, a first Ctrl-C only sets `requested`; a second one stops at once, by KeyboardInterrupt.

    SIGTERM, which is followed by an end that nobody can refuse, sets `requested` and `terminating`. Work that can be
    done again exactly, marked by `may_give_up`, is given up for it by raising `Terminated`; other work has
    `grace_seconds` to end by itself, and then it is given up too.

    Where several processes train together, none may leave the others alone in their work: whatever is asked of any of
    them only sets its flags, and all end between two steps, once they have agreed on it.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.requested = False
        self.terminating = False
        self._grace = grace_seconds
        self._may_give_up = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGINT: self._on_interrupt, signal.SIGTERM: self._on_terminate}
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.terminating:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        before = self._before.get(signal.SIGTERM)
        if self.terminating and kind is None and callable(before):
            before(signal.SIGTERM, None)

    def agreed(self) -> bool:
        """Between two steps: whether an end was asked for, of this process or of one that trains with it."""
        requested, _ = self._asked_of_any()
        return requested

    def end_if_terminating(self) -> None:
        """Between two pieces of work: raises Terminated where SIGTERM has come, to any that trains with this one."""
        _, terminating = self._asked_of_any()
        if terminating:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Terminated

    def _asked_of_any(self) -> tuple[bool, bool]:
        """What was asked before all told each other; what comes while they do is kept for the next time."""
        told = world().gather((self.requested, self.terminating))
        requested, terminating = (any(flags) for flags in zip(*told, strict=True))
        if requested:
            self.requested = True
        if terminating:
            self.terminating = True
        return requested, terminating

    @contextmanager
    def may_give_up(self) -> Iterator[None]:
        """Work that leaves no trace until it ends, so that it can be given up at any moment."""
        self._may_give_up = world().alone
        try:
            if self._may_give_up:
                self.end_if_terminating()
            yield
        finally:
            self._may_give_up = False

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.terminating:
            return
        self.requested = self.terminating = True
        if not world().alone:
            return
        if self._may_give_up:
            raise Terminated
        signal.signal(signal.SIGALRM, self._on_time_up)
        signal.setitimer(signal.ITIMER_REAL, self._grace)

    def _on_time_up(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        raise Terminated
