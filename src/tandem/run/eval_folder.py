"""An evaluation's folder: what it began with at once, and what came of it whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from tandem.errors import InputError
from tandem.recipe import RECORD, without_none
from tandem.run.disk import finite_or_none, write_json, write_whole, writing
from tandem.run.record import Settings, record_of

SUMMARY, PAGE, PAIRS = "summary.json", "eval.md", "pairs.jsonl"


class EvalFolder:
    """`config.toml`, `run.json`; at the end `pairs.jsonl` (a comparison a line), `eval.md` and `summary.json`.

    The summary is written last: a folder without it holds an evaluation that did not come to its end.
    """

    def __init__(self, path: Path, config: Settings) -> None:
        """Raises InputError where the folder holds a run or a finished evaluation, or cannot be written."""
        check_unused(path)
        try:
            for name in (PAGE, PAIRS):
                (path / name).unlink(missing_ok=True)
            write_whole(path / "config.toml", tomli_w.dumps(without_none(config.model_dump())))
            write_json(record_of("eval", config), path / RECORD)
        except OSError as error:
            raise InputError(f"run.directory = {str(path)!r} cannot be written: {error.strerror}.") from error
        self.path = path

    def write(self, summary: Mapping[str, Any], page: str, pairs: Sequence[Mapping[str, Any]]) -> None:
        """What came of it. Raises RunError where the disk does not take it."""
        lines = (json.dumps(finite_or_none(pair), ensure_ascii=False) for pair in pairs)
        with writing(self.path):
            write_whole(self.path / PAIRS, "\n".join(lines) + "\n")
            write_whole(self.path / PAGE, page)
            write_json(summary, self.path / SUMMARY)


def check_unused(path: Path) -> None:
    """Raises InputError where a run has left metrics in the folder, or a run or an evaluation its summary."""
    metrics = path / "metrics.jsonl"
    if (path / SUMMARY).exists() or (metrics.exists() and metrics.stat().st_size > 0):
        raise InputError(
            f"{path} already holds a run or an evaluation; choose another folder with --run.directory, or take it away."
        )
