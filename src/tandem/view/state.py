"""Which stage a run is of and how far it has come, in words."""

from __future__ import annotations

from tandem.view.reading import RunRecord

STAGE_NAMES = {
    "pipeline": "all stages from one recipe",
    "ppo": "the joint stage: policy and value model",
    "sft": "supervised fine-tuning",
    "reward": "reward model",
    "dpo": "direct preference optimisation",
}


def state_of(run: RunRecord) -> str:
    """How far the run has come, in words."""
    done, planned = run.steps_done, run.steps_planned
    of = f" of {planned}" if planned is not None and planned != done else ""
    if not run.summary:
        return f"{done}{of} steps are written down; the run has no summary, so it is still going or was cut short."
    if run.summary.get("interrupted"):
        return f"Interrupted after {done}{of} steps."
    if (best := run.summary.get("best_step")) is not None:
        return f"Ended early after {done} steps; the models are those of step {best}, the best ones."
    return f"Ended after {done}{of} steps." if of else f"Finished: {done} steps."
