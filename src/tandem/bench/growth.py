"""How a joint step's cost grows: with the responses' length, the batch, the vocabulary, the model."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem.bench import timed
from tandem.bench.models import make_reward_model, make_shape
from tandem.bench.rows import answer_of
from tandem.bench.workloads import Workload
from tandem.plan.shapes import SHAPES

SMALL: dict[str, Any] = {
    **SHAPES["llama-15m"],
    "vocab_size": 8_000,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def measure_growth(threads: int, steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    """For each thing that grows: its sizes, seconds a step, the most bytes of logits at a time."""
    return {
        "response tokens": _series(
            [(length, SMALL, {"response_tokens": length}) for length in (32, 64, 128, 256, 512)], threads, steps, say
        ),
        "sequences": _series(
            [(count, SMALL, {"sequences": count}) for count in (8, 16, 32, 64, 128)], threads, steps, say
        ),
        "vocabulary": _series(
            [(size, SMALL | {"vocab_size": size}, {}) for size in (8_000, 16_000, 32_000, 64_000, 128_000)],
            threads,
            steps,
            say,
        ),
        "model width": _series(
            [
                (width, SMALL | {"hidden_size": width, "intermediate_size": width * 11 // 4}, {})
                for width in (64, 128, 256, 512)
            ],
            threads,
            steps,
            say,
        ),
    }


def _series(
    points: list[tuple[int, dict[str, Any], dict[str, Any]]], threads: int, steps: int, say: Callable[[str], None]
) -> dict[str, Any]:
    found = []
    for size, shape, changes in points:
        say(f"growth: {size}, {changes or 'shape'}")
        with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
            model = make_shape(Path(folder) / "model", shape)
            reward = make_reward_model(str(model), Path(folder) / "reward", None)
            base = Workload("growth", str(model), 16, 16, 64, "float32", tokens_per_microbatch=2048, threads=threads)
            workload = replace(base, **changes)
            words = [workload.to_json(), str(reward), str(steps)]
            answer = answer_of(timed.command("tandem.bench.joint_step", *words))
        seconds = statistics.median(step["time/step"] for step in answer["steps"])
        found.append({"size": size, "seconds": seconds, "logits_mib": answer["peak_logits_bytes"] / 2**20})
    return {"points": found, "exponent": exponent([(point["size"], point["seconds"]) for point in found])}


def exponent(points: list[tuple[int, float]]) -> float:
    """Least-squares slope of log(seconds) over log(size)."""
    logs = [(math.log(size), math.log(seconds)) for size, seconds in points]
    middle = [statistics.fmean(axis) for axis in zip(*logs, strict=True)]
    above = sum((x - middle[0]) * (y - middle[1]) for x, y in logs)
    return above / sum((x - middle[0]) ** 2 for x, _ in logs)


def plot(growth: Mapping[str, Any], path: Path) -> None:
    """Seconds and logits over each size, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(growth), figsize=(3.2 * len(growth), 3.0), constrained_layout=True)
    for axis, (name, found) in zip(axes, growth.items(), strict=True):
        sizes = [point["size"] for point in found["points"]]
        seconds = [point["seconds"] for point in found["points"]]
        axis.loglog(sizes, seconds, "o-", color="#0072B2", label=f"a step (exponent {found['exponent']:.2f})")
        axis.loglog(
            sizes, [seconds[0] * size / sizes[0] for size in sizes], ":", color="#999999", label="in proportion"
        )
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7)
        axis.minorticks_off()
        axis.set_xlabel(name)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("seconds")
    figure.savefig(path, dpi=120)
    plt.close(figure)
