"""A diagnosis as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tandem.health.finding import Finding
from tandem.health.foreign import Trainer
from tandem.health.imports import Run, called_elsewhere
from tandem.health.watch import NAMES, Watch


def report(name: str, run: Run, watch: Watch) -> str:
    """What is wrong, why it is thought so, and what to change; and what could not be judged."""
    return "\n".join(
        [*_head(name, run, watch), *_findings(watch.findings, run.trainer), *_unjudged(watch.not_judged())]
    )


def record(run: Run, watch: Watch) -> dict[str, Any]:
    """The same for scripts."""
    return {
        "trainer": run.kind,
        "recipe_known": run.recipe_known,
        "steps": len(run.rows),
        "last_step": watch.history.steps[-1],
        "findings": [finding.as_record() for finding in watch.findings],
        "not_judged": watch.not_judged(),
    }


def _head(name: str, run: Run, watch: Watch) -> Iterator[str]:
    judged = len(NAMES) - len(watch.not_judged())
    yield f"{name}: {run.kind}, steps judged: {len(run.rows)}, rules judged: {judged} of {len(NAMES)}."
    if not run.recipe_known:
        yield "Its recipe is not known; settings are as the metrics show them, else the defaults."
    if not watch.findings:
        yield "Nothing is wrong that these rules know of."


def _findings(findings: Sequence[Finding], trainer: Trainer | None) -> Iterator[str]:
    for number, finding in enumerate(findings, start=1):
        until = "the end" if finding.active else f"{finding.last_step}"
        theirs = called_elsewhere(finding.remedy, trainer)
        yield ""
        yield f"{number}. {finding.title} ({finding.rule}), step {finding.first_step} to {until}"
        yield f"   why:    {finding.explanation}"
        yield f"   change: {finding.remedy}" + (f"   (there: {theirs})" if theirs else "")
        yield f"   source: {finding.source}"
        yield f"   read:   {finding.page}"


def _unjudged(missing: Mapping[str, Sequence[str]]) -> Iterator[str]:
    if missing:
        yield ""
        yield "Not judged, since the run has not these metrics:"
        yield from (f"   {rule}: {', '.join(names)}" for rule, names in missing.items())
