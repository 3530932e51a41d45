"""Memory that ran out: in which phase, and which settings make it need less."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tandem.config import DpoConfig, EvalConfig, PpoConfig, RewardConfig, SftConfig
from tandem.errors import InputError, RunError, is_out_of_memory
from tandem.run.space import readable

_ASKED_FOR = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(\w+)")


@contextmanager
def memory_limits(phase: str, step: int | Callable[[], int], knobs: Mapping[str, str]) -> Iterator[None]:
    """Within it, memory that runs out becomes one message: the phase, and each knob with its value and what to do.

    `step` is the step at hand, from 1, or, around all steps, tells how many are done. Raises InputError up to the
    first step, which shows whether a recipe fits, and RunError later.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        asked = _ASKED_FOR.search(str(error))
        more = f", which asked for {_size(*asked.groups())} more" if asked else ""
        settings = "; ".join(f"{name} ({advice})" for name, advice in knobs.items())
        where, fits = (phase, step() > 0) if callable(step) else (f"{phase} of step {step}", step > 1)
        said = f"memory ran out in {where}{more}. What makes it need less: {settings}."
        raise (RunError if fits else InputError)(said) from error


def _size(amount: str, unit: str) -> str:
    return readable(int(amount)) if unit == "bytes" else f"{amount} {unit}"


def steps_in(folder: Path) -> int:
    """Steps whose metrics a run has left in its folder."""
    metrics = folder / "metrics.jsonl"
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0


def sampling_knobs(config: PpoConfig) -> dict[str, str]:
    """What sampling responses takes its memory for: the KV cache of the rows that decode together."""
    rollout = config.rollout
    gathers = config.parallel.processes > 1 and config.cluster is None and rollout.gather != "layer"
    return (
        {
            f"rollout.sequences_per_batch = {rollout.sequences_per_batch}": "lower it",
            f"rollout.max_new_tokens = {rollout.max_new_tokens}": "lower it",
            f"data.max_prompt_tokens = {config.data.max_prompt_tokens}": 'lower it with data.too_long = "drop"',
        }
        | ({f'rollout.gather = "{rollout.gather}"': 'set "layer"'} if gathers else {})
        | _model_knobs(config)
    )


def training_knobs(config: SftConfig | RewardConfig | DpoConfig | PpoConfig) -> dict[str, str]:
    """What passes over a micro-batch take their memory for: its tokens, and the models with their optimisers."""
    tokens = {f"compute.tokens_per_microbatch = {config.compute.tokens_per_microbatch}": "lower it"}
    if not isinstance(config, PpoConfig):
        tokens[f"data.max_tokens = {config.data.max_tokens}"] = "lower it"
    return tokens | _model_knobs(config)


def evaluation_knobs(config: EvalConfig) -> dict[str, str]:
    """What an evaluation takes its memory for: one model at a time, the rows that decode together, a micro-batch."""
    rollout, compute = config.rollout, config.compute
    knobs = {
        f"rollout.sequences_per_batch = {rollout.sequences_per_batch}": "lower it",
        f"rollout.max_new_tokens = {rollout.max_new_tokens}": "lower it",
        f"compute.tokens_per_microbatch = {compute.tokens_per_microbatch}": "lower it",
    }
    if compute.precision != "bfloat16":
        knobs[f'compute.precision = "{compute.precision}"'] = 'set "bfloat16"'
    return knobs


def _model_knobs(config: SftConfig | RewardConfig | DpoConfig | PpoConfig) -> dict[str, str]:
    knobs: dict[str, str] = {}
    if isinstance(config, PpoConfig):
        if config.sharing.mode != "adapters":
            knobs[f'sharing.mode = "{config.sharing.mode}"'] = 'set "adapters", four models on one trunk'
    elif config.adapters is None:
        knobs["adapters unset"] = "set adapters.rank to train LoRA adapters instead of all weights"
    if config.adapters is not None:
        knobs[f"adapters.rank = {config.adapters.rank}"] = "lower it"
    if config.compute.precision != "bfloat16":
        knobs[f'compute.precision = "{config.compute.precision}"'] = 'set "bfloat16"'
    return knobs
