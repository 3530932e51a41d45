"""What is wrong with a run, why it is thought so, and which line of its recipe to change."""

from tandem.health.finding import Finding
from tandem.health.history import History
from tandem.health.rule import Rule
from tandem.health.watch import NAMES, RULES, Change, Watch, diagnose, unknown_recipe, watched

__all__ = [
    "NAMES",
    "RULES",
    "Change",
    "Finding",
    "History",
    "Rule",
    "Watch",
    "diagnose",
    "unknown_recipe",
    "watched",
]
