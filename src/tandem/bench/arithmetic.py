"""What a workload must multiply, whoever does it, and how fast this machine multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tandem.bench.workloads import Workload


@dataclass(frozen=True)
class ModelSize:
    """Weights that are multiplied with each token: of the layers together, and of the head; and what else counts."""

    layers: int
    trunk: int
    head: int
    hidden: int
    attention: int

    @classmethod
    def of(cls, source: str | Path) -> ModelSize:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        text = config.get_text_config()
        head = model.get_output_embeddings()
        trunk = sum(
            module.weight.numel()
            for module in model.modules()
            if module is not head and hasattr(module, "weight") and module.weight.dim() == 2
            if not isinstance(module, torch.nn.Embedding)
        )
        width = text.num_attention_heads * (
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        )
        return cls(text.num_hidden_layers, trunk, head.weight.numel(), text.hidden_size, width)


def trunk_flops(size: ModelSize, workload: Workload) -> float:
    """One forward of all layers over prompts and responses: two a weight, and causal attention's products."""
    length = workload.prompt_tokens + workload.response_tokens
    tokens = workload.sequences * length
    return 2.0 * size.trunk * tokens + 2.0 * size.layers * size.attention * tokens * length


def head_flops(size: ModelSize, workload: Workload) -> float:
    """One projection of all response positions on the vocabulary."""
    return 2.0 * size.head * workload.response_total


def decoding_flops(size: ModelSize, workload: Workload) -> float:
    """Every prompt and response token through the trunk once, every response token through the head."""
    return trunk_flops(size, workload) + head_flops(size, workload)


def learning_flops(size: ModelSize, workload: Workload) -> float:
    """Forward and backward of policy and value model in every epoch.

    A backward is two forwards, or one where the weights are frozen; adapters learn in the upper layers only.
    """
    trunk, head = trunk_flops(size, workload), head_flops(size, workload)
    if workload.sharing == "separate":
        return workload.epochs * (6 * trunk + 3 * head)
    return workload.epochs * (4 * trunk * adapted_share(size, workload) + 2 * head)


def joint_step_flops(size: ModelSize, workload: Workload) -> float:
    """The least that a joint step multiplies where nothing is computed twice.

    Sampling; reward, reference and value forward; then what is learnt. Layers below the adapters run once more after
    sampling, for all models.
    """
    trunk, head = trunk_flops(size, workload), head_flops(size, workload)
    upper = trunk * adapted_share(size, workload)
    measuring = (trunk - upper) + 3 * upper + head
    if workload.sharing == "separate":
        measuring = 3 * trunk + head
    return decoding_flops(size, workload) + measuring + learning_flops(size, workload)


def adapted_share(size: ModelSize, workload: Workload) -> float:
    """How much of the trunk is at or above the lowest adapted layer."""
    return (workload.upper_layers or size.layers) / size.layers


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches at its best: FLOP/s of a matrix product, bytes/s of reading memory."""

    flops: float
    bandwidth: float


def measure_ceilings(size: ModelSize, precision: str, device: str) -> Ceilings:
    """The fastest of products of the model's own width with 2,048 rows, and of summing 256 MiB."""
    dtype = getattr(torch, precision)
    inner = size.hidden
    best = 0.0
    for outer in (inner, 4 * inner):
        left = torch.randn(2048, inner, dtype=dtype, device=device)
        right = torch.randn(outer, inner, dtype=dtype, device=device)
        best = max(best, 2 * 2048 * inner * outer / _fastest(lambda: torch.nn.functional.linear(left, right), device))  # noqa: B023
    block = torch.randn(2**26, device=device)
    return Ceilings(best, block.numel() * 4 / _fastest(block.sum, device))


def _fastest(work: Callable[[], object], device: str, tries: int = 7) -> float:
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


def decoding_floor(size: ModelSize, workload: Workload, ceilings: Ceilings) -> float:
    """Seconds that a batch takes at the ceilings: the prompts' products, then for each token the slower of
    multiplying the rows and reading the weights and the keys and values so far."""
    rows, width = workload.sequences, 2 if workload.precision == "bfloat16" else 4
    weights = size.trunk + size.head
    prompts = 2.0 * size.trunk * rows * workload.prompt_tokens / ceilings.flops
    arithmetic = 2.0 * rows * weights / ceilings.flops
    return prompts + workload.response_tokens * max(arithmetic, weights * width / ceilings.bandwidth)
