"""The planner against real joint steps on this machine: `python -m plan_check STORY_MODEL [--go-on]`.

With --go-on what was found before on this machine stands where the machine kept its pace, so that a check that was cut
short goes on, and cases in which it did not are tried again. Each case is a process of its own, or two. Writes
docs/results/plan.md and plan.json.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from plan_check.together import in_several
from tandem.bench import timed
from tandem.bench.command import machine
from tandem.bench.joint_step import recipe
from tandem.bench.models import make_reward_model, make_shape
from tandem.bench.rows import answer_of
from tandem.bench.workloads import Workload
from tandem.config import AdapterSection, Gather
from tandem.plan.demand import Lengths, demand_of
from tandem.plan.devices import AttentionPace, Device, this_machine
from tandem.plan.layout import Layout
from tandem.plan.model_size import ModelSize
from tandem.plan.planned import Plan, planned
from tandem.plan.shapes import SHAPES

RESULTS = Path(__file__).parents[2] / "docs" / "results"
STEPS = 2
# A case during which products became faster or slower by more than this is looked at again, so often at most.
STEADY, TRIES = 0.1, 3
WIDE: dict[str, Any] = {
    **SHAPES["llama-15m"],
    "vocab_size": 8_000,
    "hidden_size": 640,
    "intermediate_size": 1_728,
    "num_hidden_layers": 3,
    "num_attention_heads": 10,
}
PHASES = ("rollout", "score", "evaluate", "update")


@dataclass(frozen=True)
class Case:
    """A joint step in one process, or in several that gather of the policy to sample what `gather` says."""

    workload: Workload
    processes: int = 1
    gather: Gather = "model"

    @property
    def name(self) -> str:
        return self.workload.name


def cases(story_model: str, folder: Path) -> Iterator[Case]:
    """Three models, every way of sharing, other lengths, epochs and micro-batches; two processes, both ways of
    sampling.

    The planner's shares and passes were set by the first seven; the others were only looked at afterwards.
    """
    larger = str(make_shape(folder / "llama-15m", SHAPES["llama-15m"]))
    base = Workload("15M", larger, 64, 32, 64, "float32", threads=1)
    yield Case(base)
    yield Case(replace(base, name="15M, epochs 2", sequences=32, prompt_tokens=64, response_tokens=128, epochs=2))
    yield Case(replace(base, name="15M, one trunk", sharing="adapters"))
    yield Case(replace(base, name="15M, one trunk, adapters on 2 layers", sharing="adapters", upper_layers=2))
    yield Case(replace(base, name="15M, value head", sharing="head", tokens_per_microbatch=4096))
    small = replace(base, name="260K", model=story_model, sequences=128, response_tokens=128)
    yield Case(replace(small, tokens_per_microbatch=8192))
    yield Case(replace(small, name="260K, one trunk", sharing="adapters"))
    wide = str(make_shape(folder / "wide", WIDE))
    other = replace(base, model=wide, sequences=32, prompt_tokens=48, response_tokens=48)
    yield Case(replace(other, name="21M, wider and shallower"))
    yield Case(replace(base, name="15M, two processes, gathered whole"), 2, "model")
    yield Case(replace(base, name="15M, two processes, by layer"), 2, "layer")


def device_for(case: Case, size: ModelSize) -> Device:
    """This machine as one of the case's processes has it."""
    if case.processes == 1:
        return this_machine(size, "float32", time.process_time)
    found = in_several([sys.executable, "-m", "plan_check.together", case.workload.model], case.processes)
    return slowest([Device(**one | {"attention": AttentionPace(**one["attention"])}) for one in found])


def slowest(devices: Sequence[Device]) -> Device:
    """Of processes that wait for each other, as if one were the slowest at everything."""
    least = {
        name: min(getattr(device, name) for device in devices) for name in ("flops", "bandwidth", "link", "network")
    }
    most = {name: max(getattr(device, name) for device in devices) for name in ("layer_seconds", "pass_seconds")}
    paces = [device.attention for device in devices if device.attention]
    attention = AttentionPace(max(pace.sequence for pace in paces), max(pace.token for pace in paces))
    return replace(devices[0], **least, **most, attention=attention)


def plan_for(case: Case, size: ModelSize, device: Device) -> Plan:
    workload = case.workload
    lengths = Lengths(
        workload.prompt_tokens, workload.response_tokens, workload.prompt_tokens, workload.response_tokens
    )
    reward = None if workload.sharing == "adapters" else size
    demand = demand_of(recipe(workload, "reward", Path("prompts.jsonl")), size, [reward], lengths, 4)
    layout = Layout(case.processes, device, case.processes, False, "torch", "never", None, gather=case.gather)
    return planned(replace(demand, keeps_state=False), layout)


