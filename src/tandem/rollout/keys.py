"""Chance by key: the random numbers of a response follow from its key, so that it does not matter who samples it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

# The number of a call of the generator, drawn from the run's random state, and the number of the prompt in that call.
Key = tuple[int, int]


def draw_call(random: torch.Generator) -> int:
    """A number for a call of the generator. It moves the random state, so that a run that goes on draws the same."""
    return int(torch.randint(2**62, (), generator=random, device=random.device))


def uniforms(keys: Sequence[Key], count: int) -> Tensor:
    """[B, count] float32 in [0, 1): the numbers of each key, by a counter-based generator.

    Source: Salmon et al. 2011 (Philox).
    """
    rows = [numpy.random.Generator(numpy.random.Philox(key=key)).random(count, numpy.float32) for key in keys]
    return torch.from_numpy(numpy.stack(rows))
