"""Time decoding in this process: by `tandem.bench.timed`: WORKLOAD BATCHES, JSON out."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from importlib import resources
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tandem.bench.workloads import Workload
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.compiling import CompiledLayers, KernelSampling
from tandem.models.loading import load_causal, load_tokenizer, pick_dtype
from tandem.models.trunk import Trunk
from tandem.rollout import TorchGenerator
from tandem.rollout.next_token import NextToken
from tandem.run.machine import machine_record
from tandem.text import decoder
from tandem.types import Prompt


def random_prompts(tokenizer: PreTrainedTokenizerBase, workload: Workload, number: int) -> list[Prompt]:
    """Prompts of the workload's length, others for each batch, each of which is read as the tokens that it is made of.

    They are beginnings of sentences, as a model is asked to go on with, where its tokenizer writes such; else words at
    random, after which a model that knows a language answers in odd ones.
    """
    chance = torch.Generator().manual_seed(workload.seed * 10_000 + number)
    length, sentences = workload.prompt_tokens, _sentences()
    prompts: list[list[int]] = []
    for _ in range(4 * workload.sequences):
        some = torch.randint(len(sentences), (1 + length // 8,), generator=chance)
        ids = _ids(tokenizer, ". ".join(sentences[index] for index in some.tolist()))[:length]
        known = len(ids) == length and tokenizer.unk_token_id not in ids
        if known and _ids(tokenizer, str(tokenizer.decode(ids))) == ids:
            prompts.append(ids)
    words = torch.tensor(word_ids(tokenizer)) if len(prompts) < workload.sequences else None
    while words is not None and len(prompts) < workload.sequences:
        prompts.append(words[torch.randint(len(words), (length,), generator=chance)].tolist())
    return [Prompt(tuple(ids), str(tokenizer.decode(ids)), None, {}) for ids in prompts[: workload.sequences]]


def _sentences() -> list[str]:
    return (resources.files("tandem.demo") / "openings.txt").read_text(encoding="utf-8").splitlines()


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found


def word_ids(tokenizer: PreTrainedTokenizerBase, among: int = 2000) -> list[int]:
    """Ids that a text made of them is read as again; all small ones where the tokenizer has no such words."""
    texts = {number: str(tokenizer.decode([number])) for number in range(10, min(among, len(tokenizer)))}
    kept = [
        number
        for number, text in texts.items()
        if text.strip().isalnum() and text.isascii() and (text[0] == " " or text[1:].isdigit())
        if _ids(tokenizer, text) == [number]
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
