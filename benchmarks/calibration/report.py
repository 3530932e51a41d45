"""What the rules said of every run, and how often they were right."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration import stories, tables
from calibration.cases import FAULTS, HEALTHY, Case, Table
from calibration.margins import reached, table
from tandem.config import PpoConfig
from tandem.health import RULES, Watch, watched
from tandem.health.imports import read_run

WANTED_HITS, WANTED_ALARMS, WANTED_SEEDS = 0.9, 1 / 20, 5


def judged(case: Case, seed: int, kept: Mapping[str, Any]) -> dict[str, Any]:
    """A run's findings, and the step at which its fault was first called by name."""
    config = PpoConfig.model_validate(kept["recipe"])
    findings = watched(kept["rows"], config).findings
    named = said_at(kept["rows"], config, case.rules)
    return {
        "place": case.place,
        "case": case.name,
        "seed": seed,
        "rules": list(case.rules),
        "steps": len(kept["rows"]),
        "named_at": named,
        "findings": [[finding.rule, finding.first_step, finding.last_step] for finding in findings],
        "reached": reached(kept["rows"]),
    }


def said_at(rows: Sequence[Mapping[str, Any]], config: PpoConfig, rules: Sequence[str]) -> int | None:
    """The step at which a rule first speaks, live."""
    watch = Watch(config)
    for row in rows:
        if any(finding.rule in rules for finding in watch.observe(int(row["step"]), row).began):
            return int(row["step"])
    return None


def of_folder(path: Path) -> dict[str, Any]:
    """A healthy run that is on disk already."""
    run = read_run(path)
    watch = watched(run.rows, run.config)
    return {
        "place": "at hand",
        "case": task_of(path),
        "seed": run.config.run.seed,
        "rules": [],
        "steps": len(run.rows),
        "judged": len(RULES) - len(watch.not_judged()),
        "findings": [[finding.rule, finding.first_step, finding.last_step] for finding in watch.findings],
        "reached": reached(run.rows),
    }


def task_of(path: Path) -> str:
    """What a run's folder says that it is, without its seed."""
    return re.sub(r"-\d+$", "", path.parent.name if path.name == "ppo" else path.name)


