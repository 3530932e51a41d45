"""What streaming costs and saves: start-up and memory against the size of a file, whose rows are made on the spot.

usage: python benchmarks/streaming.py DOCS

Each run is a process of its own: three steps of SFT on a tiny model. The page tells processor time, which other work on
the machine moves little.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from transformers import AutoModelForCausalLM

from tandem.allocator import peak_memory
from tandem.cli import main
from tandem.data.feed import Maker
from tandem.data.rows import Source
from tandem.data.stream import open_stream
from tiny import make_config, make_tokenizer

MIB = 2**20
# The smallest has more rows than a buffer.
SIZES = (12, 500)
IN_MEMORY = (12,)
BUFFER_ROWS = 10_000
ROW = "the film was a slow and quiet thing about the sea and the people who live by it " * 12
STREAMED = ["--data.streaming=true", "--data.max_tokens=200"]
WHOLE = ["--data.max_tokens=200", "--data.eval_fraction=0.001"]
QUARTERS = 4


def rows(mebibytes: int) -> range:
    return range(mebibytes * MIB // (len(ROW) + 40))


def row(number: int) -> dict[str, str]:
    return {"text": f"row {number}: {ROW}"}


def write_jsonl(path: Path, mebibytes: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f'{{"text": "row {number}: {ROW}"}}\n' for number in rows(mebibytes))


def write_parquet(path: Path, mebibytes: int) -> None:
    """So many MiB of text; without compression, which would make little of such rows."""
    schema = pyarrow.schema([("text", pyarrow.string())])
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False}
    with pyarrow.parquet.ParquetWriter(path, schema, **options) as writer:
        numbers = rows(mebibytes)
        for start in range(0, len(numbers), 10_000):
            part = [row(number) for number in numbers[start : start + 10_000]]
            writer.write_table(pyarrow.Table.from_pylist(part, schema))


def resident() -> float:
    """MiB of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def run_once(model: str, path: str, words: list[str]) -> dict[str, float]:
    """In a process of its own: seconds by both clocks and MiB that three steps took, beyond the imports."""
    import tandem.stages.sft  # noqa: F401

    before, wall, processor = resident(), time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        more = ["--sequences_per_minibatch=8", "--steps=3", "--data.too_long=truncate", "--run.trackers=[]"]
        status = main(["sft", f"--model={model}", f"--data.train={path}", f"--run.directory={folder}", *more, *words])
    peak = peak_memory() / 2**20
    if status != 0:
        raise SystemExit(status)
    return {
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
        "mebibytes": peak - before,
    }


def apart(what: str, *given: str) -> dict[str, Any]:
    """What this file measures in a process of its own."""
    said = subprocess.run([sys.executable, __file__, what, *given], capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def walk(path: str) -> dict[str, Any]:
    """All rows of the file through the stream: memory after each quarter, and how long it takes to go on near its end.

    Rows become their lengths, so that it is the stream's own cost.
    """
    maker = Maker(lambda row, _: len(row.columns["text"]), lambda row: row.place, "refuse", "nothing")
    source = Source(path, "data.train", "train", {})
    stream, _ = open_stream(source, maker, BUFFER_ROWS, 0, 0.0, Counter())
    batches, count = stream.batches(100), len(rows(SIZES[-1])) // 100
    began, memory = time.process_time(), [resident()]
    for quarter in range(QUARTERS):
        ((_, place),) = deque(islice(batches, count // QUARTERS), maxlen=1)
        memory.append(resident())
        if quarter == 0:
            first = time.process_time() - began
    again = time.process_time()
    next(stream.batches(100, count, place))
    return {
        "mebibytes": memory,
        "seconds_of_a_quarter": first,
        "seconds_to_go_on_at_the_end": time.process_time() - again,
    }


def measure() -> dict[str, Any]:
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), make_tokenizer()
        AutoModelForCausalLM.from_config(make_config("llama", len(tokenizer))).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        walks = {}
        for kind, write in (("jsonl", write_jsonl), ("parquet", write_parquet)):
            for size in SIZES:
                path = folder / f"rows_{size}.{kind}"
                write(path, size)
                ways = {"streaming": STREAMED} | ({"in memory": WHOLE} if kind == "jsonl" and size in IN_MEMORY else {})
                for way, words in ways.items():
                    figures = apart("--run", str(folder / "model"), str(path), *words)
                    found.append({"kind": kind, "mebibytes_of_text": size, "way": way, **figures})
                    print(found[-1], flush=True)
                if size == SIZES[-1]:
                    walks[kind] = apart("--walk", str(path))
                    print(walks[kind], flush=True)
                path.unlink()
    return {"runs": found, "walks": walks, "rows": len(rows(SIZES[-1]))}


def page(found: dict[str, Any]) -> str:
    runs = [
        f"| {run['kind']} | {run['mebibytes_of_text']} MiB | {run['way']} | {run['processor_seconds']:.1f} | "
        f"{run['mebibytes']:.0f} MiB |"
        for run in found["runs"]
    ]
    walks = [
        f"| {kind} | {' | '.join(f'{memory:.0f}' for memory in one['mebibytes'])} | "
        f"{one['seconds_of_a_quarter']:.1f} | {one['seconds_to_go_on_at_the_end']:.2f} |"
        for kind, one in found["walks"].items()
    ]
    head = "| file | " + " | ".join(["at first", *(f"{n}/{QUARTERS}" for n in range(1, QUARTERS + 1))])
    lines = [
        "# Data larger than memory",
        "",
        "Made by `make streaming` ([streaming.md](../streaming.md) says what the setting does). Rows of about 1 kB, "
        f"made on the spot; a buffer of {BUFFER_ROWS:,} rows, the default; figures in `streaming.json`.",
        "",
        "## Three steps of SFT on a tiny model, from nothing to the summary",
        "Processor seconds and memory are those beyond the imports. A stream holds a tenth of its first buffer out and "
        "measures the model on it before and after; the file in memory, where every row is tokenised, holds out a "
        "thousandth.",
        "",
        "| file | its text | way | processor s | peak memory |",
        "|---|---:|---|---:|---:|",
        *runs,
        "",
        f"## All {found['rows']:,} rows of the largest file, once through the stream",
        "Resident MiB of the process after each quarter, the processor time of the first, and that of going on from a "
        "place at the end.",
        "",
        f"{head} | s of a quarter | s to go on at the end |",
        "|---|" + "---:|" * (QUARTERS + 3),
        *walks,
    ]
    return "\n".join([*lines, ""])


def write_results(docs: Path) -> None:
    found = measure()
    (docs / "results" / "streaming.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (docs / "results" / "streaming.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--run":
        print(json.dumps(run_once(sys.argv[2], sys.argv[3], sys.argv[4:])))
    elif sys.argv[1] == "--walk":
        print(json.dumps(walk(sys.argv[2])))
    else:
        write_results(Path(sys.argv[1]))
