"""The report of a pipeline: its stages, what they handed over, and what each one's model answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.errors import InputError
from tandem.view.comparison import cut
from tandem.view.outcome import reached
from tandem.view.reading import RunRecord, read_run
from tandem.view.state import STAGE_NAMES, state_of

_IN_ORDER = ("sft", "reward", "dpo", "ppo")


def pipeline_content(run: RunRecord) -> dict[str, Any]:
    """What the page shows of a pipeline in place of steps of its own."""
    stages = [stage_content(run.path, stage) for stage in _IN_ORDER if stage in run.config]
    phases = [{"name": one["stage"], "seconds": one["seconds"]} for one in stages if one["seconds"]]
    return {
        "state": pipeline_state(run, stages),
        "time": {"total": sum(phase["seconds"] for phase in phases) or None, "phases": phases},
        "pipeline": {
            "stages": stages,
            "handovers": _objects(run.summary.get("handovers")),
            "answers": [answers_content(one) for one in _objects(run.summary.get("answers"))],
        },
    }


def stage_content(path: Path, stage: str) -> dict[str, Any]:
    """A stage as its own folder tells it."""
    content = {"stage": stage, "title": STAGE_NAMES[stage], "reached": None, "seconds": None, "report": None}
    try:
        run = read_run(path / stage)
    except InputError:
        return {**content, "state": "not begun"}
    if run.summary:
        content |= {"reached": _reached(run.summary), "seconds": run.summary.get("seconds")}
    has_report = (path / stage / "report.html").is_file()
    return {**content, "state": state_of(run), "report": f"{stage}/report.html" if has_report else None}


def answers_content(found: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt with the answer of each stage's model, as long as the page shows them."""
    answers = found.get("answers")
    texts = answers.items() if isinstance(answers, Mapping) else ()
    return {"prompt": cut(str(found.get("prompt"))), "answers": {str(name): cut(str(text)) for name, text in texts}}


def pipeline_state(run: RunRecord, stages: list[dict[str, Any]]) -> str:
    """How far the pipeline has come, in words."""
    if run.summary.get("interrupted") is False:
        return f"Finished: {len(stages)} stages. The model: {run.summary.get('model')}"
    broken = next((one for one in _objects(run.summary.get("handovers")) if one.get("held") is False), None)
    if broken is not None:
        return f"Stopped: {broken.get('where')}: {broken.get('said')}."
    begun = sum(one["state"] != "not begun" for one in stages)
    return f"{begun} of {len(stages)} stages have begun; the pipeline is still going or was cut short."


def _reached(summary: Mapping[str, Any]) -> str | None:
    """A summary of another version may lack what is looked for."""
    try:
        return reached(summary)
    except (LookupError, TypeError, ValueError, AttributeError):
        return None


def _objects(found: Any) -> list[dict[str, Any]]:
    return [dict(one) for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []
