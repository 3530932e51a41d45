"""Try a model: answers to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from tandem.data.prompts import make_prompt
from tandem.data.rows import Row
from tandem.errors import InputError
from tandem.models.causal import CausalPolicy, SamplingRule
from tandem.models.loading import load_causal, load_tokenizer, pick_device, pick_dtype
from tandem.models.source import positions, read_config
from tandem.models.trunk import Trunk
from tandem.rollout import TorchGenerator
from tandem.text import decoder
from tandem.types import Prompt, Rollout


@dataclass(frozen=True)
class GenerateSettings:
    """How to answer; `chat` puts each prompt through the model's chat template as a user's turn."""

    model: str
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    responses: int
    chat: bool
    seed: int
    device: str
    precision: str
    trust_remote_code: bool


def run_generate(settings: GenerateSettings, prompts: Sequence[str]) -> list[Rollout]:
    """`responses` answers to each prompt, in order.

    Raises InputError for a model that cannot be loaded or a prompt that does not fit it.
    """
    device = pick_device(settings.device)
    trust = settings.trust_remote_code
    tokenizer = load_tokenizer(settings.model, "model", trust)
    ready = [
        read_prompt(Row({"prompt": prompt}, f"prompt {number}"), tokenizer, settings.chat)
        for number, prompt in enumerate(prompts, start=1)
    ]
    limit = positions(read_config(settings.model, "model", trust))
    longest = max(len(prompt.ids) for prompt in ready)
    if limit is not None and longest + settings.max_new_tokens > limit:
        raise InputError(
            f"the longest prompt has {longest} tokens and --max-new-tokens is {settings.max_new_tokens}, together more "
            f"than the {limit} that the model reads; lower one of them."
        )
    model = load_causal(settings.model, "model", pick_dtype(settings.precision, device), device, trust)
    policy = CausalPolicy(Trunk(model), SamplingRule(settings.temperature, settings.top_k, settings.top_p))
    generator = TorchGenerator(
        policy,
        decoder(tokenizer),
        policy.stop_ids(tokenizer),
        max_new_tokens=settings.max_new_tokens,
        sequences_per_batch=64,
        random=torch.Generator(device=device).manual_seed(settings.seed),
    )
    return generator.generate([prompt for prompt in ready for _ in range(settings.responses)])


def read_prompt(row: Row, tokenizer: PreTrainedTokenizerBase, chat: bool) -> Prompt:
    """A row's prompt as it is, or with `chat` as what a user says."""
    text = row.text("prompt")
    if chat:
        assert isinstance(text, str)
        text = ({"role": "user", "content": text},)
    return make_prompt(text, tokenizer, row)
