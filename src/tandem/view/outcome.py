"""What a stage reached, in a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def reached(summary: Mapping[str, Any]) -> str:
    """Of a stage's summary the one or two numbers that say what came of it."""
    after = (summary.get("heldout") or {}).get("after") or {}
    if summary["stage"] == "sft":
        return f"held-out loss {after['heldout/loss']:.3f} nats a token" if after else "no held-out rows"
    if summary["stage"] == "reward":
        accuracy = summary["heldout_accuracy"]
        return "no held-out pairs" if accuracy is None else f"held-out accuracy {accuracy:.3f}"
    if summary["stage"] == "dpo":
        return f"held-out accuracy {after['heldout/accuracy']:.3f}" if after else "no held-out pairs"
    if summary["stage"] == "pipeline":
        return "; ".join(f"{one['stage']}: {one['reached']}" for one in summary["stages"]) or "nothing yet"
    last = after or summary["last_step"]
    where = "held-out" if after else "last step's"
    score, kl = (last.get(name, float("nan")) for name in ("objective/score", "objective/kl"))
    return f"{where} score {score:.3f} at KL {kl:.2f} nats a sequence"
