"""Tandem: actor-critic RLHF, a policy and a value model trained together."""

__version__ = "0.1.0"
