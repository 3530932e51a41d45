"""SIGTERM in the middle of an update that takes longer than the time that is left."""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from faults.runs import command, environment, tasks
from faults.same import differences

GRACE = 6.0


@dataclass(frozen=True)
class SlowUpdate:
    """How long such a run took to end, against its grace; its exit status; and how it differs from one in one piece."""

    seconds: float
    grace: float
    status: int
    differences: list[str]


def run_slow_update(folder: Path) -> SlowUpdate:
    """Two steps whose updates take over ten seconds each; the signal comes two seconds into the second update."""
    task = tasks(folder)[0]
    words = [*task.words, "--steps=2", "--policy.epochs=1200", "--policy.lr=1e-5", f"--run.grace_seconds={GRACE}"]
    whole, cut = folder / "slow_whole", folder / "slow_cut"
    subprocess.run(
        command("ppo", *words, f"--run.directory={whole}"), env=environment(), check=True, capture_output=True
    )
    process = subprocess.Popen(
        command("ppo", *words, f"--run.directory={cut}"),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (cut / "rollouts" / "step_000002.jsonl").exists():
        time.sleep(0.05)
    time.sleep(2.0)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    status = process.wait()
    seconds = time.monotonic() - sent
    subprocess.run(command("ppo", "--resume", str(cut)), env=environment(), check=True, capture_output=True)
    return SlowUpdate(seconds, GRACE, status, differences(cut, whole))