def measured(case: Case, folder: Path) -> dict[str, Any]:
    """Peak memory, of several processes that of the fullest, and the median seconds of each phase."""
    workload = case.workload
    adapters = AdapterSection(upper_layers=workload.upper_layers) if workload.sharing == "adapters" else None
    reward = folder / f"reward-{Path(workload.model).name}-{workload.sharing}-{workload.upper_layers}"
    if not reward.exists():
        make_reward_model(workload.model, reward, adapters)
    command = timed.command("plan_check.step", workload.to_json(), str(reward), str(STEPS))
    if case.processes == 1:
        found = [answer_of(command)]
    else:
        found = in_several([*command, case.gather], case.processes)
    seconds = {name: statistics.median(step[f"time/{name}"] for step in found[0]["steps"]) for name in PHASES}
    return {"memory_gib": max(one["peak_memory_gib"] for one in found), "seconds": seconds}


def compared(case: Case, folder: Path, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """What was planned and what was measured, for one case, while the machine kept its pace; where it never did, in
    the try in which it did best, an earlier one among them. How far the plan was off has no say in it."""
    best, tries = before, before["tries"] if before else 0
    for _ in range(TRIES):
        if best and change_of_pace(best) < STEADY:
            break
        found, tries = tried_once(case, folder), tries + 1
        best = min(best or found, found, key=change_of_pace)
    assert best is not None
    return best | {"tries": tries}


def change_of_pace(found: dict[str, Any]) -> float:
    """Of products from before a case to after it, the same for twice as fast and half as fast."""
    return abs(math.log(found["pace_after_to_before"]))


def tried_once(case: Case, folder: Path) -> dict[str, Any]:
    """Planned from how fast the machine was before the case, and again from how fast it was after it; the mean of the
    two stands against the measurement."""
    size = ModelSize.of(case.workload.model)
    before = device_for(case, size)
    found = measured(case, folder)
    after = device_for(case, size)
    plans = [plan_for(case, size, device) for device in (before, after)]
    plan = plans[0]
    return {
        "name": case.name,
        "workload": {**json.loads(case.workload.to_json()), "model": Path(case.workload.model).name},
        "processes": case.processes,
        "measured": found,
        "pace_after_to_before": after.flops / before.flops,
        "planned": {
            "memory_gib": plan.memory.peak / 2**30,
            "components_gib": {name: held / 2**30 for name, held in plan.memory.at_peak.items()},
            "seconds": {name: statistics.mean(plan.phases[name].total for plan in plans) for name in PHASES},
        },
    }


def earlier(here: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was found on this machine before, by case."""
    path = RESULTS / "plan.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {case["name"]: case for case in record.get("cases", []) if record["machine"] == here}


def page(record: dict[str, Any]) -> str:
    lines = [
        "| case | memory, GiB: planned | measured | off by | a step, s: planned | measured | off by | pace |",
        "|---|---|---|---|---|---|---|---|",
    ]
    phases = ["| case | " + " | ".join(PHASES) + " |", "|---" * (len(PHASES) + 1) + "|"]
    for case in record["cases"]:
        plan, found = case["planned"], case["measured"]
        memory = versus(plan["memory_gib"], found["memory_gib"])
        step = versus(sum(plan["seconds"].values()), sum(found["seconds"].values()))
        pace = f"{case['pace_after_to_before'] - 1:+.0%}, {case['tries']} tried"
        lines.append(f"| {case['name']} | {' | '.join([*memory, *step, pace])} |")
        cells = ["{} / {} ({})".format(*versus(plan["seconds"][name], found["seconds"][name])) for name in PHASES]
        phases.append(f"| {case['name']} | {' | '.join(cells)} |")
    here = record["machine"]
    return f"""# The planner against measurement

Made by `make plan-check` (the same numbers as JSON: [plan.json](plan.json)). What is planned how:
[scale.md](../scale.md).

Machine: {here["processor"]}, one thread. torch {here["torch"]}, transformers {here["transformers"]}. Each case is a
process of its own, or two; the median of {STEPS} steps after the first. Times of one process are the processor's, not
the wall's, so that other jobs beside do not count; those of two are the wall's. The machine's speeds are measured
before each case and after it, of two processes those of the slower, and what is planned is the mean of before and
after; *pace* is by how much products were faster after it. A case during which they changed by more than
{STEADY:.0%} was tried again, {TRIES} times in one go, and the steadiest try stands, however far the plan was off in
it. On a GPU nothing has been measured yet.

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
    known, found = earlier(here) if "--go-on" in sys.argv else {}, []
    with tempfile.TemporaryDirectory(prefix="tandem-plan-") as made:
        for case in cases(sys.argv[1], Path(made)):
            found.append(compared(case, Path(made), known.get(case.name)))
            print(json.dumps(found[-1]["measured"]), case.name, flush=True)
            record = {"machine": here, "cases": found}
            (RESULTS / "plan.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            (RESULTS / "plan.md").write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()
