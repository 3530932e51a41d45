"""A plan for people to read, within 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from tandem.plan.advice import Faster
from tandem.plan.decoding import token
from tandem.plan.devices import DEVICES
from tandem.plan.layout import Cluster
from tandem.plan.memory import Memory
from tandem.plan.planned import TRAINERS, Plan
from tandem.plan.workers import GENERATORS

_SPENT_ON = {
    "products": "matrix products",
    "memory": "reading and writing memory",
    "calls": "calling layers from Python",
    "network": "data on their way",
}


def report(plan: Plan, advice: Sequence[str], faster: Faster | None, console: Console) -> None:
    """Memory by component, time by phase, what to change where it does not fit, and what would be faster."""
    device, cluster = plan.layout.device, plan.layout.cluster
    where = f"{plan.layout.gpus} x {device.name}" if device.is_gpu else "this machine's processor"
    of_trainer = f"trainers: {_processes(plan.layout.gpus, cluster.trainer_gpus)}" if cluster else where
    console.print(_memory_table(of_trainer, plan.memory, device.memory_gib, on_gpu=device.is_gpu))
    for role in plan.roles:
        title = f"{role.name}: {_processes(role.workers.count, role.workers.gpus)}"
        console.print(_memory_table(title, role.memory, role.workers.device.memory_gib, on_gpu=True))
    console.print(_time_table(plan))
    for line in _remarks(plan):
        console.print(line, markup=False)
    lengths = plan.demand.lengths
    console.print(
        f"Times are for prompts of {lengths.mean_prompt:g} and responses of {lengths.mean_response:g} tokens on "
        "average (--prompt-tokens, --response-tokens); memory is for the longest that the recipe allows."
    )
    if not plan.fits:
        console.print("It does not fit. What makes it fit:")
        _list(advice or ["no line of the recipe; take more or larger GPUs."], console)
        return
    console.print("It fits.")
    if faster is not None:
        console.print(f"What makes it {faster.times:.1f} times as fast:")
        _list(faster.lines, console)


def _processes(count: int, gpus: float) -> str:
    return f"{count} x {gpus:g} GPU{'s' if gpus > 1 else ''}"


def _list(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(f"  {line}", soft_wrap=True, markup=False)


def _memory_table(title: str, memory: Memory, gib: float, *, on_gpu: bool) -> Table:
    table = Table(title=f"{title}, fullest in the {memory.peak_phase}", title_justify="left", width=64)
    table.add_column("memory of one GPU" if on_gpu else "memory")
    table.add_column("GiB", justify="right")
    for name, held in sorted(memory.at_peak.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{held / 2**30:,.2f}")
    table.add_section()
    table.add_row(f"needed, of {gib:,.1f} there", f"{memory.peak / 2**30:,.2f}")
    return table


def _time_table(plan: Plan) -> Table:
    """Who does what is told where there is more than one kind of process."""
    apart = plan.layout.cluster is not None
    table = Table(title="one step", title_justify="left", width=76 if apart else 64)
    for name in ["phase", *["who"] * apart]:
        table.add_column(name)
    table.add_column("seconds", justify="right")
    table.add_column("mostly")
    for name, cost in plan.phases.items():
        table.add_row(name, *[plan.who[name]] * apart, f"{cost.total:,.2f}", _SPENT_ON[cost.mostly])
    table.add_section()
    a_day = f"{plan.tokens_per_day:,.3g} response tokens a day"
    table.add_row("all", *[""] * apart, f"{plan.seconds:,.2f}", a_day)
    return table


def _remarks(plan: Plan) -> Iterator[str]:
    """What a person should know beside the tables."""
    cluster, memory = plan.layout.cluster, plan.memory
    if cluster is not None:
        yield from _about_cluster(plan, cluster)
    elif plan.by_layer is not None:
        yield from _about_layers(plan, *plan.by_layer)
    if plan.layout.device.is_gpu and any(memory.main_memory.values()):
        needed = sum(memory.main_memory.values()) / 2**30
        yield f"Main memory for each GPU that trains: {needed:,.1f} GiB ({', '.join(memory.main_memory)})."


def _about_cluster(plan: Plan, cluster: Cluster) -> Iterator[str]:
    """GPUs that are too many or too few, and who is waited for."""
    asked, there = plan.layout.gpus_asked_for, cluster.gpus_there
    if asked > there:
        yield f"The recipe asks for {asked} GPUs, and there are {there}."
    elif asked < there:
        yield f"The recipe asks for {asked} GPUs, and there are {there}: {there - asked} are idle."
    kinds = {TRAINERS: cluster.trainer_gpus} | {role.name: role.workers.gpus for role in plan.roles}
    for name, gpus in kinds.items():
        if gpus > 1:
            yield f"Each of the {name} is given {gpus:g} GPUs and computes on one of them."
    busy = ", ".join(f"{name} {plan.busy(name) / plan.seconds:.0%}" for name in kinds)
    yield f"The {plan.slowest} are the bottleneck. Of a step each works: {busy}."
    if not cluster.ahead:
        yield "They take turns (rollout.staleness = 0)."
    weights = plan.demand.policy.parameters * plan.demand.width
    yield f"Ray's object store holds the weights in main memory: {weights / 2**30:,.1f} GiB on each machine."
    for role in plan.roles:
        if role.name == GENERATORS and weights > role.bytes_there:
            yield _needs_larger(plan, "Each generator holds")


def _about_layers(plan: Plan, gathered: float, seconds: float) -> Iterator[str]:
    """What sampling a layer at a time costs, and what it would take to do without."""
    computing = token(plan.demand, plan.layout).total
    yield (
        f"Sampling gathers a layer at a time: {gathered / 2**30:,.1f} GiB are sent to every GPU for each token, which "
        f"takes {seconds:,.2g} s, and computing it {computing:,.2g} s. The rollout is "
        f"{plan.phases['rollout'].total / plan.seconds:.0%} of a step."
    )
    if gathered > plan.layout.device.memory_gib * 2**30:
        yield _needs_larger(plan, "Generators of their own ([cluster]) each hold")
        yield "vLLM engines hold it in parts, each on several of the GPUs that train (rollout.vllm.tensor_parallel)."


def _needs_larger(plan: Plan, who: str) -> str:
    """Which cards could hold a copy of the policy."""
    weights = plan.demand.policy.parameters * plan.demand.width / 2**30
    large = [device.name for device in DEVICES.values() if device.memory_gib > weights + device.runtime_gib]
    could = f"of the cards that are known {' and '.join(large)} could" if large else "no card that is known could"
    return f"{who} a copy of the policy, {weights:,.1f} GiB, on one GPU: {could}."
