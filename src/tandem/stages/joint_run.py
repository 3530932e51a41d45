"""The joint stage where its recipe wants it: in this process, or over a cluster."""

from __future__ import annotations

from typing import Any

from tandem.config import PpoConfig
from tandem.run import Progress
from tandem.stages.ppo import run_ppo


def run_joint(config: PpoConfig, progress: Progress, *, resume: bool = False) -> dict[str, Any]:
    """See `run_ppo`."""
    if config.cluster is None:
        return run_ppo(config, progress, resume=resume)
    from tandem.stages.over_ray import run_over_ray

    return run_over_ray(config, progress, resume=resume)
