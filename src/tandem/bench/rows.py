"""The rows of the comparison, and how each side of a row is run: a process of its own, the sides in turn."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tandem.bench import timed
from tandem.bench.arithmetic import decoding_floor, joint_step_flops, learning_flops
from tandem.bench.models import make_reward_model, make_shape
from tandem.bench.workloads import Precision, Sharing, Workload
from tandem.config import AdapterSection
from tandem.errors import RunError
from tandem.plan.devices import Pace, measure_pace
from tandem.plan.model_size import ModelSize
from tandem.plan.shapes import SHAPES

PEERS = Path(__file__).parent / "peers"
SCRIPTS = {"trl": "trl_step.py", "transformers": "transformers_generate.py", "vllm": "vllm_generate.py"}
STEP, DECODING = "joint step", "decoding"


@dataclass(frozen=True)
class Row:
    """A workload, what of it is timed, and the systems that it is timed against."""

    kind: str
    workload: Workload
    peers: tuple[str, ...]


@dataclass
class Measured:
    """One side of a row: seconds of every step or batch, a list for each round."""

    rounds: list[list[float]] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    peak_memory_gib: float | None = None
    version: str = "this version of Tandem"

    @property
    def seconds(self) -> float:
        return statistics.median(second for found in self.rounds for second in found)

    def add(self, answer: dict[str, Any]) -> None:
        steps = answer.get("steps")
        self.rounds.append([step["time/step"] for step in steps] if steps else answer["seconds"])
        for step in steps or []:
            for name, value in step.items():
                if name.startswith("time/") and name != "time/step":
                    self.phases.setdefault(name.removeprefix("time/"), []).append(value)
        if answer.get("peak_device_memory_gib") or answer.get("peak_memory_gib"):
            found = answer.get("peak_device_memory_gib") or answer["peak_memory_gib"]
            self.peak_memory_gib = max(found, self.peak_memory_gib or 0.0)
        self.version = answer["version"] if isinstance(answer.get("version"), str) else self.version


def standard_rows(small_chat_model: str | None, device: str, threads: int) -> list[Row]:
    """Those of docs/performance.md; the ones on a chat model are left out where there is none."""
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    step, batch = (64, 32, 64), (64, 32, 32)

    def of(name: str, model: str, sizes: tuple[int, int, int], precision: Precision, **more: Any) -> Workload:
        compiled = device == "cpu"
        return Workload(name, model, *sizes, precision, device=device, threads=threads, compiled=compiled, **more)

    rows = [
        Row(STEP, of("15M Llama, 4 epochs", "llama-15m", step, precision, epochs=4), ("trl",))
        for precision in precisions
    ]
    if small_chat_model is not None:
        for precision in precisions:
            four = of("SmolLM2-135M", small_chat_model, (32, 16, 32), precision)
            one = replace(
                four, name="SmolLM2-135M, one trunk, adapters on 8 layers", sharing="adapters", upper_layers=8
            )
            rows += [Row(STEP, four, ("trl",)), Row(STEP, one, ("trl",))]
    for precision in precisions:
        rows.append(Row(DECODING, of("15M Llama", "llama-15m", step, precision), ("transformers", "vllm")))
        if small_chat_model is not None:
            chat = of("SmolLM2-135M", small_chat_model, batch, precision)
            rows.append(Row(DECODING, chat, ("transformers", "vllm")))
    return rows


def gpu_rows(device: str) -> list[Row]:
    """Random weights of real shapes, in bfloat16: the largest with one trunk."""

    def of(model: str, sizes: tuple[int, int, int], budget: int, layers: int | None = None) -> Workload:
        name = model if layers is None else f"{model}, one trunk, adapters on {layers} layers"
        sharing: Sharing = "separate" if layers is None else "adapters"
        four = Workload(name, model, *sizes, "bfloat16", tokens_per_microbatch=budget, device=device)
        return replace(four, sharing=sharing, upper_layers=layers)

    sizes = (64, 128, 256)
    steps = [of("qwen-0.5b", sizes, 16_384), of("qwen-1.5b", sizes, 16_384), of("qwen-7b", sizes, 8_192, layers=8)]
    rows = [Row(STEP, step, ("trl",) if step.sharing == "separate" else ()) for step in steps]
    batches = [of(step.model, sizes, step.tokens_per_microbatch) for step in steps]
    return rows + [Row(DECODING, batch, ("transformers", "vllm")) for batch in batches]


def rows_of_model(model: str, device: str, threads: int, precision: Precision) -> list[Row]:
    """A joint step and decoding on a person's own model."""
    compiled = device == "cpu"
    step = Workload(model, model, 32, 32, 64, precision, device=device, threads=threads, compiled=compiled)
    return [Row(STEP, step, ("trl",)), Row(DECODING, step, ("transformers", "vllm"))]


