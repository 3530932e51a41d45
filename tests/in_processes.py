"""One of several processes that run commands one after the other, so that a test starts them once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tandem.world import RENDEZVOUS, end


def run_in_processes(commands: Sequence[Sequence[str]], folder: Path, processes: int = 2) -> list[int]:
    """Each command's exit status, as the first process has it. Raises AssertionError where the processes end badly.

    The command `check NAME ...` is one of `checks_of_parts`.
    """
    folder.mkdir()
    (folder / "commands.json").write_text(json.dumps(commands))
    workers = [_start(folder, rank, processes) for rank in range(processes)]
    said = [worker.communicate(timeout=240)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * processes, "\n".join(said)
    return [int(status) for status in (folder / "statuses.json").read_text().split()]


def _start(folder: Path, rank: int, processes: int) -> subprocess.Popen[str]:
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "GLOO_SOCKET_IFNAME": "lo"}
    own["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        env=os.environ | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _run(folder: Path) -> None:
    from checks_of_parts import check
    from tandem.cli import main

    statuses = []
    for number, words in enumerate(json.loads((folder / "commands.json").read_text())):
        os.environ[RENDEZVOUS] = str(folder / f"rendezvous_{number}")
        statuses.append(check(words[1:]) if words[0] == "check" else main(words))
        if statuses[-1] not in (0, 130):
            end(statuses[-1])
    if os.environ["RANK"] == "0":
        (folder / "statuses.json").write_text(" ".join(map(str, statuses)))


if __name__ == "__main__":
    _run(Path(sys.argv[1]))
    end(0)
