"""The random states of the process: Python's, NumPy's and torch's own, as a reward function may draw from them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor


def random_tensors() -> dict[str, Tensor]:
    """torch's random states, on the CPU and on each CUDA device."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def random_numbers() -> dict[str, Any]:
    """Python's and NumPy's random states, for JSON."""
    name, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    return {"python": random.getstate(), "numpy": [name, numpy.asarray(keys).tolist(), position, has_gauss, gauss]}


def restore_random(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Go on with the random numbers of the moment of `random_tensors` and `random_numbers`."""
    torch.set_rng_state(tensors["torch"])
    for name, state in tensors.items():
        if name.startswith("cuda:") and torch.cuda.is_available():
            torch.cuda.set_rng_state(state, name)
    version, internal, gauss = numbers["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = numbers["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
