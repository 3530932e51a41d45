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
        began, ended = [], []
        for rule in self._rules:
            standing = self._standing[rule.name]
            if standing.finding is not None:
                standing.finding = replace(standing.finding, last_step=step)
            if not rule.judgeable(self.history):
                continue
            seen = rule.judge(self.history, self._config)
            standing.held = standing.held if seen is None else step
            if (seen is None) == (standing.finding is None):
                standing.count = 0
                continue
            standing.count += 1
            standing.since = step if standing.count == 1 else standing.since
            if standing.count < (rule.holds if seen is not None else max(rule.holds, at.WINDOW)):
                continue
            standing.count = 0
            if seen is not None:
                standing.finding = self._finding(rule, standing.since, step, seen)
                began.append(standing.finding)
            elif standing.finding is not None:
                over = replace(standing.finding, last_step=standing.held, active=False)
                standing.finding = None
                self._over.append(over)
                ended.append(over)
        return Change(tuple(began), tuple(ended))

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
