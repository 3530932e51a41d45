"""Rules over a run as it goes: each finding is said once when it begins and once when it ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tandem.config import PpoConfig
from tandem.health import critic, generator, kl, machine, reward, stagnation, text, updates
from tandem.health import thresholds as at
from tandem.health.finding import Finding
from tandem.health.history import History
from tandem.health.rule import Rule

RULES: tuple[Rule, ...] = (
    *machine.RULES,
    *critic.RULES,
    *kl.RULES,
    *updates.RULES,
    *stagnation.RULES,
    *text.RULES,
    *reward.RULES,
    *generator.RULES,
)
NAMES = tuple(rule.name for rule in RULES)


@dataclass(frozen=True)
class Change:
    """What one step changed: findings that began with it, and findings that ended."""

    began: tuple[Finding, ...]
    ended: tuple[Finding, ...]


@dataclass
class _Standing:
    """How a rule stands: judged rows in a row that spoke for a change, since which step; the latest step at which its
    signature held; and its open finding."""

    count: int = 0
    since: int = 0
    held: int = 0
    finding: Finding | None = None

    def would_change(self, held: bool, step: int, needed: int) -> bool:
        """Count a judged row, and say whether so many in a row now speak for a beginning or an end."""
        self.held = step if held else self.held
        if held == (self.finding is not None):
            self.count = 0
            return False
        self.count += 1
        self.since = step if self.count == 1 else self.since
        if self.count < needed:
            return False
        self.count = 0
        return True


class Watch:
    """Judges every row as it comes, by nothing but the rows so far, so that a run that goes on can be told again from
    its metrics.jsonl and stands where it stood."""

    def __init__(self, config: PpoConfig) -> None:
        self._config = config
        self._rules = [rule for rule in RULES if rule.name not in config.health.silence]
        self._standing = {rule.name: _Standing() for rule in self._rules}
        self._over: list[Finding] = []
        self.history = History()

    def observe(self, step: int, row: Mapping[str, Any]) -> Change:
        """Judge a further row."""
        self.history.append(step, row)
        changed = [finding for rule in self._rules if (finding := self._judged(rule, step)) is not None]
        return Change(
            began=tuple(finding for finding in changed if finding.active),
            ended=tuple(finding for finding in changed if not finding.active),
        )

    def _judged(self, rule: Rule, step: int) -> Finding | None:
        """The rule's finding where it begins with this step, or, no longer active, where it ends."""
        standing = self._standing[rule.name]
        if standing.finding is not None:
            standing.finding = replace(standing.finding, last_step=step)
        if not rule.judgeable(self.history):
            return None
        seen = rule.judge(self.history, self._config)
        needed = rule.holds if standing.finding is None else max(rule.holds, at.WINDOW)
        if not standing.would_change(seen is not None, step, needed):
            return None
        if seen is not None:
            standing.finding = self._finding(rule, standing.since, step, seen)
            return standing.finding
        assert standing.finding is not None
        over, standing.finding = replace(standing.finding, last_step=standing.held, active=False), None
        self._over.append(over)
        return over

    @property
    def active(self) -> list[Finding]:
        """What is wrong at the latest step, in the order of the rules."""
        return [standing.finding for standing in self._standing.values() if standing.finding is not None]

    @property
    def findings(self) -> list[Finding]:
        """All that was or is wrong, by the step that it began with."""
        return sorted([*self._over, *self.active], key=lambda finding: (finding.first_step, NAMES.index(finding.rule)))

    def lowers_rate(self, finding: Finding) -> bool:
        """Whether a lower learning rate of the policy acts against it."""
        return next(rule.lower_rate_helps for rule in self._rules if rule.name == finding.rule)

    def flags(self) -> dict[str, float]:
        """For the row of metrics: 1 for each rule with an open finding."""
        return {f"health/{finding.rule}": 1.0 for finding in self.active}

    def not_judged(self) -> dict[str, list[str]]:
        """The rules that could not be judged, with the metrics that never came."""
        missing = {rule.name: rule.missing(self.history) for rule in self._rules}
        return {name: names for name, names in missing.items() if names}

    def _finding(self, rule: Rule, since: int, step: int, explanation: str) -> Finding:
        return Finding(
            rule=rule.name,
            title=rule.title,
            about=rule.about,
            first_step=since,
            last_step=step,
            active=True,
            explanation=explanation,
            remedy=rule.remedy(self.history, self._config),
            source=rule.source,
            page=rule.page,
        )


def watched(rows: Iterable[Mapping[str, Any]], config: PpoConfig) -> Watch:
    """A watch that has seen these rows, each with its `step`."""
    watch = Watch(config)
    for row in rows:
        watch.observe(int(row["step"]), row)
    return watch


def diagnose(rows: Iterable[Mapping[str, Any]], config: PpoConfig | None = None) -> Sequence[Finding]:
    """All that was wrong with a run, from its rows of metrics; without its recipe, as one that says nothing."""
    return watched(rows, config or unknown_recipe()).findings


def unknown_recipe() -> PpoConfig:
    """The defaults, for a run whose recipe is not at hand."""
    nothing = {"policy": {"model": "unknown"}, "data": {"prompts": "unknown"}, "rewards": [{"model": "unknown"}]}
    return PpoConfig.model_validate(nothing)
