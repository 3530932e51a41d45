"""The whole table of exact oracles on several seeds: docs/results/oracles.md, .json and .png.

usage: python -m oracles [SEEDS | missing]

`missing` measures only the rows that the table has not yet, on its seeds.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from oracles.preferences import train_dpo
from oracles.report import TRANSFORMER_GATES, page, plot
from oracles.reward_then_policy import Study, draw_pairs, exact_curve, fit_error, fit_reward, study
from oracles.settings import COUNTER_ROWS, TREE_ROWS
from oracles.tabular import tree
from oracles.training import train
from oracles.transformer import fit_exactly, train_transformer

RESULTS = Path(__file__).parents[2] / "docs" / "results"
ROWS = {row.name: row for row in TREE_ROWS} | {f"counter: {row.name}": row for row in COUNTER_ROWS}
PAIRS = [2**k for k in range(10, 19, 2)]
STUDIED = [(2**10, 0), (2**14, 0)]
BETAS = [1.0, 0.5, 0.25]
TRANSFORMER_STEPS, EXACT_STEPS = 300, 600


def run_row(job: tuple[str, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    name, seed = job
    row, started = ROWS[name], time.monotonic()
    found = train(row.task(), row.setup, seed)
    return {
        "name": name,
        "seed": seed,
        "start_gap": found.start_gap,
        "gap": found.gap,
        "value_rmse": found.value_rmse,
        "start_error": found.start_error,
        "certificate": [found.certificates[0], found.certificates[-1]],
        "gaps": [metrics["oracle/gap"] for metrics in found.metrics][::5],
        "certificates": found.certificates[::5],
        "seconds": time.monotonic() - started,
    }


def run_study(job: tuple[int, int]) -> Study:
    torch.set_num_threads(1)
    return study(*job, BETAS)


def run_fit(job: tuple[int, int]) -> dict[str, float]:
    torch.set_num_threads(1)
    pairs, seed = job
    task = tree(seed=0)
    fitted = fit_reward(task, *draw_pairs(task, pairs, seed))
    curve = exact_curve(task, fitted)
    peak = max(point.gold for point in curve)
    return {"pairs": pairs, "seed": seed, "error": fit_error(task, fitted), "lost": peak - curve[-1].gold}


def run_transformer(job: tuple[int, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    started, (horizon, seed) = time.monotonic(), job
    found = train_transformer(seed, steps=TRANSFORMER_STEPS, horizon=horizon)
    return {
        "horizon": horizon,
        "seed": seed,
        "start_gap": found.start_gap,
        "gap": found.gap,
        "steps": TRANSFORMER_STEPS,
        "mass_error": found.mass_error,
        "mismatch": max(row["rollout/logprob_mismatch_max"] for row in found.metrics),
        "seconds": time.monotonic() - started,
    }


def run_exactly(horizon: int) -> float:
    torch.set_num_threads(1)
    return fit_exactly(0, EXACT_STEPS, horizon)


def run_dpo(job: tuple[int, int]) -> dict[str, float]:
    torch.set_num_threads(1)
    pairs, seed = job
    return {"pairs": pairs, "seed": seed, "gap": train_dpo(tree(seed=0), pairs, seed)}


def measured(jobs: list[tuple[str, int]], pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """Rows of the table, told of as they come."""
    found = []
    for number, row in enumerate(pool.map(run_row, jobs), start=1):
        found.append(row)
        print(f"{number}/{len(jobs)}  {row['name']}: {row['gap']:.4f}  ({row['seconds']:.0f} s)", flush=True)
    return found


def everything_on(seeds: int) -> dict[str, Any]:
    jobs = [(name, seed) for seed in range(seeds) for name in ROWS]
    with ProcessPoolExecutor(max_workers=2) as pool:
        by_transformer = list(pool.map(run_transformer, [*((3, seed) for seed in range(seeds)), (5, 0)]))
        exactly = dict(zip(TRANSFORMER_GATES, pool.map(run_exactly, TRANSFORMER_GATES), strict=True))
        fits = list(pool.map(run_fit, [(pairs, seed) for pairs in PAIRS for seed in range(seeds)]))
        by_dpo = list(pool.map(run_dpo, [(pairs, seed) for pairs in PAIRS for seed in range(seeds)]))
        studies = list(pool.map(run_study, STUDIED))
        found = measured(jobs, pool)
    return {
        "rows": found,
        "fits": fits,
        "dpo": by_dpo,
        "studies": [asdict(one) | {"turns_over_by": one.turns_over_by} for one in studies],
        "transformer": by_transformer,
        "exact_gradient": {"steps": EXACT_STEPS, "gap_by_horizon": exactly},
    }


def with_missing_rows(everything: dict[str, Any]) -> dict[str, Any]:
    """The same with the rows that it lacks, in the table's order; rows that the table has no more are left out."""
    there = {(row["name"], row["seed"]): row for row in everything["rows"]}
    jobs = [(name, seed) for seed in sorted({seed for _, seed in there}) for name in ROWS]
    with ProcessPoolExecutor(max_workers=2) as pool:
        added = measured([job for job in jobs if job not in there], pool)
    there |= {(row["name"], row["seed"]): row for row in added}
    return everything | {"rows": [there[job] for job in jobs]}


def main(asked: str) -> int:
    kept = RESULTS / "oracles.json"
    if asked == "missing":
        everything = with_missing_rows(json.loads(kept.read_text(encoding="utf-8")))
    else:
        everything = everything_on(int(asked))
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    text, failures = page(everything, ROWS)
    (RESULTS / "oracles.md").write_text(text, encoding="utf-8")
    plot(everything, RESULTS / "oracles.png")
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "3"))