class Bench:
    """Runs rows; what they need is made once in a folder of its own."""

    def __init__(
        self, pythons: dict[str, str], rounds: int, steps: int, dtype: torch.dtype, say: Callable[[str], None]
    ) -> None:
        """`pythons` are the interpreters that each peer is installed in; a peer without one is left out.

        Models that are made for the purpose are kept in `dtype`.
        """
        self._dtype = dtype
        self._pythons = pythons
        self._rounds = rounds
        self._steps = steps
        self._say = say
        self._folder = tempfile.TemporaryDirectory(prefix="tandem-bench-")

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def run(self, row: Row) -> dict[str, Any]:
        """Every side in turn, round by round; what was found, as it goes into the page.

        How fast the machine is, is looked at before and after each side.
        """
        workload = row.workload.at(self._model(row.workload.model))
        size = ModelSize.of(workload.model)
        sides = ["tandem", *(peer for peer in row.peers if peer in self._pythons)]
        found, paces = {side: Measured() for side in sides}, [pace_now(size, workload)]
        for number in range(self._rounds):
            for side in sides:
                self._say(f"{row.kind}, {workload.name}, {workload.precision}: {side}, round {number + 1}")
                found[side].add(answer_of(self._command(row.kind, side, workload)))
                paces.append(pace_now(size, workload))
        return self._record(row, workload, found, paces)

    def _record(
        self, row: Row, workload: Workload, found: dict[str, Measured], paces: Sequence[Pace]
    ) -> dict[str, Any]:
        ours, size = found["tandem"], ModelSize.of(workload.model)
        pace = over_all(paces)
        shares: dict[str, float] = {}
        if row.kind == STEP:
            flops: float | None = (needed := joint_step_flops(size, workload))
            floor = needed / pace.flops
            learning = learning_flops(size, workload) / pace.flops
            shares["share_of_limit_in_update"] = learning / statistics.median(ours.phases["update"])
        else:
            flops, floor = None, decoding_floor(size, workload, pace)
        shares["share_of_limit"] = floor / ours.seconds
        return {
            "kind": row.kind,
            "workload": json.loads(row.workload.to_json()),
            "tokens": workload.response_total,
            "gigaflops": None if flops is None else flops / 1e9,
            "gigaflops_per_second": [found.flops / 1e9 for found in paces],
            "gigabytes_per_second": [found.bandwidth / 1e9 for found in paces],
            "seconds_at_the_limit": floor,
            "tandem": self._side(ours) | shares,
            "peers": {
                name: self._side(other) | {"ratios": ratios(other, ours)}
                for name, other in found.items()
                if name != "tandem"
            },
        }

    @staticmethod
    def _side(side: Measured) -> dict[str, Any]:
        phases = {name: statistics.median(seconds) for name, seconds in side.phases.items()}
        return {
            "version": side.version,
            "seconds": side.seconds,
            "rounds": side.rounds,
            "phases": phases,
            "peak_memory_gib": side.peak_memory_gib,
        }

    def _model(self, name: str) -> Path:
        folder = Path(self._folder.name) / name
        if name not in SHAPES:
            return Path(name)
        return folder if folder.exists() else make_shape(folder, SHAPES[name], self._dtype)

    def _reward_model(self, workload: Workload) -> Path:
        adapters = AdapterSection(upper_layers=workload.upper_layers) if workload.sharing == "adapters" else None
        folder = Path(self._folder.name) / f"reward-{Path(workload.model).name}-{workload.sharing}"
        if not folder.exists():
            make_reward_model(workload.model, folder, adapters, self._dtype)
        return folder

    def _command(self, kind: str, side: str, workload: Workload) -> list[str]:
        steps = str(self._steps)
        if side != "tandem":
            return [self._pythons[side], str(PEERS / SCRIPTS[side]), workload.to_json(), steps]
        if kind == STEP:
            module, extra = "tandem.bench.joint_step", [str(self._reward_model(workload))]
        else:
            module, extra = "tandem.bench.decoding", []
        return timed.command(module, workload.to_json(), *extra, steps)


def answer_of(command: Sequence[str]) -> dict[str, Any]:
    """The JSON that a side prints as its last line. Raises RunError where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(f"{command[0]} {command[1]} {command[2][:40]}... ended with {done.returncode}: {last}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def pace_now(size: ModelSize, workload: Workload) -> Pace:
    """What products of the model's width and reading memory usually reach just now."""
    return measure_pace(size, workload.precision, workload.device, seconds=0.3)


def over_all(paces: Sequence[Pace]) -> Pace:
    """What the machine reached over a row, as long at each pace."""
    return Pace(
        statistics.mean(found.flops for found in paces),
        statistics.mean(found.bandwidth for found in paces),
    )


def ratios(peer: Measured, ours: Measured) -> list[float]:
    """How many times faster we were, round by round."""
    pairs = zip(peer.rounds, ours.rounds, strict=True)
    return [statistics.median(theirs) / statistics.median(own) for theirs, own in pairs]
