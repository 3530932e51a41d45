"""What `tandem view` does."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path

from tandem.errors import InputError, one_line
from tandem.view.export import export
from tandem.view.reading import RunRecord, read_run
from tandem.view.report import write_report
from tandem.view.server import ViewServer


def run_view(path: Path, *, port: int, export_to: Path | None, report: bool, open_browser: bool) -> None:
    """Write the report or an export where either is asked for; else serve the run until Ctrl-C.

    Raises InputError where the folder holds no run, or something cannot be written or served.
    """
    run = read_run(path)
    if report:
        print(one_line(f"report: {write_report(path)}"))
    if export_to is not None:
        _check_has_samples(run)
        print(one_line(f"viewer: {export(run, export_to)}"))
    if report or export_to is not None:
        return
    _check_has_samples(run)
    with ViewServer(run, port) as server:
        try:
            print(f"{run.name}: {server.address} (Ctrl-C ends it)", flush=True)
            if open_browser and _has_screen():
                webbrowser.open(server.address)
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _check_has_samples(run: RunRecord) -> None:
    """Raises InputError for a pipeline: its samples are those of its stages."""
    if run.stage == "pipeline":
        raise InputError(
            f"{run.path} is a pipeline: its report is {run.path}/report.html, and its samples are those of its stages; "
            f"look at one of them, such as {run.path}/ppo."
        )


def _has_screen() -> bool:
    """Whether a browser would open a window, rather than take over the terminal."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
