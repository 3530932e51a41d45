"""Ray, imported only where a recipe asks for it."""

from __future__ import annotations

import os
from typing import Any

from tandem.errors import InputError


def ray() -> Any:
    """The library. Raises InputError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's own switch for lines that it is not to print. What died is told by who misses it.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed")
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError("--cluster ray needs Ray: pip install 'tandem-rlhf[ray]'.") from None
    return ray
