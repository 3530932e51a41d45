"""What a run ran on and what it took, for its summary."""

from __future__ import annotations

import platform
import resource
import sys
from typing import Any

import torch
import transformers

import tandem


def machine_record(device: torch.device) -> dict[str, Any]:
    """Peak memory of this process (and of the device, where it has its own), versions, processor."""
    unit = 2**30 if sys.platform == "darwin" else 2**20
    record: dict[str, Any] = {
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
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
