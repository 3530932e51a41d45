"""Ray, imported only where a recipe asks for it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tandem.errors import InputError

_MAY_RAISE = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


def ray() -> Any:
    """The library. Raises InputError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's own switch for lines that it is not to print. What died is told by who misses it.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed")
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError("--cluster ray needs Ray: pip install 'tandem-rlhf[ray]'.") from None
    return ray


@contextmanager
def signals_held() -> Iterator[None]:
    """Within it a signal waits for its handler, until the end: what a handler raises within a call of Ray comes out of
    that as a SystemError."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        del frame
        came.append(number)

    before = {number: signal.signal(number, hold) for number in _MAY_RAISE}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)
