"""From a loss to new weights. Knows nothing of reinforcement learning."""

from tandem.engine.local import LocalEngine

__all__ = ["LocalEngine"]
