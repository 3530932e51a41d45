"""Between the command and the trainer: lines to show go one way, signals the other."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import threading
from typing import Any

from tandem.cluster.library import ray

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WAIT_SECONDS = 0.5


class Desk:
    """A process where lines and signals are left and fetched."""

    def __init__(self) -> None:
        self._lines: asyncio.Queue[str] = asyncio.Queue()
        self._signals: asyncio.Queue[int] = asyncio.Queue()

    async def say(self, line: str) -> None:
        await self._lines.put(line)

    async def said(self) -> list[str]:
        """The lines that came since the last call; waits a moment for one."""
        return await _taken(self._lines)

    async def ring(self, number: int) -> None:
        await self._signals.put(number)

    async def rung(self) -> list[int]:
        """The signals that came since the last call; waits a moment for one."""
        return await _taken(self._signals)


async def _taken(queue: asyncio.Queue[Any]) -> list[Any]:
    try:
        found = [await asyncio.wait_for(queue.get(), _WAIT_SECONDS)]
    except TimeoutError:
        return []
    while not queue.empty():
        found.append(queue.get_nowait())
    return found


def open_desk() -> Any:
    """A desk that takes no resources, and comes back empty if it dies."""
    return ray().remote(Desk).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()


class DeskWriter(io.TextIOBase):
    """A stream whose whole lines go to the desk."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk
        self._rest = ""
        self._last: Any = None

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._last = self._desk.say.remote(line)
        return len(text)

    def wait(self) -> None:
        """Until the desk has all lines."""
        if self._last is not None:
            ray().get(self._last)


def answer_signals(desk: Any) -> None:
    """From here on, a signal that is left at the desk reaches this process as if it had been sent to it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def listen() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        while True:
            for number in ray().get(desk.rung.remote()):
                os.kill(os.getpid(), number)

    threading.Thread(target=listen, name="signals", daemon=True).start()
