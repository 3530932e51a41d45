"""The report of a run: one page that says what it did, from what it has written down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tandem.config import DpoConfig, PpoConfig, RewardConfig, SftConfig
from tandem.errors import reason_of
from tandem.recipe import fields_of
from tandem.view.curves import curves, heldout, measured_only
from tandem.view.metrics import describe
from tandem.view.page import self_contained, write_page
from tandem.view.reading import RunRecord, read_run
from tandem.view.samples import IndexedFile, SampleIndex

REPORT = "report.html"
_KINDS: Mapping[str, Any] = {"ppo": PpoConfig, "sft": SftConfig, "reward": RewardConfig, "dpo": DpoConfig}
_STAGE_NAMES = {
    "ppo": "the joint stage: policy and value model",
    "sft": "supervised fine-tuning",
    "reward": "reward model",
    "dpo": "direct preference optimisation",
}
_PHASES = ("rollout", "score", "evaluate", "update")
_LONGEST_TEXT = 3000


@contextmanager
def reported(path: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """However what is in it ends, the run in that folder has a report; that there could be none is a warning."""
    try:
        yield
    finally:
        try:
            write_report(path)
        except Exception as error:
            warn(f"{path / REPORT} could not be written: {reason_of(error)}.")


def write_report(path: Path) -> Path:
    """Write `report.html` into a run's folder.

    Raises InputError where the folder holds no run, or the file cannot be written.
    """
    page = path / REPORT
    write_page(page, report_page(read_run(path)))
    return page


def report_page(run: RunRecord, source: Literal["page", "server"] = "page") -> str:
    """The whole page, as a file of its own or as the viewer's server shows it."""
    return self_contained(
        "report.html", title=f"{run.name}: report", data={"report": report_content(run)}, source=source
    )


