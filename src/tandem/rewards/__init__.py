"""What a response earns: a reward model, a Python function, or a weighted sum of several."""

from collections.abc import Sequence
from typing import Protocol

from tandem.types import Rollout, Scores

__all__ = ["Reward"]


class Reward(Protocol):
    """Anything that scores rollouts."""

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """One score for each rollout, in their order."""
        ...
