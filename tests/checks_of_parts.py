"""What is checked within each of several processes: that it holds its part of a model, and never much more."""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sharded_memory import peak_growth
from tandem.config import AdapterSection, SamplingSection
from tandem.errors import InputError
from tandem.models import trunk
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.loading import load_tokenizer
from tandem.models.saving import save_policy
from tandem.models.shards import whole_tensor
from tandem.models.trunk import Trunk
from tandem.models.unread import load_trunk
from tandem.stages import sampling
from tandem.stages.sampling import make_generator
from tandem.types import Prompt, Rollout
from tandem.world import join, leave, world

CPU = torch.device("cpu")


def loaded(path: str, say: Callable[[str], Any] = pytest.fail, dtype: torch.dtype = torch.float32) -> Trunk:
    return load_trunk(path, "model", dtype, CPU, False, say)


def names_of_tensors(model: torch.nn.Module) -> list[list[str]]:
    """The names of each tensor: several where it is tied."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def parts_are_those_of_the_whole(*models: str) -> None:
    for path in models:
        found = loaded(path, dtype=torch.bfloat16).model
        expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        assert names_of_tensors(found) == names_of_tensors(expected)
        own = [*found.state_dict().items(), *found.named_buffers()]
        whole = [*expected.state_dict().items(), *expected.named_buffers()]
        for (name, part), (other, tensor) in zip(own, whole, strict=True):
            assert name == other
            assert torch.equal(whole_tensor(part), tensor), (path, name)
        assert found.generation_config.to_dict() == expected.generation_config.to_dict()


def others_are_read_whole(*models: str) -> None:
    for path in models:
        said: list[str] = []
        policy = CausalPolicy(loaded(path, said.append), FULL_DISTRIBUTION)
        assert len(said) == 1
        assert "every process reads the whole model" in said[0]
        expected = AutoModelForCausalLM.from_pretrained(path).state_dict()
        for name, tensor in policy.weights():
            assert torch.equal(tensor, expected[name]), (path, name)


def all_refuse_what_one_cannot_use(path: str) -> None:
    """A number that is not finite stands in the last process's part."""
    with pytest.raises(InputError, match="not finite"):
        loaded(path)


def loading_needs_its_part_only(small: str, large: str) -> None:
    """Once all that any model needs is there, a process grows by its half of the weights and little more."""
    if sys.platform == "linux":
        loaded(small)
        size = sum(file.stat().st_size for file in Path(large).glob("*.safetensors"))
        grown, _ = peak_growth(lambda: loaded(large))
        assert grown < 0.7 * size, (grown, size)


def one_weight_is_gathered_at_a_time(path: str, folder: str) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def gathered(tensor: Tensor) -> Tensor:
        assert [one for one in alive if one() is not None] == [], "the one before the one at hand is still there"
        whole = whole_tensor(tensor)
        alive.append(weakref.ref(whole))
        return whole

    model = loaded(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trunk, "gathered", lambda _: pytest.fail("the whole model is gathered"))
        model.add_adapter("policy", AdapterSection(rank=2))
        patch.setattr(trunk, "whole_tensor", gathered)
        deque(CausalPolicy(model, FULL_DISTRIBUTION, "policy").weights(), maxlen=0)
        streamed = len(alive)
        save_policy(model, "policy", load_tokenizer(path, "model"), Path(folder))
    assert len(alive) == 2 * streamed > 0


def sampling_by_layer_is_sampling_from_the_whole(path: str) -> None:
    """Where one process alone has too little memory, all sample by layer, also one that has no prompt of its own."""
    policy, tokenizer = CausalPolicy(loaded(path), FULL_DISTRIBUTION), load_tokenizer(path, "model")
    prompts = [Prompt(tuple(range(5, 5 + length)), "", None, {}) for length in (2, 9, 4, 4, 3)]

    def sampled(count: int) -> list[Rollout]:
        settings = SamplingSection(max_new_tokens=6, sequences_per_batch=2)
        random = torch.Generator().manual_seed(1)
        return make_generator(policy, tokenizer, settings, random).generate(prompts[:count])

    expected = {count: sampled(count) for count in (1, 5)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "free_memory", lambda _: 1.0 if world().first else float("inf"))
        patch.setattr(trunk, "gathered", lambda _: pytest.fail("the whole model is gathered"))
        for count, rollouts in expected.items():
            assert sampled(count) == rollouts


CHECKS = {
    check.__name__: check
    for check in (
        parts_are_those_of_the_whole,
        others_are_read_whole,
        all_refuse_what_one_cannot_use,
        loading_needs_its_part_only,
        one_weight_is_gathered_at_a_time,
        sampling_by_layer_is_sampling_from_the_whole,
    )
}


def check(words: Sequence[str]) -> int:
    """Do the check that the first word names, with the others; in every process at once."""
    join("cpu", replicate=1, checkpointing=False)
    CHECKS[words[0]](*words[1:])
    leave()
    return 0
