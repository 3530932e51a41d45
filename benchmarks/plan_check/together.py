"""Processes that train together on this machine.

`python -m plan_check.together MODEL`, run by `in_several`, prints what each reaches while all of them work, and how
fast they send to each other.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from tandem.models.trunk import Trunk
from tandem.plan.devices import Device, this_machine
from tandem.plan.model_size import ModelSize
from tandem.world import RENDEZVOUS, end, join, world

SENT_BYTES = 2**24
NARROW_LAYERS = (2, 16)


def in_several(words: Sequence[str], processes: int) -> list[dict[str, Any]]:
    """What so many processes of `python WORDS` print as their last lines, in JSON. Raises where one fails."""
    with tempfile.TemporaryDirectory(prefix="tandem-plan-") as folder:
        shared = {"WORLD_SIZE": str(processes), RENDEZVOUS: str(Path(folder) / "rendezvous"), "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                [sys.executable, *words],
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{' '.join(words)}: a process failed")
    return [json.loads(text.strip().splitlines()[-1]) for text in said]


def reached(size: ModelSize) -> Device:
    """This machine's processor as one of the processes has it, with the way between them: bytes/s that each receives,
    and the seconds by which a layer of next to no work takes longer where its weights are gathered."""
    dist.barrier()
    device = this_machine(size, "float32")
    few, many = (seconds_of_pass(layers) for layers in NARROW_LAYERS)
    a_layer = (many - few) / (NARROW_LAYERS[1] - NARROW_LAYERS[0])
    part = torch.zeros(SENT_BYTES // 4)
    parts = [torch.empty_like(part) for _ in range(world().size)]
    seconds = typical(lambda: dist.all_gather(parts, part))
    link = SENT_BYTES * (world().size - 1) / seconds
    return replace(
        device, link=link, network=link, link_share=1.0, hop_seconds=max(0.0, a_layer - device.layer_seconds)
    )


def seconds_of_pass(layers: int) -> float:
    """One token through so many narrow layers whose weights are cut over the processes."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=1,
        pad_token_id=None,
    )
    trunk, ids = Trunk(LlamaForCausalLM(config).eval()), torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        return typical(lambda: trunk.run(lambda: trunk.decoder(input_ids=ids, use_cache=False)))


def typical(work: Callable[[], object], tries: int = 30) -> float:
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    join("cpu", replicate=1, checkpointing=False)
    print(json.dumps(asdict(reached(ModelSize.of(sys.argv[1])))))
    end(0)
