"""1B to 70B on 1 to 1,024 GPUs, planned: `python -m plan_check.curves`.

Writes docs/results/scaling.md and scaling.png: nothing in them is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from tandem.config import PpoConfig
from tandem.plan.demand import Demand, Lengths, demand_of
from tandem.plan.devices import DEVICES
from tandem.plan.layout import Layout
from tandem.plan.planned import Plan, planned
from tandem.plan.shapes import size_of_shape

RESULTS = Path(__file__).parents[2] / "docs" / "results"
MODELS = ("llama-1b", "qwen-3b", "qwen-7b", "qwen-14b", "qwen-32b", "llama-70b")
GPUS = tuple(2**power for power in range(11))
CARD = "B200"
PHASES = ("rollout", "score", "evaluate", "update")
# Twice the GPUs should be nearly twice as fast; where they are less than this much faster, a phase has stopped.
WORTH_IT = 1.5
WHY = {
    "products": "a GPU has too few sequences left: what is computed no longer shrinks",
    "memory": "weights are read for every token, however few rows a GPU has left",
    "calls": "a layer takes as long to call as before, however few rows it is called for",
    "network": "weights and gradients are gathered and summed as often, however little each GPU computes",
}


def demand_at(model: str) -> Demand:
    """The same work for every model: 1,024 prompts of 512 tokens, responses of 1,024, four separate models."""
    config = PpoConfig.model_validate(
        {
            "data": {"prompts": "p", "max_prompt_tokens": 512},
            "policy": {"model": "m", "sequences_per_minibatch": 1024},
            "value": {"start": "policy", "sequences_per_minibatch": 1024},
            "rewards": [{"model": "r"}],
            "rollout": {"prompts_per_step": 1024, "max_new_tokens": 1024, "sequences_per_batch": 64},
            "compute": {"tokens_per_microbatch": 8192, "precision": "bfloat16"},
        }
    )
    size = size_of_shape(model)
    return demand_of(config, size, [size], Lengths(512, 1024, 512, 1024), 2)


def curve(model: str) -> dict[int, Plan]:
    device, demand = DEVICES[CARD], demand_at(model)
    return {gpus: planned(demand, Layout(gpus, device, gpus, True, "torch", "never", None)) for gpus in GPUS}


def stops(plans: Mapping[int, Plan], phase: str) -> tuple[int, str] | None:
    """The number of GPUs from which twice as many are less than 1.5 times as fast, and what the phase is then spent
    on; None where that is not reached."""
    for few, many in pairwise(GPUS):
        if plans[few].phases[phase].total < WORTH_IT * plans[many].phases[phase].total:
            return few, plans[many].phases[phase].mostly
    return None


def page(curves: Mapping[str, Mapping[int, Plan]]) -> str:
    shown = [gpus for gpus in GPUS if gpus in (1, 8, 64, 256, 1024)]
    lines = [
        "# Planned: 1B to 70B on 1 to 1,024 GPUs",
        "",
        "Made by `make plan-curves`; how it is planned: [scale.md](../scale.md). **Nothing here is measured.**",
        f"{CARD}, bfloat16, four separate models of one size, activation checkpointing, the torch generator; 1,024",
        "prompts of 512 tokens with responses of 1,024 in every step, whatever the number of GPUs.",
        "",
        "![seconds a step](scaling.png)",
        "",
        "Response tokens a day, in billions; - where it does not fit:",
        "",
        "| model | " + " | ".join(f"{gpus:,} GPU{'s' if gpus > 1 else ''}" for gpus in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for model, plans in curves.items():
        cells = [f"{plans[gpus].tokens_per_day / 1e9:.2f}" if plans[gpus].fits else "-" for gpus in shown]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Where each phase stops scaling",
        "",
        "The number of GPUs from which twice as many make the phase less than 1.5 times as fast, and what it is then",
        "mostly spent on:",
        "",
        "| model | " + " | ".join(PHASES) + " |",
        "|---" * (len(PHASES) + 1) + "|",
    ]
    for model, plans in curves.items():
        found = [stops(plans, phase) for phase in PHASES]
        cells = ["beyond 1,024" if one is None else f"{one[0]:,}: {one[1]}" for one in found]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    lines += ["", *(f"- *{name}*: {why}." for name, why in WHY.items())]
    return "\n".join(lines) + "\n"


def plot(curves: Mapping[str, Mapping[int, Plan]], path: Path) -> None:
    """Seconds a step over the number of GPUs, a line a model, by phase; dotted where it does not fit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    phases = ("rollout", "evaluate", "update", "a step")
    figure, axes = plt.subplots(1, len(phases), figsize=(3.4 * len(phases), 3.4), sharey=True, constrained_layout=True)
    for axis, phase in zip(axes, phases, strict=True):
        for number, (model, plans) in enumerate(curves.items()):
            seconds = {
                gpus: plan.seconds if phase == "a step" else plan.phases[phase].total for gpus, plan in plans.items()
            }
            fitting = [gpus for gpus in GPUS if plans[gpus].fits]
            axis.loglog(list(seconds), list(seconds.values()), ":", color=f"C{number}", linewidth=0.8)
            axis.loglog(
                fitting, [seconds[gpus] for gpus in fitting], "o-", color=f"C{number}", markersize=3, label=model
            )
        axis.set_title(phase, fontsize=9)
        axis.set_xlabel("GPUs")
        axis.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
        axis.minorticks_off()
    axes[0].set_ylabel("seconds, planned")
    axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    curves = {model: curve(model) for model in MODELS}
    (RESULTS / "scaling.md").write_text(page(curves), encoding="utf-8")
    plot(curves, RESULTS / "scaling.png")


if __name__ == "__main__":
    main()
