"""A disk that runs full in the middle of a run, and is given room again."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from faults.runs import Task, command, environment, in_one_piece
from faults.same import differences


@dataclass(frozen=True)
class FullDisk:
    """What a run said and did when its disk was full, and how the run that went on differs from one in one piece."""

    status: int
    said: str
    differences: list[str]


def run_full(task: Task, folder: Path) -> FullDisk | None:
    """On a file system of a few MiB of its own; None where none can be mounted."""
    disk = folder / "small_disk"
    disk.mkdir()
    if not _mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)):
        return None
    try:
        run = disk / "run"
        words, filler = [*task.words, "--checkpoints.keep=1", f"--run.directory={run}"], disk / "filler"
        first = subprocess.Popen(
            command(task.stage, *words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while first.poll() is None and not list(run.glob("checkpoints/step_*")):
            pass
        _fill(filler)
        said = first.communicate()[1]
        filler.unlink()
        _mount("-o", "remount,size=64m", str(disk))
        subprocess.run(command(task.stage, "--resume", str(run)), env=environment(), check=True, capture_output=True)
        return FullDisk(first.returncode, said.strip(), differences(run, in_one_piece(task, folder)))
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def _fill(path: Path) -> None:
    """Write until the disk takes no more."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            return


def _mount(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0
