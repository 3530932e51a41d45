"""Shapes of published models, so that one can be planned or timed without its files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from transformers import LlamaConfig, Qwen2Config

from tandem.errors import InputError
from tandem.plan.model_size import ModelSize


def _qwen(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, keys: int, tied: bool) -> dict[str, Any]:
    return {
        "kind": Qwen2Config,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32_768,
        "rope_theta": 1e6,
    }


def _llama(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "kind": LlamaConfig,
        "vocab_size": 128_256,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131_072,
        "rope_theta": 5e5,
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-15m": {
        "kind": LlamaConfig,
        "vocab_size": 32_000,
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    "qwen-0.5b": _qwen(151_936, 896, 4864, 24, 14, 2, tied=True),
    "llama-1b": _llama(2048, 8192, 16, 32, tied=True),
    "qwen-1.5b": _qwen(151_936, 1536, 8960, 28, 12, 2, tied=True),
    "qwen-3b": _qwen(151_936, 2048, 11_008, 36, 16, 2, tied=True),
    "qwen-7b": _qwen(152_064, 3584, 18_944, 28, 28, 4, tied=False),
    "llama-8b": _llama(4096, 14_336, 32, 32, tied=False),
    "qwen-14b": _qwen(152_064, 5120, 13_824, 48, 40, 8, tied=False),
    "qwen-32b": _qwen(152_064, 5120, 27_648, 64, 40, 8, tied=False),
    "llama-70b": _llama(8192, 28_672, 80, 64, tied=False),
    "qwen-72b": _qwen(152_064, 8192, 29_568, 80, 64, 8, tied=False),
}


@lru_cache
def size_of_shape(name: str) -> ModelSize:
    """The size of a shape, by its name or the number in it (`7B`, the first of that size).

    Raises InputError where there is none.
    """
    wanted = name.lower()
    found = next((key for key in SHAPES if key == wanted or key.partition("-")[2] == wanted), None)
    if found is None:
        raise InputError(f"--model-shape {name!r}: no such shape; there are {', '.join(SHAPES)}.")
    settings = {key: value for key, value in SHAPES[found].items() if key != "kind"}
    return ModelSize.of_config(SHAPES[found]["kind"](**settings))
