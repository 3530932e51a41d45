"""The default generator against the plain forward."""

from __future__ import annotations

import pytest
import torch

from conftest import ARCHITECTURES
from tandem.config import AdapterSection
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy, SamplingRule
from tandem.models.loading import load_causal
from tandem.models.trunk import Trunk
from tandem.rollout import TorchGenerator
from tandem.rollout.keys import uniforms
from tandem.types import Prompt, pad_tokens

PROMPTS = [Prompt(ids, "", None, {}) for ids in [(5, 6, 7, 8, 9, 10, 11), (12,), (13, 14, 15), (16, 17)]]


def make(policy, stop=(), limit=6, batch=3, seed=0) -> TorchGenerator:
    return TorchGenerator(
        policy,
        lambda _, ids: " ".join(map(str, ids)),
        stop,
        max_new_tokens=limit,
        sequences_per_batch=batch,
        random=torch.Generator().manual_seed(seed),
    )


def policy_of(path, rule=FULL_DISTRIBUTION, dtype=torch.float32) -> CausalPolicy:
    return CausalPolicy(Trunk(load_causal(str(path), "model", dtype, torch.device("cpu"))), rule)


def recomputed(policy, rollouts):
    tokens = pad_tokens([r.prompt.ids for r in rollouts], [r.ids for r in rollouts])
    with torch.no_grad():
        return policy.logprobs(tokens)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rule", [FULL_DISTRIBUTION, SamplingRule(0.7, 20, 0.9)])
def test_logprobs_are_those_that_train(tiny, architecture, rule):
    policy = policy_of(tiny(architecture), rule)
    rollouts = make(policy, stop=range(100, 160), limit=12).generate(PROMPTS * 4)
    assert any(r.ended for r in rollouts)
    assert any(len(r.ids) > 1 for r in rollouts)
    found = recomputed(policy, rollouts)
    for row, rollout in enumerate(rollouts):
        assert found[row, : len(rollout.ids)].tolist() == pytest.approx(rollout.logprobs, abs=1e-4)


def test_an_adapter_decodes_as_it_trains(tiny):
    trunk = Trunk(load_causal(str(tiny()), "model", torch.float32, torch.device("cpu")))
    for parameter in trunk.add_adapter("policy", AdapterSection(rank=4, upper_layers=1)):
        torch.nn.init.normal_(parameter, std=0.1)
    policy = CausalPolicy(trunk, FULL_DISTRIBUTION, "policy")
    rollouts = make(policy).generate(PROMPTS)
    found = recomputed(policy, rollouts)
    for row, rollout in enumerate(rollouts):
        assert found[row, : len(rollout.ids)].tolist() == pytest.approx(rollout.logprobs, abs=1e-4)


def test_answers_come_in_the_order_of_the_prompts(tiny):
    rollouts = make(policy_of(tiny()), batch=2).generate(PROMPTS)
    assert [r.prompt for r in rollouts] == PROMPTS
    assert all(r.text == " ".join(map(str, r.ids)) for r in rollouts)


def test_likeliest_token_equals_greedy_decoding(tiny):
    policy = policy_of(tiny(), SamplingRule(1.0, 1, 1.0))
    for rollout in make(policy).generate(PROMPTS):
        ids = list(rollout.prompt.ids)
        for token in rollout.ids:
            logits = policy.trunk.model(input_ids=torch.tensor([ids])).logits[0, -1]
            assert token == int(logits.argmax())
            ids.append(token)


def test_rows_end_at_a_stop_token_and_only_there(tiny):
    stop = set(range(0, 300, 4))
    rollouts = make(policy_of(tiny()), stop=stop, limit=9).generate(PROMPTS * 8)
    assert {r.ended for r in rollouts} == {True, False} or all(r.ended for r in rollouts)
    for rollout in rollouts:
        assert not set(rollout.ids[:-1]) & stop
        assert rollout.ended == (rollout.ids[-1] in stop)
        assert rollout.ended or len(rollout.ids) == 9


def test_batch_size_does_not_change_the_distribution(tiny):
    policy = policy_of(tiny())
    firsts = []
    for batch in (1, 64):
        rollouts = make(policy, limit=1, batch=batch, seed=1).generate(PROMPTS[:1] * 400)
        firsts.append(torch.bincount(torch.tensor([r.ids[0] for r in rollouts]), minlength=300).float() / 400)
    assert (firsts[0] - firsts[1]).abs().sum() / 2 < 0.25


def test_with_keys_a_sample_is_the_same_whatever_is_sampled_beside_it(tiny):
    policy = policy_of(tiny())
    keys = [(7, number) for number in range(len(PROMPTS))]
    together = make(policy).generate(PROMPTS, keys)
    alone = [make(policy, seed=9).generate([p], [k])[0] for p, k in zip(PROMPTS, keys, strict=True)]
    assert [r.ids for r in together] == [r.ids for r in alone]
    others = make(policy).generate(PROMPTS, [(8, number) for number in range(len(PROMPTS))])
    assert [r.ids for r in others] != [r.ids for r in together]


def test_keys_leave_the_random_state_alone(tiny):
    policy = policy_of(tiny())
    generator = make(policy, seed=5)
    generator.generate(PROMPTS, [(7, number) for number in range(len(PROMPTS))])
    assert generator.generate(PROMPTS) == make(policy, seed=5).generate(PROMPTS)


def test_keyed_numbers_are_uniform_and_unlike_each_other():
    drawn = uniforms([(3, number) for number in range(2000)], 5)
    counts = torch.histc(drawn, 10, 0.0, 1.0)
    assert ((counts - 1000) ** 2 / 1000).sum() < 30
    assert torch.corrcoef(drawn.T).sub(torch.eye(5)).abs().max() < 0.1


def test_same_seed_same_samples(tiny):
    policy = policy_of(tiny())
    assert make(policy, seed=5).generate(PROMPTS) == make(policy, seed=5).generate(PROMPTS)
    assert make(policy, seed=5).generate(PROMPTS) != make(policy, seed=6).generate(PROMPTS)
