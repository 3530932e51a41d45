"""What tests of joint runs over Ray share: a cluster on loopback, the words of a run, and processes that are killed."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from faults.cluster import processes
from tandem.cluster.events import read_events
from test_commands import prompt_file

# Read when Ray is imported: keep to loopback, and want a token.
os.environ |= {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}

REWARD = """
import os, pathlib, signal, time
marker, calls = pathlib.Path({marker!r}), 0

def itself():
    return os.getpid()

def another_trainer():
    titles = {{int(path.name): (path / "cmdline").read_bytes() for path in pathlib.Path("/proc").glob("[0-9]*")}}
    return next(pid for pid, title in titles.items() if title.startswith(b"ray::Trainer") and pid != os.getpid())

def reward(prompts, responses, rows):
    global calls
    calls += 1
    if calls == {call} and not marker.exists():
        marker.touch()
        os.kill({victim}(), signal.SIGKILL)
    return [float(len(response) % 7) for response in responses]
"""


@contextmanager
def loopback_cluster(folder: Path) -> Iterator[str]:
    """The address of a Ray cluster of 8 logical CPUs that listens on loopback alone; its log is kept in the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--head", f"--port={port}", "--num-cpus=8", "--include-dashboard=false", "--block"]
    ray = Path(sys.executable).with_name("ray")
    with (folder / "log").open("wb") as log:
        head = subprocess.Popen([ray, "start", *words], stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 90
            while not processes("ray::RuntimeEnvAgent") and head.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            head.wait(60)


def words_of(tmp_path: Path, model: Path, folder: str, call: int = -1, victim: str = "itself") -> list[str]:
    """A joint run whose reward kills the process that it runs in, or another, once, at a call (never at a negative)."""
    reward = tmp_path / f"reward_{folder}.py"
    reward.write_text(REWARD.format(marker=str(tmp_path / f"killed_{folder}"), call=call, victim=victim))
    words = [
        f"--policy.model={model}",
        f"--data.prompts={prompt_file(tmp_path)}",
        f"--rewards.0.function={reward}:reward",
    ]
    words += ["--value.start=policy", "--steps=5", "--rollout.prompts_per_step=4", "--rollout.responses_per_prompt=2"]
    words += ["--rollout.max_new_tokens=24", "--policy.lr=0.001", "--value.lr=0.001", "--checkpoints.every_steps=2"]
    return [*words, "--run.trackers=[]", f"--run.directory={tmp_path / folder}"]


def kill_when_at(title: str, number: int, done: list[int]) -> threading.Thread:
    """Send a signal to the first new process of this title, as soon as there is one, from a thread."""
    earlier = set(processes("ray::"))

    def watch() -> None:
        deadline = time.monotonic() + 120
        while not done and time.monotonic() < deadline:
            for pid in set(processes(title)) - earlier:
                os.kill(pid, number)
                done.append(pid)
                break
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def lost(run: Path, event: str) -> Sequence[Mapping[str, object]]:
    return [one for one in read_events(run) if one["event"] == event]
