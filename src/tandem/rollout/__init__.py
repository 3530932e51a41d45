"""Sampling responses from the policy."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from tandem.rollout.in_step import InStep
from tandem.rollout.stopping import GivenUp
from tandem.rollout.torch_generator import TorchGenerator
from tandem.rollout.vllm_generator import VllmEngine, VllmGenerator
from tandem.types import Prompt, Rollout

__all__ = ["Generator", "GivenUp", "InStep", "TorchGenerator", "VllmEngine", "VllmGenerator"]


class Generator(Protocol):
    """Anything that answers prompts and says how likely each of its tokens was."""

    @property
    def version(self) -> int:
        """What `load_weights` called the weights that it samples from."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sample from these weights, under the names of a saved model, from now on.

        A generator that reads the policy's own has nothing to load, and does not ask for them.
        """
        ...

    def generate(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """One response for each prompt, in their order; repeat a prompt to have several."""
        ...

    def stop(self) -> None:
        """Let a `generate` that another thread is in end soon, by raising GivenUp; it is the generator's end."""
        ...
