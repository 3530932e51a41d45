"""What a rule is: a signature in the metrics, with the words that go with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tandem.config import PpoConfig
from tandem.health.finding import About
from tandem.health.history import History

Judge = Callable[[History, PpoConfig], str | None]
Remedy = Callable[[History, PpoConfig], str]


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong.

    `judge` looks at the metrics up to the latest step and says, with the numbers, what it sees of the signature; None
    where it sees none. `needs` are the metrics without which it cannot be judged; a row without one of them is passed
    over. A finding begins once the signature has held in `holds` judged rows in a row, and ends once it has not in a
    window of them. `remedy` is a line of a recipe, fit for the recipe of the run. `lower_rate_helps` tells whether a
    lower learning rate of the policy acts against it.
    """

    name: str
    title: str
    signature: str
    needs: tuple[str, ...]
    judge: Judge
    remedy: Remedy
    source: str
    page: str
    holds: int = 2
    about: About = "training"
    lower_rate_helps: bool = False

    def missing(self, history: History) -> list[str]:
        """The metrics that it needs and that never came."""
        return [name for name in self.needs if history.count(name) == 0]

    def judgeable(self, history: History) -> bool:
        """Whether the latest row has all that it needs."""
        return all(history.holds(name) for name in self.needs)
