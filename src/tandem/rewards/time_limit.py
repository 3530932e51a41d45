"""A limit on how long a call of somebody else's code may take."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTime(BaseException):
    """The limit was reached; no Exception, so that a body which catches those is stopped all the same."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the body once it has taken this long. Only the main thread can be stopped: others run on.

    A thread of its own keeps the time, and SIGVTALRM is how it interrupts: the process has one real timer and one
    SIGALRM, and the body may well use both for limits of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main, running, reached = threading.get_ident(), True, threading.Event()

    def ring() -> None:
        reached.set()
        signal.pthread_kill(main, signal.SIGVTALRM)

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        if running and reached.is_set():
            raise OutOfTime

    watch = threading.Timer(min(seconds, threading.TIMEOUT_MAX), ring)
    watch.daemon = True
    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        watch.start()
        try:
            yield
        finally:
            running = False
    finally:
        watch.cancel()
        watch.join()
        signal.signal(signal.SIGVTALRM, before)
    if reached.is_set():
        raise OutOfTime
