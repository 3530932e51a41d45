"""The generators that the same tests hold to the same promises."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from tandem.config import SamplingSection, VllmSection
from tandem.models.causal import CausalPolicy
from tandem.rollout import Generator, TorchGenerator, VllmEngine, VllmGenerator

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed: make test-vllm",
)
KINDS = ["torch", "copy", pytest.param("vllm", marks=needs_vllm)]
_engines: dict[Any, VllmEngine] = {}


def as_words(_: Any, ids: Any) -> str:
    return " ".join(map(str, ids))


def make(kind: str, policy: CausalPolicy, stop=(), limit=6, batch=3, seed=0, **vllm) -> Generator:
    """A generator on the policy's weights as they are now: the policy itself, a copy of it, or vLLM."""
    random = torch.Generator().manual_seed(seed)
    if kind == "vllm":
        generator = VllmGenerator(engine_for(policy, limit, batch, **vllm), as_words, stop, random)
        generator.load_weights(policy.weights(), version=0)
        return generator
    source = policy if kind == "torch" else policy.own_copy()
    load = None if kind == "torch" else source.load_weights
    settings = {"max_new_tokens": limit, "sequences_per_batch": batch}
    return TorchGenerator(source, as_words, stop, random=random, load=load, **settings)


def engine_for(policy: CausalPolicy, limit: int, batch: int, rank: int | None = None) -> VllmEngine:
    """One engine is kept, since making one takes seconds; it is made anew for another rule or another shape."""
    rule, config = policy.rule, policy.trunk.model.config
    key = (config.to_json_string(), rule, limit, batch, rank)
    if key not in _engines:
        _engines.clear()
        sampling = SamplingSection(
            max_new_tokens=limit,
            sequences_per_batch=batch,
            temperature=rule.temperature,
            top_k=rule.top_k,
            top_p=rule.top_p,
        )
        place = (torch.float32, torch.device("cpu"))
        settings = VllmSection(kv_cache_gib=0.1)
        _engines[key] = VllmEngine(config, *place, sampling, settings, context=limit + 16, rank=rank)
    return _engines[key]
