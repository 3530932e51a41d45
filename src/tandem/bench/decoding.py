"""Time decoding in this process: by `tandem.bench.timed`: WORKLOAD BATCHES, JSON out."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tandem.bench.workloads import Workload
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.compiling import CompiledLayers, KernelSampling
from tandem.models.loading import load_causal, load_tokenizer, pick_dtype
from tandem.models.trunk import Trunk
from tandem.rollout import TorchGenerator
from tandem.rollout.torch_generator import NextToken
from tandem.run.machine import machine_record
from tandem.text import decoder
from tandem.types import Prompt


def random_prompts(tokenizer: PreTrainedTokenizerBase, workload: Workload, number: int) -> list[Prompt]:
    """Prompts of the workload's length, others for each batch, of tokens that are words by themselves."""
    random = torch.Generator().manual_seed(workload.seed * 10_000 + number)
    words = torch.tensor(word_ids(tokenizer))
    ids = words[torch.randint(len(words), (workload.sequences, workload.prompt_tokens), generator=random)]
    return [Prompt(tuple(row), str(tokenizer.decode(row)), None, {}) for row in ids.tolist()]


def word_ids(tokenizer: PreTrainedTokenizerBase, among: int = 2000) -> list[int]:
    """Ids that a text made of them is read as again; all small ones where the tokenizer has no such words."""
    texts = {number: str(tokenizer.decode([number])) for number in range(10, min(among, len(tokenizer)))}
    kept = [
        number
        for number, text in texts.items()
        if text.strip().isalnum() and text.isascii() and (text[0] == " " or text[1:].isdigit())
        if tokenizer(text, add_special_tokens=False).input_ids == [number]
    ]
    return kept or list(texts)


def fixed_length_generator(policy: NextToken, tokenizer: PreTrainedTokenizerBase, workload: Workload) -> TorchGenerator:
    """One that nothing stops before the workload's length."""
    return TorchGenerator(
        policy,
        decoder(tokenizer),
        stop_ids=(),
        max_new_tokens=workload.response_tokens,
        sequences_per_batch=workload.sequences,
        random=torch.Generator(device=policy.device).manual_seed(workload.seed),
    )


def measure(workload: Workload, batches: int) -> dict[str, Any]:
    """Seconds of each batch after the first, and what the process took."""
    if workload.threads:
        torch.set_num_threads(workload.threads)
    device = torch.device(workload.device)
    tokenizer = load_tokenizer(workload.model, "model")
    model = load_causal(workload.model, "model", pick_dtype(workload.precision, device), device)
    policy = CausalPolicy(Trunk(model), FULL_DISTRIBUTION)
    if workload.compiled:
        CompiledLayers(policy.trunk.layers)
        with suppress(RuntimeError):
            KernelSampling([policy])
    generator = fixed_length_generator(policy, tokenizer, workload)
    seconds = []
    for number in range(batches + 1):
        prompts = random_prompts(tokenizer, workload, number)
        start = time.monotonic()
        generator.generate(prompts)
        seconds.append(time.monotonic() - start)
    return {"seconds": seconds[1:], "first": seconds[0], **machine_record(device)}


if __name__ == "__main__":
    print(json.dumps(measure(Workload.from_json(sys.argv[1]), int(sys.argv[2]))))
