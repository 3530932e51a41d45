"""The cards that are planned for, with what their makers publish; and this machine, measured on the spot."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tandem.algo import sample
from tandem.errors import InputError
from tandem.plan.model_size import ModelSize

GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class AttentionPace:
    """Seconds in which a query attends to a key in one head: in whole sequences, and for a single token after them."""

    sequence: float
    token: float


@dataclass(frozen=True)
class Device:
    """What one GPU, or this machine's processor, has and reaches.

    `memory_gib` is what a process can have of it; `flops` the published peak of dense bfloat16 products (of a
    processor: what its products reached), `bandwidth` bytes/s of its memory, `link` bytes/s to and from the GPUs of
    the same machine and `network` bytes/s of one GPU's share of the way between machines, one way each.

    The shares of those that are reached, and what a call costs:
    `product_share`, `bandwidth_share`, `link_share`; `layer_seconds` of calling one layer whose work is nothing, from
    Python, and `graph_layer_seconds` where the calls were recorded (vLLM's CUDA graphs); `pass_seconds` of what a pass
    calls beside its layers, sampling from its logits among it; `hop_seconds` of the least collective among the GPUs of
    a machine. `attention` is its pace where that was measured. `reserve_share` of what comes and goes is held by the
    allocator and cannot be handed out.

    Of the machine around it, bytes/s: `host_bandwidth` of one copy in main memory or between it and a GPU, `ethernet`
    of what goes between machines from one main memory to another.
    """

    name: str
    memory_gib: float
    flops: float
    bandwidth: float
    link: float
    network: float
    runtime_gib: float = 1.0
    product_share: float = 0.55
    bandwidth_share: float = 0.8
    link_share: float = 0.75
    layer_seconds: float = 450e-6
    pass_seconds: float = 1e-3
    graph_layer_seconds: float = 20e-6
    hop_seconds: float = 25e-6
    reserve_share: float = 0.1
    host_bandwidth: float = 10e9
    ethernet: float = 10e9
    attention: AttentionPace | None = None
    is_gpu: bool = True

    @property
    def reached_flops(self) -> float:
        """FLOP/s that products reach."""
        return self.flops * self.product_share

    @property
    def reached_bandwidth(self) -> float:
        """Bytes/s of memory that are reached."""
        return self.bandwidth * self.bandwidth_share

    def part(self, share: float) -> Device:
        """What a process has that shares this with others which work at the same time."""
        return replace(
            self, memory_gib=self.memory_gib * share, flops=self.flops * share, bandwidth=self.bandwidth * share
        )


def _card(name: str, gib: float, tera_flops: float, gigabytes: float, link: float, network: float) -> Device:
    return Device(name, gib, tera_flops * 1e12, gigabytes * 1e9, link * 1e9, network * 1e9)


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _card("B200", 178, 2250, 7700, 900, 50),
        _card("H200", 139, 989, 4800, 450, 50),
        _card("H100", 79, 989, 3350, 450, 50),
        _card("A100-80GB", 79, 312, 2039, 300, 25),
        _card("A100-40GB", 39, 312, 1555, 300, 25),
        _card("L40S", 44, 362, 864, 32, 3),
        _card("L4", 22, 121, 300, 32, 3),
        _card("A10G", 22, 70, 600, 16, 3),
        _card("RTX4090", 23.5, 165, 1008, 32, 3),
        _card("RTX3090", 23.5, 71, 936, 32, 3),
    )
}
# What people call cards by; a size alone is the slowest card of that size, so that what fits it fits them all.
ALIASES: Mapping[str, str] = {
    "A100": "A100-80GB",
    "H100-80GB": "H100",
    "H200-141GB": "H200",
    "B200-180GB": "B200",
    "L40S-48GB": "L40S",
    "L4-24GB": "L4",
    "A10G-24GB": "A10G",
    "RTX4090-24GB": "RTX4090",
    "RTX3090-24GB": "RTX3090",
    "4090": "RTX4090",
    "3090": "RTX3090",
    "24GB": "L4",
    "40GB": "A100-40GB",
    "48GB": "L40S",
    "80GB": "A100-80GB",
    "141GB": "H200",
}
CPU = "cpu"
_ASKED = re.compile(r"(?:(\d{1,6})\s*x\s*)?(.+)", re.IGNORECASE)
MOST_GPUS = 65_536


def gpus_asked_for(text: str) -> tuple[int, str]:
    """`8xH100`, `64xH100-80GB`, `1x24GB`, `H200` or `cpu` -> how many, and the device's name in the table.

    Raises InputError where the count or the card is none.
    """
    found = _ASKED.fullmatch(text.strip())
    count, name = (int(found[1] or 1), found[2].strip().upper()) if found else (0, "")
    if name == CPU.upper() and count == 1:
        return 1, CPU
    name = ALIASES.get(name, name)
    if name not in DEVICES or not 1 <= count <= MOST_GPUS:
        known = ", ".join([*DEVICES, *(alias for alias in ALIASES if alias.endswith("GB") and "-" not in alias), CPU])
        raise InputError(
            f"--gpus {text[:40]!r} was not understood: give COUNTxCARD, such as 8xH100 or 1x24GB, with 1 to "
            f"{MOST_GPUS:,} of one of {known}."
        )
    return count, name


def device_of(name: str, size: ModelSize, precision: str) -> Device:
    """The device by its name in the table; `cpu` is measured now, at the width of the model that will run."""
    return this_machine(size, precision) if name == CPU else DEVICES[name]


@dataclass(frozen=True)
class Pace:
    """How fast this machine is just now: FLOP/s of a matrix product, bytes/s of reading memory."""

    flops: float
    bandwidth: float


Timer = Callable[[], float]


def measure_pace(
    size: ModelSize, precision: str, device: str, timer: Timer = time.perf_counter, seconds: float = 1.0
) -> Pace:
    """What products of the model's own width with 2,048 rows usually reach, and summing 256 MiB, each looked at for so
    many seconds: a machine that others share does not keep its pace from one moment to the next."""
    dtype = getattr(torch, precision)
    inner = size.hidden
    best = 0.0
    for outer in (inner, 4 * inner):
        left = torch.randn(2048, inner, dtype=dtype, device=device)
        right = torch.randn(outer, inner, dtype=dtype, device=device)
        product = partial(torch.nn.functional.linear, left, right)
        best = max(best, 2 * 2048 * inner * outer / usual_seconds(product, timer, device, 7, seconds))
    block = torch.randn(2**26, device=device)
    return Pace(best, block.numel() * 4 / usual_seconds(block.sum, timer, device, 7, seconds))


# Sequences and their tokens of the attention that is timed, and rows of a single token, whose keys and values no cache
# near the processor holds.
_READ, _LENGTH, _DECODED = 16, 128, 64


def measure_attention(size: ModelSize, precision: str, timer: Timer = time.perf_counter) -> AttentionPace:
    """Of heads as wide as the model's, by torch's fused kernel on the processor; the query heads of a single token
    that share keys attend together."""
    attend = torch.nn.functional.scaled_dot_product_attention

    def some(rows: int, heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(rows, heads, tokens, size.head_width, dtype=getattr(torch, precision))

    queries, keys, values = (some(_READ, size.heads, _LENGTH) for _ in range(3))
    sequence = usual_seconds(lambda: attend(queries, keys, values, is_causal=True), timer)
    one = some(_DECODED, size.key_heads, size.heads // size.key_heads)
    far, away = (some(_DECODED, size.key_heads, _LENGTH) for _ in range(2))
    token = usual_seconds(lambda: attend(one, far, away), timer)
    return AttentionPace(sequence / (_READ * size.heads * _LENGTH**2), token / (_DECODED * size.heads * _LENGTH))


def usual_seconds(
    work: Callable[[], object],
    timer: Timer = time.perf_counter,
    device: str = CPU,
    tries: int = 30,
    least_seconds: float = 0.0,
) -> float:
    """The median of so many times at least, and for so long, without the first two."""
    seconds: list[float] = []
    end = time.perf_counter() + least_seconds
    while len(seconds) < tries or time.perf_counter() < end:
        start = timer()
        work()
        if device != CPU:
            torch.cuda.synchronize()
        seconds.append(timer() - start)
    return statistics.median(seconds[2:])


# A heap that keeps what is freed is not used up between what stays: set by `make plan-check`.
_HOLES_OF_A_HEAP = 0.25


def this_machine(size: ModelSize, precision: str, timer: Timer = time.perf_counter) -> Device:
    """This machine's processor: its memory, what it usually reaches at the model's width, and what calls cost."""
    pace = measure_pace(size, precision, CPU, timer)
    a_pass, a_layer = calling_seconds(lambda layers: _token_seconds(layers, timer))
    return Device(
        name=CPU,
        memory_gib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        flops=pace.flops,
        bandwidth=pace.bandwidth,
        link=pace.bandwidth,
        network=pace.bandwidth,
        runtime_gib=_runtime_gib(),
        product_share=1.0,
        bandwidth_share=1.0,
        layer_seconds=a_layer,
        pass_seconds=a_pass,
        reserve_share=_HOLES_OF_A_HEAP,
        attention=measure_attention(size, precision, timer),
        is_gpu=False,
    )


# Layers of the two models whose work is next to nothing, so that calling them is what takes time.
_NARROW_LAYERS = (2, 16)


def calling_seconds(seconds_of: Callable[[int], float]) -> tuple[float, float]:
    """What a pass costs beside its layers, and what each layer costs, by the seconds of so many layers."""
    few, many = (seconds_of(layers) for layers in _NARROW_LAYERS)
    a_layer = (many - few) / (_NARROW_LAYERS[1] - _NARROW_LAYERS[0])
    return few - _NARROW_LAYERS[0] * a_layer, a_layer


def narrow_model(layers: int) -> LlamaForCausalLM:
    """One whose layers have next to no work."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=1,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def _token_seconds(layers: int, timer: Timer) -> float:
    """One token through so many narrow layers, with the keys and values of a few before it, and one sampled after."""
    model, ids, uniform = narrow_model(layers), torch.zeros(1, 1, dtype=torch.int64), torch.rand(1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        return usual_seconds(lambda: sample(model(input_ids=ids, past_key_values=cache).logits[:, -1], uniform), timer)


def _runtime_gib() -> float:
    """What a process holds that has loaded the libraries and trained a model of next to no size, by one that does."""
    code = (
        "import tandem.stages.ppo, torch; from tandem.allocator import peak_memory\n"
        "from tandem.plan.devices import narrow_model; model = narrow_model(1)\n"
        "model(input_ids=torch.zeros(1, 8, dtype=torch.int64)).logits.sum().backward()\n"
        "torch.optim.AdamW(model.parameters()).step(); print(peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout) / 2**30
