"""Gradients do not depend on how a minibatch is split, nor on padding: every loss on a transformer."""

from __future__ import annotations

import pytest
import torch

from tandem import algo
from tandem.config import (
    AdvantageSection,
    HistogramSection,
    KlSection,
    OptimizerSection,
    PolicySection,
    RewardConfig,
    ValueSection,
)
from tandem.data.examples import Answered, Example, Pair
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy, SamplingRule
from tandem.models.loading import load_causal
from tandem.models.scalar import ScalarModel, zero_head
from tandem.models.sharing import PolicyWithValueHead, histogram_of, value_head
from tandem.models.trunk import Trunk
from tandem.stages.joint import estimate_advantages, evaluate
from tandem.stages.measure import measure
from tandem.stages.reward import RewardLearner, measure_heldout, train_on
from tandem.stages.sft import loss_parts
from tandem.stages.update import (
    PolicyLearner,
    SharedLearner,
    ValueLearner,
    gradient_cosine,
    update_both,
    update_policy,
    update_value,
)
from tandem.types import Prompt, Rollout, Scores

BUDGETS = (8, 40, 10**6)


class Recorder:
    """An engine that makes gradients and never moves a weight."""

    lr = 0.0

    def set_progress(self, done: float, total: float) -> None:
        pass

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


def scalar(trunk: Trunk, settings: ValueSection | None = None) -> ScalarModel:
    torch.manual_seed(0)
    settings = settings or ValueSection()
    head = value_head(settings, zero_head(32, torch.device("cpu")))
    torch.nn.init.normal_(head.weight)
    return ScalarModel(trunk, head, histogram=histogram_of(settings))


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


PROMPTS = [Prompt(ids, "", None, {}) for ids in [(5, 6, 7), (8,), (9, 10, 11, 12, 13)]]
RESPONSES = [(20, 21), (22, 23, 24, 25, 26, 27, 28), (1,)]
ROLLOUTS = [
    Rollout(prompt, response, (-1.0,) * len(response), "", True)
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
]
SCORES = Scores(torch.tensor([1.0, -1.0, 0.5]), {"one": torch.tensor([1.0, -1.0, 0.5])}, torch.full((3, 7), 0.1))


def judged(trunk: Trunk, policy: CausalPolicy, value: ScalarModel, budget: int, **advantage):
    reference = CausalPolicy(trunk, FULL_DISTRIBUTION)
    trajectories = evaluate(ROLLOUTS, SCORES, policy, reference, value, budget)
    settings, kl = AdvantageSection(**advantage), KlSection(coefficient=0.1)
    batch = estimate_advantages(trajectories, settings, kl, importance_cap=2.0)
    return batch, measure(trajectories, batch, SCORES, settings, kl)


@pytest.mark.parametrize(
    "advantage",
    [{"whiten": True}, {"baseline": "batch"}, {"baseline": "adaptive"}, {"length_adaptive": 0.5}],
)
@pytest.mark.parametrize("rule", [FULL_DISTRIBUTION, SamplingRule(0.8, 30, 0.9)])
def test_advantages_and_metrics(trunk, rule, advantage):
    policy, value = CausalPolicy(trunk, rule), scalar(trunk)
    found = [judged(trunk, policy, value, budget, **advantage) for budget in BUDGETS]
    for batch, metrics in found[1:]:
        assert torch.allclose(batch.advantages, found[0][0].advantages, atol=1e-4)
        assert torch.allclose(batch.returns, found[0][0].returns, atol=1e-4)
        assert metrics == pytest.approx(found[0][1], rel=1e-3, abs=1e-4, nan_ok=True)


POLICY_SETTINGS = [
    {},
    {"loss": "a2c"},
    {"loss": "book"},
    {"dual_clip": 3.0, "clip_high": 0.28},
    {"entropy_coefficient": 0.3},
]


@pytest.mark.parametrize("settings", POLICY_SETTINGS, ids=str)
@pytest.mark.parametrize("rule", [FULL_DISTRIBUTION, SamplingRule(0.8, 30, 0.9)], ids=["full", "truncated"])
def test_policy_losses(trunk, rule, settings):
    policy = CausalPolicy(trunk, rule)
    batch, _ = judged(trunk, policy, scalar(trunk), 10**6)
    trunk.model.requires_grad_(True)
    kl = KlSection(coefficient=0.1, placement="loss", estimator="k3")
    learner = PolicyLearner(policy, Recorder(), PolicySection(model="m", **settings))
    results, metrics = [], []
    for budget in BUDGETS:
        sums = algo.Sums()
        assert update_policy(learner, batch, kl, budget, sums)
        results.append(gradients(trunk))
        metrics.append(dict(sums.means()))
    assert_all_close(results)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-3, abs=1e-5)


VALUE_SETTINGS = [{}, {"clip": 0.1}, {"loss": "hl_gauss", "histogram": HistogramSection(low=-2.0, high=2.0)}]


