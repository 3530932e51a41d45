"""How good the value model's judgement was, along a run, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem.view.curves import heldout
from tandem.view.reading import RunRecord

_MOST_MOMENTS = 500


def critic(run: RunRecord) -> list[dict[str, Any]]:
    """Calibration by decile and explained variance by quarter: on held-out prompts, and along the steps."""
    moments: list[tuple[str, Mapping[str, float | None]]] = [
        (
            f"held out, {when} training",
            {name.removeprefix("heldout/"): value for name, value in heldout(run, when).items()},
        )
        for when in ("before", "after")
    ]
    every = -(-len(run.metrics) // _MOST_MOMENTS) or 1
    moments += [(f"step {int(row['step'] or 0)}", row) for row in run.metrics[::-1][::every][::-1]]
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
