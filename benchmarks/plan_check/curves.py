"""1B to 70B on 1 to 1,024 GPUs, planned: `python -m plan_check.curves`.

Writes docs/results/scaling.md and scaling.png: nothing in them is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from tandem.config import Gather, PpoConfig
from tandem.plan.advice import engines_beside
from tandem.plan.demand import Demand, Lengths, demand_of
from tandem.plan.devices import DEVICES
from tandem.plan.layout import Cluster, Layout, Workers
from tandem.plan.planned import Plan, planned
from tandem.plan.shapes import size_of_shape

RESULTS = Path(__file__).parents[2] / "docs" / "results"
MODELS = ("llama-1b", "qwen-3b", "qwen-7b", "qwen-14b", "qwen-32b", "llama-70b")
GPUS = tuple(2**power for power in range(11))
CARD = "H100"
SHOWN = (1, 8, 64, 256, 1024)
HEAD = (
    "| model | " + " | ".join(f"{gpus:,} GPU{'s' if gpus > 1 else ''}" for gpus in SHOWN) + " |",
    "|---" * (len(SHOWN) + 1) + "|",
)
# Where the GPUs of a cluster are dealt out between trainers and generators.
SPLIT = 64
PHASES = ("rollout", "score", "evaluate", "update")
# Twice the GPUs should be nearly twice as fast; where they are less than this much faster, a phase has stopped.
WORTH_IT = 1.5
WHY = {
    "products": "a GPU has too few sequences left: what is computed no longer shrinks",
    "memory": "weights are read for every token, however few rows a GPU has left",
    "calls": "a layer takes as long to call as before, however few rows it is called for",
    "network": "weights are sent as often, however little each GPU computes; a layer at a time, for every token",
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
    return {gpus: faster_to_gather(model, gpus) for gpus in GPUS}


def faster_to_gather(model: str, gpus: int) -> Plan:
    """The policy gathered whole to sample, or a layer at a time: the faster of those that fit."""
    demand, layout = demand_at(model), all_train(gpus)
    plans = [planned(demand, replace(layout, gather=gather)) for gather in GATHERED]
    return max(plans, key=lambda plan: (plan.fits, plan.tokens_per_day))


GATHERED: tuple[Gather, ...] = ("model", "layer")


def best_engines(model: str, gpus: int) -> Plan | None:
    """vLLM on the GPUs that train, an engine on each or on several of a machine, whichever is fastest; None where
    nothing fits."""
    return fastest([change.plan for change in engines_beside(demand_at(model), all_train(gpus))])


def all_train(gpus: int) -> Layout:
    return Layout(gpus, DEVICES[CARD], gpus, True, "torch", "never", None)


def fastest(plans: Sequence[Plan]) -> Plan | None:
    """Of those that fit."""
    return max((plan for plan in plans if plan.fits), key=lambda plan: plan.tokens_per_day, default=None)


def best_split(model: str) -> Plan | None:
    """The GPUs of a cluster dealt out between trainers and generators of a GPU each, which sample ahead, and tasks of
    the size that is best; None where nothing fits."""
    device, demand = DEVICES[CARD], demand_at(model)
    plans = []
    for trainers in range(1, SPLIT):
        generators = Workers(SPLIT - trainers, 1.0, device)
        for rounds in (1, 2, 4):
            samples = -(-demand.sequences // (generators.count * rounds))
            cluster = Cluster(SPLIT, 1.0, generators, Workers(0, 0.0, device), samples, ahead=True)
            layout = Layout(trainers, device, trainers, True, "torch", "never", None, cluster=cluster)
            plans.append(planned(demand, layout))
    return fastest(plans)


def stops(plans: Mapping[int, Plan], phase: str) -> tuple[int, str] | None:
    """The number of GPUs from which on twice as many are never 1.5 times as fast, and what the phase is then spent on,
    among those that fit; None where that is not reached."""
    fitting = [gpus for gpus in GPUS if plans[gpus].fits]
    found = None
    for few, many in pairwise(fitting):
        if plans[few].phases[phase].total >= WORTH_IT * plans[many].phases[phase].total:
            found = None
        elif found is None:
            found = few, plans[many].phases[phase].mostly
    return found


def page(curves: Mapping[str, Mapping[int, Plan]]) -> str:
    lines = [
        "# Planned: 1B to 70B on 1 to 1,024 GPUs",
        "",
        "Made by `make plan-curves`; how it is planned: [scale.md](../scale.md). **Nothing here is measured.**",
        f"{CARD}, bfloat16, four separate models of one size, activation checkpointing, the torch generator; 1,024",
        "prompts of 512 tokens with responses of 1,024 in every step, whatever the number of GPUs. The policy is",
        "gathered whole to sample, or a layer at a time, whichever is faster of those that fit.",
        "",
        "![seconds a step](scaling.png)",
        "",
        "Response tokens a day, in billions; * sampled a layer at a time; - where it does not fit:",
        "",
        *HEAD,
    ]
    for model, plans in curves.items():
        cells = [cell(plans[gpus]) for gpus in SHOWN]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Where each phase stops scaling",
        "",
        "The number of GPUs from which on twice as many make the phase less than 1.5 times as fast, and what it is",
        "then mostly spent on; at 1,024 a GPU has one sequence left, and more GPUs would have none:",
        "",
        "| model | " + " | ".join(PHASES) + " |",
        "|---" * (len(PHASES) + 1) + "|",
    ]
    for model, plans in curves.items():
        found = [stops(plans, phase) for phase in PHASES]
        cells = ["1,024" if one is None else f"{one[0]:,}: {one[1]}" for one in found]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    lines += ["", *(f"- *{name}*: {why}." for name, why in WHY.items()), "", *engines(), "", *clusters(curves)]
    return "\n".join(lines) + "\n"


def cell(plan: Plan) -> str:
    if not plan.fits:
        return "-"
    return f"{plan.tokens_per_day / 1e9:.2f}{'*' if plan.by_layer else ''}"


def engines() -> list[str]:
    """The same GPUs with vLLM in the processes that train."""
    lines = [
        "## Sampled by vLLM in the processes that train",
        "",
        "Billion response tokens a day, and in brackets the GPUs of an engine (`rollout.vllm.tensor_parallel`), each",
        "with a part of its weights; an engine's memory is given back while the models train:",
        "",
        *HEAD,
    ]
    for model in MODELS:
        plans = [best_engines(model, gpus) for gpus in SHOWN]
        cells = ["-" if plan is None else f"{cell(plan)} ({plan.layout.engine_gpus})" for plan in plans]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def clusters(curves: Mapping[str, Mapping[int, Plan]]) -> list[str]:
    """The same GPUs over a cluster, against all of them together."""
    lines = [
        f"## {SPLIT} GPUs over a cluster",
        "",
        "Trainers of a GPU each, between which the models are cut, and generators of a GPU each, with a copy of the",
        "policy, that sample the next step's responses meanwhile (`rollout.staleness = 1`): the best split of the",
        "GPUs.",
        "",
        "| model | trainers + generators | samples a task | billion tokens a day | without a cluster | bottleneck |",
        "|---|---|---|---|---|---|",
    ]
    for model, plans in curves.items():
        plan, together = best_split(model), cell(plans[SPLIT])
        if plan is None or plan.layout.cluster is None:
            lines.append(f"| {model} | no GPU holds a copy | | - | {together} | |")
            continue
        cluster = plan.layout.cluster
        split = f"{plan.layout.gpus} + {cluster.generators.count} | {cluster.samples_per_task}"
        lines.append(f"| {model} | {split} | {cell(plan)} | {together} | {plan.slowest} |")
    return lines


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
