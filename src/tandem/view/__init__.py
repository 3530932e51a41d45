"""The report of a run and the viewer of its tokens."""

from tandem.view.command import run_view
from tandem.view.report import reported

__all__ = ["reported", "run_view"]
