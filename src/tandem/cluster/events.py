"""What befell the processes of a run, written down as it happens: `events.jsonl` in the run's folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

NAME = "events.jsonl"


class Events:
    """Appends to a run's `events.jsonl`, and counts what the step at hand has lost.

    A run that goes on keeps the events of its earlier lives, those of steps that it does again too.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / NAME
        self._step = 0
        self._counts: Counter[str] = Counter()

    def begin(self, step: int) -> None:
        """From here on, what happens belongs to this step."""
        self._step = step

    def write(self, event: str, **details: Any) -> None:
        """One more event: what happened, in which step, when, and what it concerns."""
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"time": when, "step": self._step, "event": event} | details) + "\n")
        self._counts[event] += 1
        self._counts["lost_samples"] += details.get("lost_samples", 0)

    def take_counts(self) -> Mapping[str, int]:
        """What happened since the counts were last taken."""
        counts, self._counts = self._counts, Counter()
        return counts


def read_events(run: Path) -> list[dict[str, Any]]:
    """All events of a run; none where its processes ran without any."""
    path = run / NAME
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def summed(events: list[dict[str, Any]]) -> dict[str, Any]:
    """How often each thing happened over the whole run, and the samples that were lost in all."""
    counts = Counter(event["event"] for event in events)
    return {"events": dict(counts), "lost_samples": sum(event.get("lost_samples", 0) for event in events)}
