"""Steps that were skipped for numbers that are not finite: counted, explained, and ended where they go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from tandem.errors import NotFinite, RunError


@dataclass(frozen=True)
class Faults:
    """How many steps were skipped in all, and how many the latest in a row."""

    total: int = 0
    in_a_row: int = 0

    def after_good_step(self) -> Self:
        return type(self)(self.total, 0)

    def after_fault(self) -> Self:
        return type(self)(self.total + 1, self.in_a_row + 1)

    def metrics(self) -> dict[str, float]:
        """For the row of a step: nothing until a first step is skipped, so that healthy runs have no such curves."""
        if self.total == 0:
            return {}
        return {"fault/skipped": float(self.in_a_row > 0), "fault/skipped_total": float(self.total)}


def diagnosis(fault: NotFinite, faults: Faults, step: int) -> RunError:
    """Why a run stops that has skipped too many steps in a row."""
    return RunError(
        f"{faults.in_a_row} steps in a row met numbers that are not finite, the last one step {step}: {fault}. No such "
        f"number has reached a weight; what the steps worked on is kept in faults/. {fault.remedy}"
    )
