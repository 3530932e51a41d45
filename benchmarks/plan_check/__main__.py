"""The planner against real joint steps on this machine: `python -m plan_check STORY_MODEL`.

Each case is a process of its own. Writes docs/results/plan.md and plan.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tandem.bench.command import machine
from tandem.bench.joint_step import recipe
from tandem.bench.models import make_reward_model, make_shape
from tandem.bench.rows import answer_of
from tandem.bench.workloads import Workload
from tandem.config import AdapterSection
from tandem.plan.demand import Lengths, demand_of
from tandem.plan.devices import Device, this_machine
from tandem.plan.layout import Layout
from tandem.plan.model_size import ModelSize
from tandem.plan.planned import Plan, planned
from tandem.plan.shapes import SHAPES

RESULTS = Path(__file__).parents[2] / "docs" / "results"
STEPS = 2
WIDE: dict[str, Any] = {
    **SHAPES["llama-15m"],
    "vocab_size": 8_000,
    "hidden_size": 640,
    "intermediate_size": 1_728,
    "num_hidden_layers": 3,
    "num_attention_heads": 10,
}
PHASES = ("rollout", "score", "evaluate", "update")


def cases(story_model: str, folder: Path) -> Iterator[Workload]:
    """Three models, every way of sharing, other lengths, epochs and micro-batches.

    The planner's shares and passes were set by the first seven; the last one was only looked at afterwards.
    """
    larger = str(make_shape(folder / "llama-15m", SHAPES["llama-15m"]))
    base = Workload("15M", larger, 64, 32, 64, "float32", threads=1)
    yield base
    yield replace(base, name="15M, epochs 2", sequences=32, prompt_tokens=64, response_tokens=128, epochs=2)
    yield replace(base, name="15M, one trunk", sharing="adapters")
    yield replace(base, name="15M, one trunk, adapters on 2 layers", sharing="adapters", upper_layers=2)
    yield replace(base, name="15M, value head", sharing="head", tokens_per_microbatch=4096)
    small = replace(base, name="260K", model=story_model, sequences=128, response_tokens=128)
    yield replace(small, tokens_per_microbatch=8192)
    yield replace(small, name="260K, one trunk", sharing="adapters")
    wide = str(make_shape(folder / "wide", WIDE))
    yield replace(base, name="21M, wider and shallower", model=wide, sequences=32, prompt_tokens=48, response_tokens=48)


def plan_for(workload: Workload, size: ModelSize, device: Device) -> Plan:
    lengths = Lengths(
        workload.prompt_tokens, workload.response_tokens, workload.prompt_tokens, workload.response_tokens
    )
    reward = None if workload.sharing == "adapters" else size
    demand = demand_of(recipe(workload, "reward", Path("prompts.jsonl")), size, [reward], lengths, 4)
    layout = Layout(1, device, 1, False, "torch", "never", None)
    return planned(replace(demand, keeps_state=False), layout)


def measured(workload: Workload, folder: Path) -> dict[str, Any]:
    """Peak memory, and the median seconds of each phase."""
    adapters = AdapterSection(upper_layers=workload.upper_layers) if workload.sharing == "adapters" else None
    reward = folder / f"reward-{Path(workload.model).name}-{workload.sharing}-{workload.upper_layers}"
    if not reward.exists():
        make_reward_model(workload.model, reward, adapters)
    command = [sys.executable, "-m", "plan_check.step", workload.to_json(), str(reward), str(STEPS)]
    found = answer_of(command)
    seconds = {name: statistics.median(step[f"time/{name}"] for step in found["steps"]) for name in PHASES}
    return {"memory_gib": found["peak_memory_gib"], "seconds": seconds}


def compared(workload: Workload, plan: Plan, found: dict[str, Any]) -> dict[str, Any]:
    """What was planned and what was measured, for one case."""
    return {
        "name": workload.name,
        "workload": {**json.loads(workload.to_json()), "model": Path(workload.model).name},
        "measured": found,
        "planned": {
            "memory_gib": plan.memory.peak / 2**30,
            "components_gib": {name: held / 2**30 for name, held in plan.memory.at_peak.items()},
            "seconds": {name: plan.phases[name].total for name in PHASES},
        },
    }


def earlier(here: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured on this machine before, by case, so that a check that was cut short goes on."""
    path = RESULTS / "plan.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {case["name"]: case["measured"] for case in record.get("cases", []) if record["machine"] == here}


def page(record: dict[str, Any]) -> str:
    lines = [
        "| case | memory, GiB: planned | measured | off by | a step, s: planned | measured | off by |",
        "|---|---|---|---|---|---|---|",
    ]
    phases = ["| case | " + " | ".join(PHASES) + " |", "|---" * (len(PHASES) + 1) + "|"]
    for case in record["cases"]:
        plan, found = case["planned"], case["measured"]
        memory = versus(plan["memory_gib"], found["memory_gib"])
        step = versus(sum(plan["seconds"].values()), sum(found["seconds"].values()))
        lines.append(f"| {case['name']} | {' | '.join([*memory, *step])} |")
        cells = ["{} / {} ({})".format(*versus(plan["seconds"][name], found["seconds"][name])) for name in PHASES]
        phases.append(f"| {case['name']} | {' | '.join(cells)} |")
    here = record["machine"]
    return f"""# The planner against measurement

Made by `make plan-check` (the same numbers as JSON: [plan.json](plan.json)). What is planned how:
[scale.md](../scale.md).

Machine: {here["processor"]}, one thread. torch {here["torch"]}, transformers {here["transformers"]}. Each case is a
process of its own; the median of {STEPS} steps after the first. Times are the processor's, not the wall's, so that
other jobs beside do not count. On a GPU nothing has been measured yet.

{chr(10).join(lines)}

Seconds by phase, planned / measured:

{chr(10).join(phases)}
"""


def versus(planned_value: float, found: float) -> list[str]:
    """Planned, measured, and by how much the plan is off."""
    return [f"{planned_value:.2f}", f"{found:.2f}", f"{planned_value / found - 1:+.0%}"]


def main() -> None:
    here = machine(torch.device("cpu"), 1)
    torch.set_num_threads(1)
    known, devices, found = earlier(here), {}, []
    with tempfile.TemporaryDirectory(prefix="tandem-plan-") as made:
        for workload in cases(sys.argv[1], Path(made)):
            size = ModelSize.of(workload.model)
            if size.hidden not in devices:
                devices[size.hidden] = this_machine(size, "float32", time.process_time)
            measurement = known.get(workload.name) or measured(workload, Path(made))
            found.append(compared(workload, plan_for(workload, size, devices[size.hidden]), measurement))
            print(json.dumps(found[-1]["measured"]), workload.name, flush=True)
            record = {"machine": here, "cases": found}
            (RESULTS / "plan.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            (RESULTS / "plan.md").write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()
