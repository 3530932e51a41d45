"""Processes that train together on this machine.

`python -m plan_check.together MODEL`, run by `in_several`, prints what each reaches while all of them work, and how
fast they send to each other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tandem.models.trunk import Trunk
from tandem.plan.devices import Device, calling_seconds, narrow_model, this_machine, usual_seconds
from tandem.plan.model_size import ModelSize
from tandem.world import RENDEZVOUS, end, join, world

SENT_BYTES = 2**24


def in_several(command: Sequence[str], processes: int) -> list[dict[str, Any]]:
    """What so many processes of a command print as their last lines, in JSON. Raises where one fails."""
    with tempfile.TemporaryDirectory(prefix="tandem-plan-") as folder:
        shared = {"WORLD_SIZE": str(processes), RENDEZVOUS: str(Path(folder) / "rendezvous"), "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                command,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{' '.join(command)}: a process failed")
    return [json.loads(text.strip().splitlines()[-1]) for text in said]


def reached(size: ModelSize) -> Device:
    """This machine's processor as one of the processes has it, with the way between them: bytes/s that each receives,
    and the seconds by which a layer of next to no work takes longer where its weights are gathered."""
    dist.barrier()
    device = this_machine(size, "float32")
    _, a_layer = calling_seconds(seconds_of_pass)
    part = torch.zeros(SENT_BYTES // 4)
    parts = [torch.empty_like(part) for _ in range(world().size)]
    seconds = usual_seconds(lambda: dist.all_gather(parts, part))
    link = SENT_BYTES * (world().size - 1) / seconds
    return replace(
        device, link=link, network=link, link_share=1.0, hop_seconds=max(0.0, a_layer - device.layer_seconds)
    )


def seconds_of_pass(layers: int) -> float:
    """One token through so many narrow layers whose weights are cut over the processes."""
    trunk, ids = Trunk(narrow_model(layers)), torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        return usual_seconds(lambda: trunk.run(lambda: trunk.decoder(input_ids=ids, use_cache=False)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    join("cpu", replicate=1, checkpointing=False)
    print(json.dumps(asdict(reached(ModelSize.of(sys.argv[1])))))
    end(0)
