"""`tandem bench`: the rows of docs/performance.md, or a model of one's own, against what else is installed."""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tandem.bench.growth import measure_growth, plot
from tandem.bench.page import page
from tandem.bench.rows import Bench, Row, gpu_rows, rows_of_model, standard_rows
from tandem.demo.base_model import smollm2
from tandem.errors import InputError
from tandem.models.loading import pick_device, pick_dtype
from tandem.models.source import read_config
from tandem.run import Progress
from tandem.run.disk import write_json, write_whole, writing


@dataclass(frozen=True)
class BenchSettings:
    """What to time, `rounds` times each side.

    `only` keeps the row of that name (kind, work, precision), or those whose names hold all of its words.
    `trl_python` and `vllm_python` are interpreters that have TRL 1.12 or vLLM; those without one are left out.
    """

    model: str | None
    only: str | None
    rounds: int
    steps: int
    growth: bool
    out: Path | None
    trl_python: str | None
    vllm_python: str | None
    device: str
    threads: int | None


def run_bench(settings: BenchSettings, progress: Progress) -> dict[str, Any]:
    """Time the rows one after the other; with `out`, write the page, the same as JSON, and the growth's plot.

    Rows that the folder holds from before, of the same machine and versions, stay.

    Raises InputError where nothing is left to time, RunError where a side fails.
    """
    device = pick_device(settings.device)
    threads = settings.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = chosen_rows(settings, device, threads, progress)
    pythons = interpreters(settings)
    record = earlier(settings.out, machine(device, threads))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with Bench(pythons, settings.rounds, settings.steps, dtype, progress.say) as bench:
        for row in rows:
            found = bench.run(row)
            record["rows"] = [other for other in record["rows"] if not same_line(other, found)] + [found]
            progress.say(line(found))
            write(record, settings.out)
    if settings.growth:
        record["growth"] = measure_growth(threads, settings.steps, progress.say)
        write(record, settings.out)
    return record


def write(record: Mapping[str, Any], out: Path | None) -> None:
    """The record, the page made of it and the growth's plot; after every row, since a row can take minutes."""
    if out is None:
        return
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(record, out / "performance.json")
        write_whole(out / "performance.md", page(record))
        if record.get("growth"):
            plot(record["growth"], out / "performance-growth.png")


def earlier(out: Path | None, here: dict[str, Any]) -> dict[str, Any]:
    """What was timed on this machine with these versions before, so that rows can be timed one by one."""
    path = None if out is None else out / "performance.json"
    if path is not None and path.is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"{path} is damaged; remove it, and time all rows anew.") from None
        if record.get("machine") == here:
            return dict(record)
    return {"machine": here, "rows": []}


def same_line(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether both fill one line of the page, also where the settings of that line have changed since."""

    def named(row: Mapping[str, Any]) -> tuple[str, str, str]:
        return row["kind"], row["workload"]["name"], row["workload"]["precision"]

    return named(one) == named(other)


def chosen_rows(settings: BenchSettings, device: torch.device, threads: int, progress: Progress) -> list[Row]:
    """Of all rows those that were asked for. Raises InputError where there is none."""
    if settings.model is not None:
        read_config(settings.model, "--model")
        fast = pick_dtype("auto", device) == torch.bfloat16
        rows = rows_of_model(settings.model, str(device), threads, "bfloat16" if fast else "float32")
    elif device.type == "cuda":
        rows = gpu_rows(str(device))
    else:
        try:
            chat = str(smollm2(progress))
        except InputError as error:
            progress.warn(f"rows on SmolLM2 are left out: {error}")
            chat = None
        rows = standard_rows(chat, str(device), threads)
    return rows if settings.only is None else named_rows(rows, settings.only)


def named_rows(rows: Sequence[Row], only: str) -> list[Row]:
    """The row of that name, or else those whose names hold all of its words."""
    names = [f"{row.kind} {row.workload.name} {row.workload.precision}" for row in rows]
    kept = [row for row, name in zip(rows, names, strict=True) if name == only]
    kept = kept or [row for row, name in zip(rows, names, strict=True) if all(word in name for word in only.split())]
    if not kept:
        raise InputError(f"--only {only!r} leaves no row; there are: {'; '.join(names)}.")
    return kept


def interpreters(settings: BenchSettings) -> dict[str, str]:
    """The Python of each peer. Raises InputError for one that is not there."""
    found = {"transformers": sys.executable}
    for name, python in (("trl", settings.trl_python), ("vllm", settings.vllm_python)):
        if python is None:
            continue
        if shutil.which(python) is None:
            raise InputError(f"--{name}-python = {python!r} is no program; give the python of an environment with it.")
        found[name] = python
    return found


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    return {
        "processor": processor(device),
        "threads": threads,
        "fast_bfloat16": pick_dtype("auto", device) == torch.bfloat16,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = Path("/proc/cpuinfo")
    said = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    names = [text.partition(":")[2].strip() for text in said if text.startswith("model name")]
    return names[0] if names else platform.machine()


def line(row: Mapping[str, Any]) -> str:
    """A row's result in a line."""
    ours, work = row["tandem"], row["workload"]
    said = [f"{row['kind']}, {work['name']}, {work['precision']}: {ours['seconds']:.2f} s"]
    said.append(f"{row['tokens'] / ours['seconds']:,.0f} response tokens/s")
    said.append(f"{ours['share_of_limit']:.0%} of the limit")
    said += [f"{statistics.median(peer['ratios']):.1f} times {peer['version']}" for peer in row["peers"].values()]
    return ", ".join(said)
