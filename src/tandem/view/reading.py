"""A run's folder as the report and the viewer read it: whatever a finished, unfinished or resumed run has left there.

Nothing here judges a run's files: a line that is no JSON, a metric that is null, a summary that is not there yet are
what a run that was cut short looks like, and are passed over.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.errors import InputError, one_line
from tandem.recipe import RECORD

ROLLOUTS, FAULTS = "rollouts", "faults"
METRICS, CONFIG, SUMMARY = "metrics.jsonl", "config.toml", "summary.json"


@dataclass(frozen=True)
class RunRecord:
    """What a run wrote about itself.

    `metrics` has a row a step, in order, each a number or None (not finite) by name; `config` and `summary` are empty
    where the run has not written them.
    """

    path: Path
    stage: str
    config: Mapping[str, Any]
    metrics: tuple[Mapping[str, float | None], ...]
    summary: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The last parts of the folder's name: `demo/ppo`."""
        return one_line("/".join(part for part in self.path.resolve().parts[-2:] if part != "/"))

    @property
    def steps_done(self) -> int:
        return int(self.metrics[-1]["step"] or 0) if self.metrics else 0

    @property
    def steps_planned(self) -> int | None:
        """Steps that the recipe asks for; None where that follows from the data."""
        steps, warmup = self.config.get("steps"), _section(_section(self.config, "value"), "warmup").get("steps")
        return steps + (warmup if isinstance(warmup, int) else 0) if isinstance(steps, int) else None

    def setting(self, section: str, name: str, default: Any) -> Any:
        """One setting of the recipe."""
        return _section(self.config, section).get(name, default)


def read_run(path: Path) -> RunRecord:
    """Read what there is. Raises InputError where the folder is none, or no training run has written in it."""
    try:
        if not path.is_dir():
            raise InputError(f"{path} is no folder; give the folder of a run, such as runs/ppo.")
        if not any((path / name).exists() for name in (METRICS, CONFIG, ROLLOUTS)):
            raise InputError(f"{path} holds no run{_runs_below(path)}; give the folder that holds {METRICS}.")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; give the folder of a run.") from None
    config, summary = _read_toml(path / CONFIG), read_json(path / SUMMARY)
    stage = summary.get("stage") or read_json(path / RECORD).get("stage") or _stage_of(config)
    if stage == "eval":
        raise InputError(f"{path} holds an evaluation, which has no steps to look at; its page is {path / 'eval.md'}.")
    return RunRecord(path, str(stage), config, _read_metrics(path / METRICS), summary)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no such file, or none that is whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def objects_of(path: Path) -> Iterator[tuple[int, int, dict[str, Any] | None]]:
    """Each line of a .jsonl file: where it begins, how many bytes it has, and its object, None where it is none.

    Empty lines are left out.
    """
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield offset, len(line), parse_object(line)
            offset += len(line)


def parse_object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def number_or_none(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _read_metrics(path: Path) -> tuple[Mapping[str, float | None], ...]:
    """A row a step; of a step that stands there twice, the later one."""
    rows: dict[int, Mapping[str, float | None]] = {}
    try:
        for _, _, row in objects_of(path):
            step = number_or_none(None if row is None else row.get("step"))
            if row is not None and step is not None:
                rows[int(step)] = {
                    name: number_or_none(value)
                    for name, value in row.items()
                    if value is None or isinstance(value, int | float)
                }
    except OSError:
        pass
    return tuple(rows[step] for step in sorted(rows))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = tree.get(name)
    return found if isinstance(found, Mapping) else {}


def _stage_of(config: Mapping[str, Any]) -> str:
    """The stage that a configuration is for, told by a field that only it has."""
    signs = {"policy": "ppo", "centring_weight": "reward", "beta": "dpo", "sequences_per_minibatch": "sft"}
    return next((stage for field, stage in signs.items() if field in config), "")


def _runs_below(path: Path) -> str:
    below = sorted(found.parent for found in path.glob(f"*/{METRICS}"))[:3]
    return f"; {', '.join(str(run) for run in below)} would do" if below else ""
