"""A plan for people to read, within 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tandem.plan.planned import Plan

_SPENT_ON = {
    "products": "matrix products",
    "memory": "reading and writing memory",
    "calls": "calling layers from Python",
    "network": "waiting for other GPUs",
}


def report(plan: Plan, advice: Sequence[str], console: Console) -> None:
    """Memory by component, time by phase, and what to change where it does not fit."""
    device, memory = plan.layout.device, plan.memory
    where = f"{plan.layout.gpus} x {device.name}, " if device.is_gpu else "this machine's processor, "
    table = Table(title=f"{where}fullest in the {memory.peak_phase}", title_justify="left", width=64)
    table.add_column("memory of one GPU" if device.is_gpu else "memory")
    table.add_column("GiB", justify="right")
    for name, held in sorted(memory.at_peak.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{held / 2**30:,.2f}")
    table.add_section()
    table.add_row(f"needed, of {device.memory_gib:,.1f} there", f"{memory.peak / 2**30:,.2f}")
    console.print(table)
    times = Table(title="one step", title_justify="left", width=64)
    times.add_column("phase")
    times.add_column("seconds", justify="right")
    times.add_column("mostly")
    for name, cost in plan.phases.items():
        times.add_row(name, f"{cost.total:,.2f}", _SPENT_ON[cost.mostly])
    times.add_section()
    times.add_row("all", f"{plan.seconds:,.2f}", f"{plan.tokens_per_day:,.3g} response tokens a day")
    console.print(times)
    if device.is_gpu and any(memory.main_memory.values()):
        needed = sum(memory.main_memory.values()) / 2**30
        console.print(f"Main memory for each GPU: {needed:,.1f} GiB ({', '.join(memory.main_memory)}).")
    lengths = plan.demand.lengths
    console.print(
        f"Times are for prompts of {lengths.mean_prompt:g} and responses of {lengths.mean_response:g} tokens on "
        "average (--prompt-tokens, --response-tokens); memory is for the longest that the recipe allows."
    )
    if plan.fits:
        console.print("It fits.")
        return
    console.print("It does not fit. What makes it fit:")
    for line in advice:
        console.print(f"  {line}", soft_wrap=True)
    if not advice:
        console.print("  no line of the recipe; take more or larger GPUs.")