@pytest.mark.parametrize("settings", VALUE_SETTINGS, ids=["mse", "clipped", "hl_gauss"])
def test_value_losses(trunk, settings):
    value_settings = ValueSection(**settings)
    batch, _ = judged(trunk, CausalPolicy(trunk, FULL_DISTRIBUTION), scalar(trunk), 10**6)
    value = scalar(trunk, value_settings)
    trunk.model.requires_grad_(True)
    learner = ValueLearner(value, Recorder(), value_settings)
    results, metrics = [], []
    for budget in BUDGETS:
        sums = algo.Sums()
        update_value(learner, batch, budget, sums)
        results.append(gradients(trunk))
        metrics.append(dict(sums.means()))
    assert_all_close(results)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-3, abs=1e-5)


def shared_learner(trunk: Trunk, stop_gradient: bool, engine) -> SharedLearner:
    policy, value = CausalPolicy(trunk, FULL_DISTRIBUTION), scalar(trunk)
    settings = PolicySection(model="m"), ValueSection(coefficient=0.5)
    return SharedLearner(PolicyWithValueHead(policy, value), engine, *settings, stop_gradient)


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_both_losses_at_once(trunk, stop_gradient):
    learner = shared_learner(trunk, stop_gradient, Recorder())
    batch, _ = judged(trunk, learner.model.policy, learner.model.value, 10**6)
    trunk.model.requires_grad_(True)
    results = []
    for budget in BUDGETS:
        assert update_both(learner, batch, KlSection(), budget, algo.Sums(), train_policy=True)
        results.append(gradients(trunk))
    assert_all_close(results)
    apart = PolicyLearner(learner.model.policy, Recorder(), learner.policy)
    update_policy(apart, batch, KlSection(), 10**6, algo.Sums())
    if not stop_gradient:
        value = ValueLearner(learner.model.value, Recorder(), learner.value)
        by_policy = gradients(trunk)
        update_value(value, batch, 10**6, algo.Sums())
        assert_all_close([results[0], by_policy + 0.5 * padded(gradients(trunk), by_policy)])
    else:
        assert_all_close([results[0], gradients(trunk)])


def padded(by_value: torch.Tensor, by_policy: torch.Tensor) -> torch.Tensor:
    """The value loss does not reach the output matrix, whose gradient comes last."""
    return torch.cat([by_value, by_value.new_zeros(len(by_policy) - len(by_value))])


def test_gradient_cosine_is_that_of_the_two_losses(trunk):
    trunk.model.requires_grad_(True)
    parameters = list(trunk.model.parameters())
    engine = LocalEngine([ParameterGroup(parameters, 0.1)], OptimizerSection())
    learner = shared_learner(trunk, False, engine)
    batch, _ = judged(trunk, learner.model.policy, learner.model.value, 10**6)
    found = [gradient_cosine(learner, batch, KlSection(), budget) for budget in BUDGETS]
    assert found == pytest.approx([found[0]] * 3, abs=1e-4)
    assert engine.gradient().abs().max() == 0
    update_policy(
        PolicyLearner(learner.model.policy, Recorder(), learner.policy), batch, KlSection(), 10**6, algo.Sums()
    )
    by_policy = gradients(trunk)
    update_value(ValueLearner(learner.model.value, Recorder(), learner.value), batch, 10**6, algo.Sums())
    by_value = padded(gradients(trunk), by_policy)
    both = (by_policy != 0) & (by_value != 0)
    expected = torch.nn.functional.cosine_similarity(by_policy[both], by_value[both], dim=0)
    assert found[0] == pytest.approx(float(expected), abs=1e-4)


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


def test_entropies_have_the_gradient_of_the_whole():
    torch.manual_seed(0)
    states = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets, upstream = torch.randint(0, 11, (7,)), torch.randn(2, 7, dtype=torch.float64)

    def logits_of(part, _):
        logits = part @ weight.T
        return logits.masked_fill(logits < logits.topk(6, dim=-1).values[:, -1:], -torch.inf)

    logprobs = torch.log_softmax(logits_of(states, targets).scatter_add(1, targets[:, None], 0 * states[:, :1]), -1)
    targets = logprobs.argmax(-1)
    exact = logprobs.gather(1, targets[:, None]).squeeze(1)
    entropies = -(logprobs.exp() * logprobs.masked_fill(logprobs.isinf(), 0.0)).sum(-1)
    expected = torch.autograd.grad((exact * upstream[0] + entropies * upstream[1]).sum(), (states, weight))
    found = algo.projected_logprobs_and_entropies(states, targets, logits_of, 3)
    assert torch.allclose(found[1].double(), entropies, atol=1e-6)
    (found[0] * upstream[0].float() + found[1] * upstream[1].float()).sum().backward()
    assert torch.allclose(states.grad, expected[0], atol=1e-5)
    assert torch.allclose(weight.grad, expected[1], atol=1e-5)
