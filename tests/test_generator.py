"""What every generator promises, held against the plain forward; vLLM's where it is installed (`make test-vllm`)."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from conftest import ARCHITECTURES
from generators import KINDS, make, needs_vllm
from tandem.config import AdapterSection
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy, SamplingRule
from tandem.models.loading import load_causal
from tandem.models.trunk import Trunk
from tandem.rollout import GivenUp
from tandem.types import Prompt, pad_tokens

PROMPTS = [Prompt(ids, "", None, {}) for ids in [(5, 6, 7, 8, 9, 10, 11), (12,), (13, 14, 15), (16, 17)]]
MODELS = [("torch", name) for name in ARCHITECTURES] + [pytest.param("vllm", "llama-wide", marks=needs_vllm)]


@pytest.fixture(params=KINDS)
def kind(request):
    """Which generator; a test that asks for it is run with each."""
    return request.param


def policy_of(path, rule=FULL_DISTRIBUTION, dtype=torch.float32) -> CausalPolicy:
    return CausalPolicy(Trunk(load_causal(str(path), "model", dtype, torch.device("cpu"))), rule)


def recomputed(policy, rollouts):
    tokens = pad_tokens([r.prompt.ids for r in rollouts], [r.ids for r in rollouts])
    with torch.no_grad():
        return policy.logprobs(tokens)


@pytest.mark.parametrize("rule", [FULL_DISTRIBUTION, SamplingRule(0.7, 20, 0.9)])
@pytest.mark.parametrize(("kind", "architecture"), MODELS)
def test_logprobs_are_those_that_train(tiny, kind, architecture, rule):
    policy = policy_of(tiny(architecture), rule)
    rollouts = make(kind, policy, stop=range(100, 160), limit=12).generate(PROMPTS * 4)
    assert any(r.ended for r in rollouts)
    assert any(len(r.ids) > 1 for r in rollouts)
    found = recomputed(policy, rollouts)
    for row, rollout in enumerate(rollouts):
        assert found[row, : len(rollout.ids)].tolist() == pytest.approx(rollout.logprobs, abs=1e-4)


def test_an_adapter_decodes_as_it_trains(tiny, kind):
    trunk = Trunk(load_causal(str(tiny("llama-wide")), "model", torch.float32, torch.device("cpu")))
    for parameter in trunk.add_adapter("policy", AdapterSection(rank=4, upper_layers=1)):
        torch.nn.init.normal_(parameter, std=0.1)
    policy = CausalPolicy(trunk, FULL_DISTRIBUTION, "policy")
    rollouts = make(kind, policy).generate(PROMPTS)
    found = recomputed(policy, rollouts)
    for row, rollout in enumerate(rollouts):
        assert found[row, : len(rollout.ids)].tolist() == pytest.approx(rollout.logprobs, abs=1e-4)


def test_answers_come_in_the_order_of_the_prompts(tiny, kind):
    rollouts = make(kind, policy_of(tiny("llama-wide")), batch=2).generate(PROMPTS)
    assert [r.prompt for r in rollouts] == PROMPTS
    assert all(r.text == " ".join(map(str, r.ids)) for r in rollouts)


def test_likeliest_token_equals_greedy_decoding(tiny, kind):
    policy = policy_of(tiny("llama-wide"), SamplingRule(1.0, 1, 1.0))
    for rollout in make(kind, policy).generate(PROMPTS):
        ids = list(rollout.prompt.ids)
        for token in rollout.ids:
            logits = policy.trunk.model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert token == int(logits.argmax())
            ids.append(token)


def test_rows_end_at_a_stop_token_and_only_there(tiny, kind):
    stop = set(range(0, 300, 4))
    rollouts = make(kind, policy_of(tiny("llama-wide")), stop=stop, limit=9).generate(PROMPTS * 8)
    assert {r.ended for r in rollouts} == {True, False} or all(r.ended for r in rollouts)
    for rollout in rollouts:
        assert not set(rollout.ids[:-1]) & stop
        assert rollout.ended == (rollout.ids[-1] in stop)
        assert rollout.ended or len(rollout.ids) == 9


def test_batch_size_does_not_change_the_distribution(tiny, kind):
    policy = policy_of(tiny("llama-wide"))
    firsts = []
    for batch in (1, 64):
        rollouts = make(kind, policy, limit=1, batch=batch, seed=1).generate(PROMPTS[:1] * 400)
        firsts.append(torch.bincount(torch.tensor([r.ids[0] for r in rollouts]), minlength=300).float() / 400)
    assert (firsts[0] - firsts[1]).abs().sum() / 2 < 0.25


def test_same_seed_same_samples(tiny, kind):
    policy = policy_of(tiny("llama-wide"))
    first, again, other = (make(kind, policy, seed=seed).generate(PROMPTS) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_every_response_is_drawn_by_itself_and_further_ones_are_new(tiny, kind):
    generator = make(kind, policy_of(tiny("llama-wide")))
    found = [rollout.ids for _ in range(2) for rollout in generator.generate(PROMPTS[:1] * 8)]
    assert len(set(found)) == 16


def test_sampled_frequencies_are_the_policys_probabilities(tiny, kind):
    policy = policy_of(tiny("llama-wide"), SamplingRule(0.8, 6, 0.95))
    rollouts = make(kind, policy, limit=1, batch=256).generate(PROMPTS[:1] * 2000)
    firsts = [rollout.ids[0] for rollout in rollouts]
    said = {rollout.ids[0]: rollout.logprobs[0] for rollout in rollouts}
    assert sum(torch.tensor(logprob).exp().item() for logprob in said.values()) == pytest.approx(1.0, abs=1e-4)
    for token, logprob in said.items():
        expected = torch.tensor(logprob).exp().item()
        assert abs(firsts.count(token) / 2000 - expected) < 5 * (expected * (1 - expected) / 2000) ** 0.5 + 1e-3


def test_new_weights_are_sampled_from(tiny, kind):
    policy = policy_of(tiny("llama-wide"))
    generator = make(kind, policy)
    generator.generate(PROMPTS)
    with torch.no_grad():
        for parameter in policy.trunk.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    generator.load_weights(policy.weights(), version=3)
    assert generator.version == 3
    rollouts = generator.generate(PROMPTS)
    found = recomputed(policy, rollouts)
    for row, rollout in enumerate(rollouts):
        assert found[row, : len(rollout.ids)].tolist() == pytest.approx(rollout.logprobs, abs=1e-4)


def test_sampling_leaves_the_process_random_states_alone(tiny, kind):
    generator, before = make(kind, policy_of(tiny("llama-wide"))), torch.get_rng_state()
    generator.generate(PROMPTS)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_in_another_thread_can_be_given_up(tiny, kind):
    generator, ended = make(kind, policy_of(tiny("llama-wide")), limit=200), []

    def sample() -> None:
        try:
            generator.generate(PROMPTS * 200)
        except GivenUp:
            ended.append(time.monotonic())

    thread = threading.Thread(target=sample)
    thread.start()
    time.sleep(0.2)
    asked = time.monotonic()
    generator.stop()
    thread.join(timeout=30)
    assert ended
    assert ended[0] - asked < 5


def test_a_copy_answers_as_it_was_until_it_is_told(tiny):
    policy = policy_of(tiny("llama-wide"))
    generator = make("copy", policy)
    with torch.no_grad():
        policy.trunk.model.get_output_embeddings().weight.mul_(1.5)
    stale = generator.generate(PROMPTS)
    assert (recomputed(policy, stale)[0] - torch.tensor(stale[0].logprobs)).abs().max() > 0.01
