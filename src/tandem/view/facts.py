"""What a run was told, what it ran on, and where its time went, for the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tandem.config import DpoConfig, PpoConfig, RewardConfig, SftConfig
from tandem.pipeline_config import PipelineConfig
from tandem.recipe import fields_of
from tandem.view.reading import RunRecord

_KINDS: Mapping[str, Any] = {
    "pipeline": PipelineConfig,
    "ppo": PpoConfig,
    "sft": SftConfig,
    "reward": RewardConfig,
    "dpo": DpoConfig,
}
_PHASES = ("rollout", "score", "evaluate", "update")


def recipe(run: RunRecord) -> list[dict[str, Any]]:
    """Every setting with its default and its meaning; `changed` are those that the recipe sets otherwise."""
    fields = dict(fields_of(_KINDS[run.stage])) if run.stage in _KINDS else {}
    rows = []
    for name, value in leaves(run.config):
        field = fields.get(".".join("0" if part.isdigit() else part for part in name.split(".")))
        known = field is not None and not field.is_required()
        rows.append(
            {
                "name": name,
                "value": _shown(value),
                "default": _shown(field.get_default(call_default_factory=True)) if field and known else None,
                "changed": not (field and known) or field.get_default(call_default_factory=True) != value,
                "what": (field.description or "") if field else "",
            }
        )
    return rows


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names, those of a list's sections too."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for place, item in enumerate(value):
                yield from leaves(item, f"{name}.{place}.")
        else:
            yield name, value


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def machine(run: RunRecord) -> list[dict[str, str]]:
    """What it ran on and what it took."""
    summary = run.summary
    names = {
        "device": "device",
        "threads": "threads",
        "peak_memory_gib": "peak memory, GiB",
        "peak_device_memory_gib": "peak memory of the device, GiB",
        "seed": "seed",
    }
    rows = [(title, summary[name]) for name, title in names.items() if summary.get(name) is not None]
    versions = summary.get("versions")
    rows += list(versions.items()) if isinstance(versions, Mapping) else []
    return [{"name": name, "value": f"{value:.2f}" if isinstance(value, float) else str(value)} for name, value in rows]


def time_by_phase(run: RunRecord) -> dict[str, Any]:
    """Seconds by phase over all steps, and what lies outside of them: loading, evaluation, saving."""
    spent = {phase: sum(row.get(f"time/{phase}") or 0.0 for row in run.metrics) for phase in _PHASES}
    in_steps, total = sum(spent.values()), run.summary.get("seconds")
    if isinstance(total, int | float) and total > in_steps:
        spent["outside of steps" if in_steps else "all"] = total - in_steps
    return {
        "total": total if isinstance(total, int | float) else in_steps or None,
        "phases": [{"name": name, "seconds": seconds} for name, seconds in spent.items() if seconds > 0],
    }
