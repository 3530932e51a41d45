"""What the lower layers that models share made of a text while it was sampled stands for all that read it later."""

from __future__ import annotations

import pytest
import torch

from conftest import ARCHITECTURES
from generators import make
from tandem.bench.counting import counting
from tandem.config import AdapterSection
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.loading import load_causal
from tandem.models.trunk import Trunk
from tandem.stages.joint import tokens_of
from tandem.types import Prompt, whole_texts

PROMPTS = [Prompt(ids, "", None, {}) for ids in [(5, 6, 7, 8, 9, 10, 11), (12,), (13, 14, 15), (16, 17)]]


def policy_of(path, *, shares: bool = True) -> CausalPolicy:
    """A policy with an adapter that matters on its upper layer, and others, if so, that share what lies below."""
    trunk = Trunk(load_causal(str(path), "model", torch.float32, torch.device("cpu")))
    torch.manual_seed(3)
    for parameter in trunk.add_adapter("policy", AdapterSection(rank=4, upper_layers=1)):
        torch.nn.init.normal_(parameter, std=0.1)
    if shares:
        trunk.share_below("policy")
        assert trunk.shares_below("policy")
    return CausalPolicy(trunk, FULL_DISTRIBUTION, "policy")


def sampled(policy: CausalPolicy, seed: int = 0):
    """Responses to prompts of several lengths, each asked for several times, some cut and some ended."""
    rollouts = make("torch", policy, stop=range(0, 300, 6), limit=9, batch=7, seed=seed).generate(PROMPTS * 4)
    assert {rollout.ended for rollout in rollouts} == {True, False}
    assert len({len(rollout.ids) for rollout in rollouts}) > 3
    return rollouts


def of_texts(tokens) -> torch.Tensor:
    exists = torch.arange(tokens.ids.shape[1])[None] < tokens.lengths[:, None]
    return tokens.activations[exists]


def anew(policy: CausalPolicy, rollouts) -> torch.Tensor:
    policy.trunk.forget()
    return of_texts(policy.prepare(tokens_of(rollouts), 10**6))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_what_a_pass_over_the_text_makes(tiny, architecture):
    policy = policy_of(tiny(architecture))
    rollouts = sampled(policy)
    with counting([policy.trunk]) as counts:
        found = of_texts(policy.prepare(tokens_of(rollouts), 10**6))
    below = len(policy.trunk.layers) - 1
    assert 0 < counts.layer_positions <= below * 2 * 16, "of 16 texts two are run, of at most 16 tokens"
    expected = anew(policy, rollouts)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.equal(found, expected), "or else nothing of it came from sampling"


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_it_changes_no_response(tiny, architecture):
    alone, shared = (sampled(policy_of(tiny(architecture), shares=shares)) for shares in (False, True))
    assert [rollout.ids for rollout in alone] == [rollout.ids for rollout in shared]
    for one, other in zip(alone, shared, strict=True):
        assert one.ended == other.ended
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_it_stands_for_a_text_without_its_last_token(tiny):
    policy = policy_of(tiny())
    texts = [rollout.prompt.ids + rollout.ids for rollout in sampled(policy)]
    shorter = whole_texts([text[:-1] for text in texts])
    found = of_texts(policy.prepare(shorter, 10**6))
    with counting([policy.trunk]) as counts:
        policy.prepare(whole_texts(texts), 10**6)
    assert counts.layer_positions == 0
    policy.trunk.forget()
    assert torch.allclose(found, of_texts(policy.prepare(shorter, 10**6)), atol=1e-4)


def test_what_is_expected_is_read_together_with_what_is_asked_for(tiny):
    """One pass for a text that was not sampled, an eighth of those that were, and no pass for those afterwards."""
    policy, passes = policy_of(tiny()), []
    rollouts = sampled(policy)
    policy.trunk.layers[0].register_forward_hook(lambda _, inputs, __: passes.append(inputs[0].shape[0]))
    policy.trunk.expect([rollout.prompt.ids + rollout.ids for rollout in rollouts])
    policy.prepare(whole_texts([[9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]]), 10**6)
    assert passes == [3]
    found = of_texts(policy.prepare(tokens_of(rollouts), 10**6))
    assert passes == [3]
    assert torch.allclose(found, anew(policy, rollouts), atol=1e-4)


def test_a_text_within_one_that_was_sampled_is_found(tiny):
    """Also where neither is a whole one: of two texts that go on from each other, only the longer one is looked for."""
    policy = policy_of(tiny())
    text = max((rollout.prompt.ids + rollout.ids for rollout in sampled(policy)), key=len)
    tokens = whole_texts([text[:-2], text[:-1]])
    found = of_texts(policy.prepare(tokens, 10**6))
    policy.trunk.forget()
    assert torch.allclose(found, of_texts(policy.prepare(tokens, 10**6)), atol=1e-4)


@pytest.mark.parametrize("where", ["the first token", "the last token"])
def test_it_does_not_stand_where_a_pass_says_otherwise(tiny, where):
    """As where an architecture computes something else from its cache: one token of one of the longest is enough."""
    policy = policy_of(tiny())
    rollouts = sampled(policy)
    longest = max(rollouts, key=lambda rollout: len(rollout.prompt.ids + rollout.ids))
    kept = policy.trunk._activations._sampled[longest.prompt.ids + longest.ids]
    kept[0 if where == "the first token" else -1] *= 1.01
    found = of_texts(policy.prepare(tokens_of(rollouts), 10**6))
    assert torch.equal(found, anew(policy, rollouts))


def test_what_was_sampled_before_is_not_held(tiny):
    policy = policy_of(tiny())
    sampled(policy)
    rollouts = sampled(policy, seed=1)
    assert set(policy.trunk._activations._sampled) == {
        text[:end] for rollout in rollouts for text in [rollout.prompt.ids + rollout.ids] for end in (-1, len(text))
    }
    policy.trunk.forget()
    assert not policy.trunk._activations._sampled
    assert not policy.trunk._activations._held
