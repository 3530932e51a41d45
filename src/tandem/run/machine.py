"""What a run ran on and what it took, for its summary."""

from __future__ import annotations

import os
import platform
import resource
from typing import Any

import torch
import transformers

import tandem
from tandem.allocator import peak_memory
from tandem.world import world


def memory_in_use(device: torch.device) -> dict[str, float]:
    """`memory/process_gib` of main memory now (where the system does not say: the most so far), and
    `memory/device_gib` of what tensors hold on a GPU."""
    in_use = {"memory/process_gib": _resident_bytes() / 2**30}
    if device.type == "cuda":
        in_use["memory/device_gib"] = torch.cuda.memory_allocated(device) / 2**30
    return in_use


def _resident_bytes() -> float:
    try:
        with open("/proc/self/statm", encoding="ascii") as pages:
            return float(pages.read().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return peak_memory()


def free_memory(device: torch.device) -> float:
    """Bytes that one of the processes on this machine can still take: of its GPU, or its share of main memory.

    What torch keeps for itself on a GPU and does not use counts as free. Infinite where the system does not say.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return float("inf")
    return available / int(os.environ.get("LOCAL_WORLD_SIZE", world().size))


def machine_record(device: torch.device) -> dict[str, Any]:
    """Peak memory of this process (and of the device, where it has its own), versions, processor."""
    record: dict[str, Any] = {
        "peak_memory_gib": peak_memory() / 2**30,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "versions": {
            "tandem": tandem.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if device.type == "cuda":
        record["peak_device_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return record
