"""One run a folder: the folder is held by a lock that dies with its process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from tandem.errors import InputError

NAME = ".lock"


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold a run's folder, made if need be, against other processes.

    The kernel lets go of the lock when the process ends, however it ends, so a lock that a crash left behind does not
    hold. Raises InputError where a live process holds the folder, or it cannot be written.
    """
    made = _make(path)
    try:
        handle = _take(path / NAME)
        try:
            yield
        finally:
            os.close(handle)
    finally:
        _leave_no_trace(path, made)


def _make(path: Path) -> list[Path]:
    """The folders that had to be made, innermost first."""
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"run.directory = {str(path)!r} cannot be made: {error.strerror}; choose a folder that can be written."
        ) from error
    return missing


def _take(path: Path) -> int:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(
            f"run.directory = {str(path.parent)!r} cannot be written: {error.strerror}; choose another folder."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(_who()).encode())
    except BlockingIOError:
        os.close(handle)
        raise InputError(
            f"{path.parent} is in use: {_holder(path)}. Wait for it, end it, or choose another folder."
        ) from None
    except OSError as error:
        os.close(handle)
        raise InputError(
            f"run.directory = {str(path.parent)!r}: the folder cannot be locked ({error.strerror}); choose one on "
            "another file system."
        ) from error
    return handle if _still_there(path, handle) else _take(path)


def _still_there(path: Path, handle: int) -> bool:
    """Whether the file that was locked is the one that others will find; its holder may have taken it away."""
    try:
        return os.stat(path).st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        os.close(handle)
        path.parent.mkdir(parents=True, exist_ok=True)
        return False


def _who() -> dict[str, str | int]:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return f"process {who['process']} on {who['host']} has held it since {who['since']}"
    except (OSError, ValueError, KeyError):
        return "another process holds it"


def _leave_no_trace(path: Path, made: list[Path]) -> None:
    """Take away what was made for a run that was refused before it left anything."""
    if path in made and [entry.name for entry in path.iterdir()] == [NAME]:
        (path / NAME).unlink()
        for folder in made:
            try:
                folder.rmdir()
            except OSError:
                return