def summary_of(runs: Sequence[Mapping[str, Any]], at_hand: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Hit rate and delay of every fault, and the alarms of healthy runs, those that were at hand among them."""
    faults = []
    for case in FAULTS:
        own = [run for run in runs if run["case"] == case.name and run["place"] == case.place and run["rules"]]
        if own:
            hits = sorted(run["named_at"] for run in own if run["named_at"] is not None)
            others = sorted({finding[0] for run in own for finding in run["findings"]} - set(case.rules))
            faults.append(
                {
                    "case": case.name,
                    "place": case.place,
                    "rules": list(case.rules),
                    "seeds": len(own),
                    "hits": len(hits),
                    "steps": hits,
                    "quarter": (tables.STEPS if isinstance(case.run, Table) else stories.STEPS) // 4,
                    "others": others,
                }
            )
    healthy = [*(run for run in runs if not run["rules"]), *at_hand]
    about = {rule.name: rule.about for rule in RULES}
    alarms = [run for run in healthy if any(about[name] == "training" for name, *_ in run["findings"])]
    machine = [run for run in healthy if any(about[name] == "machine" for name, *_ in run["findings"])]
    missed = [fault for fault in faults if fault["hits"] < WANTED_HITS * fault["seeds"]]
    done, planned = sum(fault["seeds"] for fault in faults), WANTED_SEEDS * len(FAULTS)
    all_reached = done >= planned and not missed and len(alarms) <= WANTED_ALARMS * len(healthy)
    named = sum(fault["hits"] for fault in faults)
    verdict = (
        f"{len(faults) - len(missed)} of {len(faults)} faults are named within the first quarter in at least "
        f"{WANTED_HITS:.0%} of their seeds ({named} of {done} runs); "
        f"{len(alarms)} of {len(healthy)} healthy runs raised a false alarm"
        + (f", and {len(machine)} one about the machine." if machine else ".")
        + (f" Not finished: {done} of {planned} runs with a fault are done." if done < planned else "")
    )
    return {
        "verdict": verdict,
        "reached": all_reached,
        "alarms": len(alarms),
        "machine_alarms": len(machine),
        "faults": faults,
        "thresholds": table([*runs, *at_hand]),
        "healthy": healthy,
    }


def short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def page(found: Mapping[str, Any]) -> str:
    """docs/diagnosis/calibration.md."""
    lines = [
        "# Calibration: how well the rules judge",
        "",
        "Made by `make calibrate`. Every fault is put into real joint runs on purpose, on the seeds that the table "
        "counts: runs of tables, whose optimum is known (`benchmarks/oracles`, 300 steps), and of a story model of "
        "260K parameters (`benchmarks/ablation/stories.toml`, 40 steps). A fault is named where a rule that stands "
        "for it speaks within the first quarter of the run; the step is the one at which a person would have read it. "
        "Healthy runs are whole runs of the same tasks, under settings that reach the optimum or the best known "
        "objective; and runs that were at hand (the demo's and the ablation's), judged by the rules whose metrics they "
        "have.",
        "",
        f"**{found['verdict']}**",
        "",
        "## Faults",
        "",
        "| fault | task | named by | seeds | named | at step (of the quarter) | also said |",
        "|---|---|---|---:|---:|---|---|",
    ]
    for fault in found["faults"]:
        steps = fault["steps"]
        when = f"{steps[0]} to {steps[-1]} (of {fault['quarter']})" if steps else "-"
        cells = [fault["case"], fault["place"], ", ".join(fault["rules"]), fault["seeds"], fault["hits"], when]
        lines.append("| " + " | ".join(map(str, [*cells, ", ".join(fault["others"])])) + " |")
    lines += [
        "",
        "What is also said is said of the same runs: a fault has consequences, and most of these are true.",
        "",
        "## Thresholds and their evidence",
        "",
        "What healthy runs reach at their worst, what runs with the fault reach at their mildest, and the threshold "
        "between. A rule asks for more than its threshold (steps in a row, a second number), so a healthy run may "
        "cross one line and raise no alarm; where one fault has several signs, a run may be named by another.",
        "",
        "| threshold | what | healthy, worst | threshold | faulty, mildest | rule |",
        "|---|---|---:|---:|---:|---|",
    ]
    for row in found["thresholds"]:
        cells = [
            short(row["healthy_worst"]),
            f"{row['side']} {row['value']:g}",
            short(row["faulty_mildest"]),
            row["rule"],
        ]
        lines.append("| " + " | ".join([f"`{row['threshold']}`", row["what"], *cells]) + " |")
    lines += [
        "",
        "## Healthy runs",
        "",
        "| run | task | seeds | findings |",
        "|---|---|---:|---|",
    ]
    for case in HEALTHY:
        own = [run for run in found["healthy"] if run["case"] == case.name and run["place"] == case.place]
        if own:
            said = [f"{name} (seed {run['seed']}, steps {a} to {b})" for run in own for name, a, b in run["findings"]]
            lines.append(f"| {case.name} | {case.place} | {len(own)} | {'; '.join(said) or 'none'} |")
    at_hand = [run for run in found["healthy"] if run["place"] == "at hand"]
    for case in sorted({run["case"] for run in at_hand}):
        own = [run for run in at_hand if run["case"] == case]
        said = [f"{name} (seed {run['seed']}, steps {a} to {b})" for run in own for name, a, b in run["findings"]]
        few = f"{own[0]['steps']} steps, {own[0]['judged']} of {len(RULES)} rules judged"
        lines.append(f"| {case} ({few}) | at hand | {len(own)} | {'; '.join(said) or 'none'} |")
    lines += ["", "## The rules, exactly", "", "| rule | signature | held for |", "|---|---|---:|"]
    lines += [f"| `{rule.name}` | {rule.signature} | {rule.holds} |" for rule in RULES]
    return "\n".join([*lines, ""])
