"""Metrics of runs on disk: those of a joint run, and exports of other trainers."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tandem.config import PpoConfig
from tandem.errors import InputError, reason_of
from tandem.health.foreign import TRAINERS, Trainer
from tandem.health.watch import RULES, unknown_recipe
from tandem.recipe import load_config

STEP_NAMES = ("step", "Step", "_step", "global_step", "train/global_step", "training/global_step")
PREFIXES = ("", "train/")
_EXPORTED_SPREAD = re.compile(r"__(MIN|MAX)$")
_READ = (
    "the folder of a joint run, a folder with TensorBoard event files, a trainer_state.json, or a .csv, .jsonl or "
    ".json file with a row of metrics a step"
)

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """What was read: whose metrics, under our names, and the recipe; `trainer` is None for a run of our own.

    The recipe of another trainer's run is not known; the settings that its metrics show are those of `config`.
    """

    rows: Rows
    config: PpoConfig
    trainer: Trainer | None
    recipe_known: bool

    @property
    def kind(self) -> str:
        return "Tandem" if self.trainer is None else self.trainer.name


def read_run(path: Path) -> Run:
    """Raises InputError for what is none of what can be read, cannot be read, or holds no metric that is known."""
    rows = _rows_of(path)
    if not rows:
        raise InputError(f"{path} holds no row of metrics yet; give a run that has done a step.")
    trainer, rows = _translated(rows, path)
    recipe = _recipe_beside(path) if trainer is None else None
    return Run(rows, recipe or recipe_shown_by(rows), trainer, recipe_known=recipe is not None)


def _recipe_beside(path: Path) -> PpoConfig | None:
    """The recipe in the run's folder, or in the one that holds it; None for none, or one of another version."""
    recipe = next((file for file in (path / "config.toml", path.parent / "config.toml") if file.is_file()), None)
    try:
        return None if recipe is None else load_config(PpoConfig, recipe, [])
    except InputError:
        return None


def _rows_of(path: Path) -> Rows:
    if not path.exists():
        raise InputError(f"{path}: there is no such run; give {_READ}.")
    try:
        if path.is_dir():
            return _rows_of_folder(path)
        return _rows_of_file(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({reason_of(error)}); give {_READ}.") from None


def _rows_of_folder(path: Path) -> Rows:
    for name in ("metrics.jsonl", "trainer_state.json"):
        if (path / name).is_file():
            return _rows_of_file(path / name)
    folders = sorted({file.parent for file in path.rglob("*tfevents*")})
    if not folders:
        raise InputError(f"{path} holds no metrics; give {_READ}.")
    if len(folders) > 1:
        named = ", ".join(str(folder) for folder in folders[:4])
        raise InputError(f"{path} holds the event files of {len(folders)} runs ({named}); give the folder of one.")
    return _rows_of_events(folders[0])


def _rows_of_events(path: Path) -> Rows:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    by_step: dict[int, dict[str, Any]] = defaultdict(dict)
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            by_step[event.step][name] = event.value
    return [{"step": step} | by_step[step] for step in sorted(by_step)]


def _rows_of_file(path: Path) -> Rows:
    match path.suffix.lower():
        case ".csv":
            rows: Iterable[Mapping[str, Any]] = _rows_of_csv(path)
        case ".jsonl":
            rows = _rows_of_lines(path)
        case ".json":
            rows = _rows_of_json(path)
        case _:
            raise InputError(f"{path} is of a kind that is not read; give {_READ}.")
    return _by_step(rows)


def _rows_of_csv(path: Path) -> Rows:
    """A column a metric; `RUN - METRIC` as Weights & Biases exports them counts as METRIC."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [
            {name.rpartition(" - ")[2]: text for name, text in row.items() if _is_metric(name, text)}
            for row in csv.DictReader(file)
        ]


def _is_metric(name: Any, text: Any) -> bool:
    return isinstance(name, str) and isinstance(text, str) and text != "" and not _EXPORTED_SPREAD.search(name)


def _rows_of_lines(path: Path) -> Rows:
    """A JSON object a line; a last line that is still being written is left out."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise InputError(f"{path}, line {number}: is no JSON object; give {_READ}.") from None
        rows.append(_as_row(row, f"{path}, line {number}"))
    return rows


def _rows_of_json(path: Path) -> Rows:
    """A list of rows, or the `log_history` that transformers' trainers keep."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({reason_of(error)}); give {_READ}.") from None
    rows = found.get("log_history") if isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise InputError(f"{path}: must be a list of rows, or have one as log_history; give {_READ}.")
    return [_as_row(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]


def _as_row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: is no JSON object with a metric a name; give {_READ}.")
    data = row.get("data")
    return {"step": row.get("step")} | data if isinstance(data, dict) else row


def _by_step(rows: Iterable[Mapping[str, Any]]) -> Rows:
    """Rows with numbers only, one for each step, in the order of the steps; those without a step count as they come."""
    by_step: dict[int, dict[str, Any]] = defaultdict(dict)
    for number, row in enumerate(rows, start=1):
        numbers = {name: _number(value) for name, value in row.items()}
        step = next((numbers[name] for name in STEP_NAMES if math.isfinite(numbers.get(name) or math.nan)), number)
        by_step[int(step or number)] |= {name: value for name, value in numbers.items() if name not in STEP_NAMES}
    return [{"step": step} | by_step[step] for step in sorted(by_step)]


def _number(value: Any) -> float:
    """NaN for what is no number."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _translated(rows: Rows, path: Path) -> tuple[Trainer | None, Rows]:
    """Whose metrics these are, by the most names that are known, and the rows under our names."""
    names = {name for row in rows for name in row}
    known = {name for rule in RULES for name in rule.needs}
    count, prefix = len(names & known), ""
    trainer: Trainer | None = None
    for candidate, start in product(TRAINERS, PREFIXES):
        bare = {name.removeprefix(start) for name in names if name.startswith(start)}
        if candidate.recognised(bare) > count:
            count, trainer, prefix = candidate.recognised(bare), candidate, start
    if count == 0:
        some = ", ".join(sorted(names - {"step"})[:6])
        raise InputError(f"{path} has no metric that is known (it has {some or 'none'}); give {_READ}.")
    if trainer is None:
        return None, rows
    bare_rows = [
        {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)} for row in rows
    ]
    steps = [row["step"] for row in rows]
    return trainer, [{"step": step} | trainer.translated(row) for step, row in zip(steps, bare_rows, strict=True)]


def recipe_shown_by(rows: Sequence[Mapping[str, Any]]) -> PpoConfig:
    """A recipe with the settings that metrics show: learning rates at their highest, the first KL coefficient."""
    config = unknown_recipe()
    policy, value = (_numbers(rows, name) for name in ("policy/lr", "value/lr"))
    price = _numbers(rows, "objective/kl_coefficient")
    return config.model_copy(
        update={
            "policy": config.policy.model_copy(update={"lr": max(policy, default=0.0) or config.policy.lr}),
            "value": config.value.model_copy(update={"lr": max(value, default=0.0) or config.value.lr}),
            "kl": config.kl.model_copy(update={"coefficient": price[0] if price else config.kl.coefficient}),
        }
    )


def _numbers(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [value for row in rows if isinstance(value := row.get(name), float) and math.isfinite(value)]


def called_elsewhere(remedy: str, trainer: Trainer | None) -> str | None:
    """What the remedy's setting is called in another trainer; None where it has none, or for a run of our own."""
    return None if trainer is None else trainer.options.get(remedy.partition(" = ")[0])
