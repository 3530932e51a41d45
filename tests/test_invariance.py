"""Gradients do not depend on how a minibatch is split, nor on padding: every loss on a transformer."""

from __future__ import annotations

import pytest
import torch

from tandem import algo
from tandem.config import AdvantageSection, RewardConfig
from tandem.data.examples import Answered, Example, Pair
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy, SamplingRule
from tandem.models.loading import load_causal
from tandem.models.scalar import ScalarModel, zero_head
from tandem.models.trunk import Trunk
from tandem.stages.joint import PolicyLearner, ValueLearner, estimate_advantages, evaluate, update_policy, update_value
from tandem.stages.reward import RewardLearner, measure_heldout, train_on
from tandem.stages.sft import loss_parts
from tandem.types import Prompt, Rollout, Scores

BUDGETS = (8, 40, 10**6)


class Recorder:
    """An engine that makes gradients and never moves a weight."""

    lr = 0.0

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> float:
        return 0.0


@pytest.fixture
def trunk(tiny):
    return Trunk(load_causal(str(tiny("qwen2")), "model", torch.float32, torch.device("cpu")))


def gradients(trunk: Trunk) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in trunk.model.parameters() if p.grad is not None])
    trunk.model.zero_grad(set_to_none=True)
    return found


def assert_all_close(results: list[torch.Tensor]) -> None:
    assert results[0].abs().max() > 0
    for other in results[1:]:
        assert torch.allclose(other, results[0], rtol=1e-4, atol=1e-6 * float(results[0].abs().max()))


def scalar(trunk: Trunk) -> ScalarModel:
    torch.manual_seed(0)
    head = zero_head(32, torch.device("cpu"))
    torch.nn.init.normal_(head.weight)
    return ScalarModel(trunk, head)


def test_sft_loss(trunk):
    trunk.model.requires_grad_(True)
    model = CausalPolicy(trunk, FULL_DISTRIBUTION)
    examples = [
        Example((0, 5, 6, 7), (False, False, True, True)),
        Example((8, 9), (False, True)),
        Example((0, *range(20, 31)), (False, *[True] * 11)),
    ]
    results, losses = [], []
    for budget in BUDGETS:
        losses.append(sum(loss.item() for loss, _ in loss_parts(model, examples, budget)))
        for loss, _ in loss_parts(model, examples, budget):
            loss.backward()
        results.append(gradients(trunk))
    assert_all_close(results)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_preference_losses(trunk):
    trunk.decoder.requires_grad_(True)
    model = scalar(trunk)
    answers = [Answered((0, 5, 6, 7), 2), Answered((0, 5, 9), 2), Answered((0, 5, 11, 12, 13, 14, 15), 2)]
    pairs = [
        Pair("a", answers[0], answers[1]),
        Pair("a", answers[1], answers[2]),
        Pair("b", answers[2], Answered((3, 4), 1)),
    ]
    learner = RewardLearner(model, [])
    results, metrics, heldout = [], [], []
    for budget in BUDGETS:
        config = RewardConfig.model_validate(
            {
                "model": "m",
                "data": {"train": "t"},
                "every_token_weight": 0.7,
                "compute": {"tokens_per_microbatch": budget},
            }
        )
        metrics.append(train_on(learner, pairs, Recorder(), config))
        results.append(gradients(trunk))
        heldout.append(measure_heldout(learner, pairs, budget))
    assert_all_close(results)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4)
    assert heldout[2] == pytest.approx(heldout[0], rel=1e-4)


@pytest.mark.parametrize("rule", [FULL_DISTRIBUTION, SamplingRule(0.8, 30, 0.9)])
def test_joint_losses(trunk, rule):
    policy, value = CausalPolicy(trunk, rule), scalar(trunk)
    prompts = [Prompt(ids, "", None, {}) for ids in [(5, 6, 7), (8,), (9, 10, 11, 12, 13)]]
    responses = [(20, 21), (22, 23, 24, 25, 26, 27, 28), (1,)]
    rollouts = [Rollout(p, r, (-1.0,) * len(r), "", True) for p, r in zip(prompts, responses, strict=True)]
    reference = CausalPolicy(trunk, FULL_DISTRIBUTION)
    batches = []
    for budget in BUDGETS:
        scores = Scores(torch.tensor([1.0, -1.0, 0.5]), {})
        trajectories = evaluate(rollouts, scores, policy, reference, value, budget)
        batches.append(estimate_advantages(trajectories, AdvantageSection(whiten=True), 0.1))
    for batch in batches[1:]:
        assert torch.allclose(batch.advantages, batches[0].advantages, atol=1e-4)
        assert torch.allclose(batch.returns, batches[0].returns, atol=1e-4)
    trunk.model.requires_grad_(True)
    by_policy, by_value = [], []
    for budget in BUDGETS:
        sums = algo.Sums()
        update_policy(PolicyLearner(policy, Recorder(), 1, 3, 0.2, 0.2), batches[0], budget, sums)
        by_policy.append(gradients(trunk))
        update_value(ValueLearner(value, Recorder(), 1, 3), batches[0], budget, sums)
        by_value.append(gradients(trunk))
    assert_all_close(by_policy)
    assert_all_close(by_value)


def test_recomputed_chunks_have_the_gradient_of_the_whole():
    torch.manual_seed(0)
    states = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets, upstream = torch.randint(0, 11, (7,)), torch.randn(7, dtype=torch.float64)
    exact = torch.log_softmax(states @ weight.T, -1).gather(1, targets[:, None]).squeeze(1)
    expected = torch.autograd.grad((exact * upstream).sum(), (states, weight))
    found = algo.projected_logprobs(states, targets, lambda part, _: part @ weight.T, 3)
    assert torch.allclose(found.double(), exact, atol=1e-6)
    (found * upstream.float()).sum().backward()
    assert torch.allclose(states.grad, expected[0], atol=1e-5)
    assert torch.allclose(weight.grad, expected[1], atol=1e-5)