def report_content(run: RunRecord) -> dict[str, Any]:
    """What the page shows, as plain data."""
    samples = SampleIndex(run)
    return {
        "name": run.name,
        "path": str(run.path),
        "stage": run.stage,
        "stage_name": _STAGE_NAMES.get(run.stage, run.stage),
        "state": state_of(run),
        "tiles": [tile for tile in tiles(run) if tile is not None],
        "health": findings(run),
        "curves": curves(run),
        "pairs": before_and_after(samples) if run.stage == "ppo" else {},
        "critic": critic(run),
        "recipe": recipe(run),
        "machine": machine(run),
        "time": time_by_phase(run),
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
    return f"Finished: {done} steps."


@dataclass(frozen=True)
class Change:
    """A metric at the beginning (None where it was measured once) and at the end of what `where` says."""

    before: float | None
    after: float
    where: str


def change(run: RunRecord, name: str) -> Change | None:
    """How a metric moved: on held-out data where it was measured there, else from the first to the last step."""
    held = name if name.startswith("heldout/") else f"heldout/{name}"
    measured = [value for row in run.metrics if (value := row.get(held)) is not None]
    before, after = heldout(run, "before").get(held), heldout(run, "after").get(held)
    ends = [value for value in (before, *measured, after) if value is not None]
    if len(ends) > 1 and before is not None:
        return Change(before, ends[-1], "held out")
    if ends:
        return Change(ends[0] if len(ends) > 1 else None, ends[-1], "held out")
    training = [value for row in run.metrics if (value := row.get(name)) is not None]
    return Change(training[0], training[-1], "training") if training else None


def tiles(run: RunRecord) -> Iterator[dict[str, Any] | None]:
    """The numbers that say in one look what the run did."""
    if run.stage == "ppo":
        yield tile(run, "Reward", "objective/score")
        for name in measured_only(run):
            yield tile(run, f"{name}, never trained on", f"objective/score/{name}")
        yield tile(run, "KL to the reference", "objective/kl")
        yield tile(run, "Explained variance", "value/explained_variance")
        yield tile(run, "Response length", "rollout/length")
        return
    yield tile(run, "Loss", "heldout/loss") or tile(run, "Training loss", "train/loss")
    for title, name in (("Accuracy", "accuracy"), ("Margin", "margin"), ("Calibration error", "calibration_error")):
        yield tile(run, title, f"heldout/{name}")


def tile(run: RunRecord, title: str, name: str) -> dict[str, Any] | None:
    found, description = change(run, name), describe(name)
    if found is None:
        return None
    return {
        "title": title,
        "before": found.before,
        "after": found.after,
        "where": found.where,
        "unit": description.unit if description else "",
        "what": description.what if description else "",
        "healthy": description.healthy if description else "",
    }


def findings(run: RunRecord) -> list[dict[str, Any]] | None:
    """What the summary says is unhealthy; None where nothing was judged."""
    found = run.summary.get("health")
    if not isinstance(found, list):
        return None
    return [dict(one) for one in found if isinstance(one, Mapping)]


def before_and_after(samples: SampleIndex) -> dict[str, Any]:
    """Responses to the same held-out prompts at the beginning and at the end, from the largest gain to the largest
    loss; empty where there are none."""
    files = {indexed.file.name: indexed for indexed in samples.refresh() if indexed.file.kind == "heldout"}
    ordered = list(files.values())
    if len(ordered) < 2:
        return {}
    first, last = ordered[0], ordered[-1]
    both = sorted(_pairs(first, last), key=lambda pair: pair[1][1] - pair[0][1], reverse=True)
    places = {"largest gain": 0.0, "upper quartile": 0.25, "middle": 0.5, "lower quartile": 0.75, "largest loss": 1.0}
    chosen = {round(share * (len(both) - 1)): name for name, share in reversed(places.items())} if both else {}
    return {
        "before": first.file.label,
        "after": last.file.label,
        "count": len(both),
        "rows": [
            _pair_content(name, samples, (first, both[at][0][0]), (last, both[at][1][0]))
            for at, name in sorted(chosen.items())
        ],
    }


def _pairs(first: IndexedFile, last: IndexedFile) -> list[tuple[tuple[int, float], tuple[int, float]]]:
    """Rows and scores of responses to the same prompt, the first to the first, the second to the second."""
    places: dict[str, list[tuple[int, float]]] = {}
    for row, entry in enumerate(first.entries):
        places.setdefault(entry.prompt, []).append((row, entry.score if entry.score is not None else 0.0))
    found = []
    for row, entry in enumerate(last.entries):
        if places.get(entry.prompt) and entry.score is not None:
            found.append((places[entry.prompt].pop(0), (row, entry.score)))
    return found


def _pair_content(
    name: str, samples: SampleIndex, before: tuple[IndexedFile, int], after: tuple[IndexedFile, int]
) -> dict[str, Any]:
    sides = {"before": before, "after": after}
    full = {side: samples.sample(indexed.file.name, row) for side, (indexed, row) in sides.items()}
    return {
        "place": name,
        "prompt": _cut(full["before"].prompt),
        **{
            side: {"response": _cut(sample.response), "score": sample.score, "scores": sample.scores}
            for side, sample in full.items()
        },
    }


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} [...]"


def critic(run: RunRecord) -> list[dict[str, Any]]:
    """Calibration by decile and explained variance by quarter: on held-out prompts, and at every step."""
    moments: list[tuple[str, Mapping[str, float | None]]] = [
        (
            f"held out, {when} training",
            {name.removeprefix("heldout/"): value for name, value in heldout(run, when).items()},
        )
        for when in ("before", "after")
    ]
    moments += [(f"step {int(row['step'] or 0)}", row) for row in run.metrics]
    return [found for label, row in moments if (found := _critic_at(label, row))["deciles"] or found["quarters"]]


def _critic_at(label: str, row: Mapping[str, float | None]) -> dict[str, Any]:
    def numbered(pattern: str) -> list[float | None]:
        names = [pattern.format(n) for n in range(1, 11)]
        return [_six(row[name]) for name in names if name in row]

    predicted, earned = numbered("calibration/predicted_{:02d}"), numbered("calibration/earned_{:02d}")
    return {
        "label": label,
        "deciles": [[one, other] for one, other in zip(predicted, earned, strict=False) if None not in (one, other)],
        "quarters": numbered("value/explained_variance_by_position/{}"),
    }


def _six(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


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
