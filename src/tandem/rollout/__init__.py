"""Sampling responses from the policy."""

from collections.abc import Sequence
from typing import Protocol

from tandem.rollout.torch_generator import TorchGenerator
from tandem.types import Prompt, Rollout

__all__ = ["Generator", "TorchGenerator"]


class Generator(Protocol):
    """Anything that answers prompts and says how likely each of its tokens was."""

    def generate(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """One response for each prompt, in their order; repeat a prompt to have several."""
        ...
