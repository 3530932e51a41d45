"""The comparison as a page for people, from the same record that is written as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.bench.rows import DECODING, STEP

HEAD = """# Performance

Made by `make bench` (the same numbers as JSON: [performance.json](performance.json)); `tandem bench --model DIR` times
a model of your own. Why the code is as it is, and what did not help: [decision 10](decisions/0010-speed.md).

Each side of a row is a process of its own, and the sides take turns, round by round; a ratio is that of the medians of
one round, and a range is over rounds. The first step or batch of each process is left out. On a CPU the layers of
Tandem's models are compiled before (`compute.compiled`, as long runs do by themselves), and that time is left out too.
Tandem's prompts are beginnings of sentences where the tokenizer writes such; a peer's are tokens at random, which takes
it as long. On a CPU a micro-batch of Tandem's holds up to 4,096 tokens, its default; of TRL's 8 sequences, and 32 where
nothing is learnt. Absolute times are of one machine at one time: quote ratios.

{machine}

*Limit* is the time that the work would take if nothing were computed twice and every product ran as fast as products of
the model's width with 2,048 rows did on this machine in those minutes (for decoding: or, where that is slower, if the
weights were read once a token at the rate at which memory is read); *share* is how near Tandem comes to it, and *at the
limit* how many times faster than the peer it would be there. *Products* is that rate, looked at before and after each
side of each round: its mean, least and greatest. A machine that others share does not keep it.
"""

GPU = """## On a GPU
`make bench` on a machine with a GPU times random weights of real shapes (0.5B and 1.5B with four models, 7B with one
trunk) in bfloat16, with the same code as here. It has not been run on one yet: nothing is claimed.
"""


def page(record: Mapping[str, Any]) -> str:
    """Markdown."""
    machine = record["machine"]
    said = (
        f"Machine: {machine['processor']}, {machine['threads']} threads; matrix units for bfloat16: "
        f"{'yes' if machine['fast_bfloat16'] else 'no'}. torch {machine['torch']}, transformers "
        f"{machine['transformers']}. Seed 0."
    )
    parts = [HEAD.format(machine=said)]
    for kind, title in ((STEP, "A joint step"), (DECODING, "Decoding alone")):
        rows = sorted(
            (row for row in record["rows"] if row["kind"] == kind),
            key=lambda row: (row["workload"]["name"], row["workload"]["precision"] != "float32"),
        )
        if rows:
            parts.append(f"## {title}\n{_table(kind, rows)}")
    if any(row["tandem"]["phases"] for row in record["rows"]):
        parts.append(f"## Where a step's time goes\n{_phases(record['rows'])}")
    if record.get("growth"):
        parts.append(_growth(record["growth"]))
    parts.append(GPU)
    return "\n".join(parts).rstrip() + "\n"


def _table(kind: str, rows: Sequence[Mapping[str, Any]]) -> str:
    unit = "s a step" if kind == STEP else "tokens/s"
    lines = [
        f"| work | precision | Tandem, {unit} | share of the limit | peers: {unit} | times faster | at the limit | "
        "products, TFLOP/s | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        work, ours = row["workload"], row["tandem"]
        size = f"{work['sequences']} x ({work['prompt_tokens']} + {work['response_tokens']})"
        peers = list(row["peers"].values())
        cells = [
            f"{work['name']}, {size}",
            work["precision"],
            _speed(kind, row, ours),
            f"{ours['share_of_limit']:.0%}",
            "; ".join(f"{peer['version']} {_speed(kind, row, peer)}" for peer in peers) or "-",
            "; ".join(_ratio(peer["ratios"]) for peer in peers) or "-",
            "; ".join(f"{peer['seconds'] / row['seconds_at_the_limit']:.1f}" for peer in peers) or "-",
            _products(row["gigaflops_per_second"]),
            _memory(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _speed(kind: str, row: Mapping[str, Any], side: Mapping[str, Any]) -> str:
    return f"{side['seconds']:.1f}" if kind == STEP else f"{row['tokens'] / side['seconds']:,.0f}"


def _ratio(found: Sequence[float]) -> str:
    return f"**{statistics.median(found):.1f}** ({min(found):.1f} to {max(found):.1f})"


def _products(paces: Sequence[float]) -> str:
    usual, least, most = statistics.mean(paces) / 1e3, min(paces) / 1e3, max(paces) / 1e3
    return f"{usual:.2f} ({least:.2f} to {most:.2f})"


def _memory(row: Mapping[str, Any]) -> str:
    sides = [row["tandem"], *row["peers"].values()]
    known = [f"{side['peak_memory_gib']:.1f}" for side in sides if side["peak_memory_gib"]]
    return f"{' against '.join(known)} GiB" if known else "-"


def _phases(rows: Sequence[Mapping[str, Any]]) -> str:
    names = ("rollout", "score", "evaluate", "update")
    lines = [
        "| work | precision | " + " | ".join(names) + " | share of the limit in the update |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    for row in rows:
        phases = row["tandem"]["phases"]
        if phases:
            total = sum(phases.values())
            shares = " | ".join(f"{phases[name] / total:.0%}" for name in names)
            learning = row["tandem"]["share_of_limit_in_update"]
            lines.append(f"| {row['workload']['name']} | {row['workload']['precision']} | {shares} | {learning:.0%} |")
    return "\n".join(lines) + "\n"


def _growth(growth: Mapping[str, Any]) -> str:
    lines = [
        "## Growth",
        "One joint step of a small Llama while one thing grows and the rest stays; the exponent is the slope of "
        "log(seconds) over log(size), 1 where cost is in proportion. *Logits* is the largest number of bytes of "
        "logits that existed at a time, counted rather than timed.\n",
        "![growth](performance-growth.png)\n",
        "| what grows | " + "from ... to | seconds | exponent | logits, MiB |",
        "|---|---|---|---|---|",
    ]
    for name, found in growth.items():
        cells = [
            name,
            ", ".join(f"{point['size']:,}" for point in found["points"]),
            ", ".join(f"{point['seconds']:.2f}" for point in found["points"]),
            f"{found['exponent']:.2f}",
            ", ".join(f"{point['logits_mib']:.0f}" for point in found["points"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
