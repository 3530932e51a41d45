"""What is wrong with a run, in words, with the line of the recipe to change."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

About = Literal["training", "machine"]


@dataclass(frozen=True)
class Finding:
    """One thing that was wrong from `first_step` to `last_step`; `active` where it still is at the latest step.

    `explanation` holds the numbers that spoke when it began; `remedy` is a line of a recipe; `source` is the paper or
    the reasoning behind the rule; `page` is where the documentation teaches it. `about` tells what training does from
    what the machine does, since only the first is the same whenever a run is repeated.
    """

    rule: str
    title: str
    about: About
    first_step: int
    last_step: int
    active: bool
    explanation: str
    remedy: str
    source: str
    page: str

    def as_record(self) -> dict[str, Any]:
        """For summaries and scripts: names and plain values only."""
        return asdict(self)
