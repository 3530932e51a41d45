"""What is computed in another way on a CPU is held to the plain way: attention, and matrices laid out for sampling."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import ARCHITECTURES
from tandem.models.attention import ON_CPU
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.loading import load_causal
from tandem.models.trunk import Trunk

IDS = torch.arange(5, 53).reshape(4, 12)
LEFT_PADDED = torch.ones(4, 12, dtype=torch.int64)
LEFT_PADDED[1, :5] = 0
LEFT_PADDED[3, :11] = 0


def ours(path, dtype):
    return Trunk(load_causal(str(path), "model", dtype, torch.device("cpu"))).model


def plain(path, dtype):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()


def logits_and_gradient(model, mask):
    """At the tokens that are no padding."""
    model.requires_grad_(True)
    logits = model(input_ids=IDS, attention_mask=mask).logits.float()[mask.bool()]
    logits.log_softmax(-1)[..., 7].sum().backward()
    gradients = [parameter.grad.float().flatten() for parameter in model.parameters() if parameter.grad is not None]
    return logits.detach(), torch.cat(gradients)


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_with_the_fused_kernel_attend_our_way(tiny, architecture):
    expected = {"sdpa": ON_CPU}
    found = ours(tiny(architecture), torch.float32).config._attn_implementation
    by_itself = AutoModelForCausalLM.from_pretrained(tiny(architecture)).config._attn_implementation
    assert found == expected.get(by_itself, by_itself)


@pytest.mark.parametrize("mask", [torch.ones_like(LEFT_PADDED), LEFT_PADDED], ids=["whole rows", "padded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_attends_as_the_fused_kernel_does(tiny, architecture, mask):
    path = tiny(architecture)
    truth, slope = logits_and_gradient(plain(path, torch.float32), mask)
    found, found_slope = logits_and_gradient(ours(path, torch.float32), mask)
    assert torch.allclose(found, truth, atol=1e-5)
    assert distance(found_slope, slope) < 1e-5
    rounded, rounded_slope = logits_and_gradient(ours(path, torch.bfloat16), mask)
    by_kernel, by_kernel_slope = logits_and_gradient(plain(path, torch.bfloat16), mask)
    assert distance(rounded, truth) < 1.2 * distance(by_kernel, truth) + 1e-3
    assert distance(rounded_slope, slope) < 1.2 * distance(by_kernel_slope, slope) + 1e-3


def decoded(model, dtype):
    """Logits of three tokens after left-padded prompts, one after the other, by a model's own cache."""
    with torch.no_grad():
        mask = LEFT_PADDED
        out = model(input_ids=IDS, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
        found = [out.logits[:, -1]]
        for token in range(60, 63):
            mask = torch.cat([mask, mask.new_ones(4, 1)], dim=1)
            ids, positions = torch.full((4, 1), token), mask.sum(1, keepdim=True) - 1
            out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=out.past_key_values)
            found.append(out.logits[:, -1])
    return torch.stack(found).to(dtype)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_token_attends_as_the_fused_kernel_does(tiny, architecture):
    found = decoded(ours(tiny(architecture), torch.float32), torch.float32)
    assert torch.allclose(found, decoded(plain(tiny(architecture), torch.float32), torch.float32), atol=1e-5)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor does not multiply bfloat16 by oneDNN"
)
def test_matrices_laid_out_for_sampling_give_the_same_logits(tiny):
    policy = CausalPolicy(Trunk(ours(tiny("llama-wide"), torch.bfloat16)), FULL_DISTRIBUTION)
    positions = torch.arange(12).expand(4, 12)

    def logits():
        return policy.next_logits(IDS, None, positions, policy.new_cache(12)).float()

    before = logits()
    with policy.gathered():
        inside = logits()
        assert all("forward" in vars(layer) for layer in policy.trunk.model.modules() if type(layer) is torch.nn.Linear)
        with policy.gathered():
            assert torch.equal(logits(), inside)
        assert torch.equal(logits(), inside), "what was laid out outside stays"
    assert not any("forward" in vars(layer) for layer in policy.trunk.model.modules())
    assert distance(inside, before) < 1e-2
    with torch.no_grad():
        policy.trunk.model.lm_head.weight.mul_(2)
    after = logits()
    with policy.gathered():
        assert distance(logits(), after) < 1e-2, "the copies are of the weights as they are by then"
