"""The report of a run: one page that says what it did, from what it has written down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tandem.errors import reason_of
from tandem.view.comparison import before_and_after
from tandem.view.critic import critic
from tandem.view.curves import curves, heldout, measured_only
from tandem.view.facts import machine, recipe, time_by_phase
from tandem.view.metrics import describe
from tandem.view.page import self_contained, write_page
from tandem.view.pipeline import pipeline_content
from tandem.view.reading import RunRecord, read_run
from tandem.view.state import STAGE_NAMES, state_of

REPORT = "report.html"


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
    content = {
        "name": run.name,
        "path": str(run.path),
        "stage": run.stage,
        "stage_name": STAGE_NAMES.get(run.stage, run.stage),
        "state": state_of(run),
        "tiles": [tile for tile in tiles(run) if tile is not None],
        "health": findings(run),
        "curves": curves(run),
        "pairs": before_and_after(run),
        "critic": critic(run),
        "recipe": recipe(run),
        "machine": machine(run),
        "time": time_by_phase(run),
        "pipeline": None,
    }
    return content | pipeline_content(run) if run.stage == "pipeline" else content


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
        yield tile(run, "KL", "objective/kl")
        yield tile(run, "Explained variance", "value/explained_variance")
        yield tile(run, "Length", "rollout/length")
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
