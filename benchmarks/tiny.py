"""Tiny models of several architectures, made on the spot: no hub, no downloads."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_CORPUS = [
    "the film was a slow and quiet thing about the sea and the people who live by it",
    "a good story told well is worth an evening, and a bad one is not",
    "what does two and two make? four, said the child, and laughed",
]


def make_tokenizer(chat: bool = True, size: int = 300) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_config(architecture: str, vocabulary: int):
    """Heads are 8 wide; `llama-wide` has heads of 32, the narrowest that vLLM's attention on a CPU knows."""
    common = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    if architecture == "llama-wide":
        return LlamaConfig(**common, **{**shape, "head_dim": 32}, tie_word_embeddings=True)
    if architecture == "llama":
        return LlamaConfig(**common, **shape, tie_word_embeddings=False)
    if architecture == "qwen2":
        return Qwen2Config(**common, **shape, tie_word_embeddings=True)
    if architecture == "gpt2":
        return GPT2Config(**common, n_embd=32, n_layer=3, n_head=4, n_positions=256)
    gemma = {**common, **shape, "head_dim": 8, "sliding_window": 8}
    if architecture == "gemma2":
        return Gemma2Config(**gemma, query_pre_attn_scalar=8, final_logit_softcapping=5.0)
    return Gemma3TextConfig(**gemma, query_pre_attn_scalar=8)


def save_tiny(architecture: str, path: Path) -> None:
    """Save a causal language model that is always the same, with a tokenizer that can chat."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_config(make_config(architecture, len(tokenizer)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
