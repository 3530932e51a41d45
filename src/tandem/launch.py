"""Several processes of one command on this machine: started together, ended together, one exit status."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tandem.world import RENDEZVOUS

_SECONDS_TO_END = 10.0
_SECONDS_BETWEEN_LOOKS = 0.05
_DIE_WITH_PARENT = 1


def run_together(words: Sequence[str], processes: int) -> int:
    """Run `tandem` with these words in so many processes; returns their exit status.

    They meet by a file that only this person can read, so no port is opened for it. The first one that fails ends the
    others, and its status is that of all. What this process is told by Ctrl-C or SIGTERM it passes on to them.
    """
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder:
        workers = [_start(words, rank, processes, Path(folder) / "rendezvous") for rank in range(processes)]
        try:
            with _passing_on(workers):
                return _wait(workers)
        finally:
            _end(workers)


def die_with_launcher() -> None:
    """Let the system end this process where the one that started it is ended by force."""
    if sys.platform == "linux" and RENDEZVOUS in os.environ:
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _start(words: Sequence[str], rank: int, size: int, rendezvous: Path) -> subprocess.Popen[bytes]:
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), RENDEZVOUS: str(rendezvous)}
    shared = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // size))}
    return subprocess.Popen(
        [sys.executable, "-m", "tandem", *words], env=shared | threads | os.environ | own, start_new_session=True
    )


@contextmanager
def _passing_on(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Within it signals go to the workers; a SIGTERM that they have answered goes on to whoever listened before."""
    told: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        told.append(number)
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    handler = before[signal.SIGTERM]
    if signal.SIGTERM in told and callable(handler):
        handler(signal.SIGTERM, None)


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """Until all have ended, or one has failed."""
    while True:
        found = [worker.poll() for worker in workers]
        failed = [status for status in found if status]
        if failed:
            return max(failed) if max(failed) > 0 else 1
        if all(status == 0 for status in found):
            return 0
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait a little for those that are ending by themselves; end the others."""
    deadline = time.monotonic() + _SECONDS_TO_END
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
