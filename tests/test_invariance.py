"""Gradients do not depend on how a minibatch is split, nor on padding: every loss on a transformer."""

from __future__ import annotations

from dataclasses import replace

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
from tandem.stages.measure import measure, spread_within_prompts
from tandem.stages.reward import RewardLearner, measure_heldout, train_on
from tandem.stages.sft import loss_parts
from tandem.stages.update import (
    Course,
    PolicyLearner,
    SharedLearner,
    ValueLearner,
    update_both,
    update_policy,
    update_shared,
    update_value,
)
from tandem.types import Prompt, Rollout, Scores, pad_tokens

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


def shared_learner(trunk: Trunk, stop_gradient: bool, engine, **policy) -> SharedLearner:
    model = PolicyWithValueHead(CausalPolicy(trunk, FULL_DISTRIBUTION), scalar(trunk))
    sections = PolicySection(model="m", **policy), ValueSection(coefficient=0.5)
    return SharedLearner(model, engine, *sections, stop_gradient, cosine_every=1)


def alone(learner: SharedLearner, batch, trunk: Trunk) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the two losses, each by itself, in one order of parameters."""
    parameters = list(trunk.model.parameters())

    def gradient() -> torch.Tensor:
        found = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        trunk.model.zero_grad(set_to_none=True)
        return found

    update_policy(
        PolicyLearner(learner.model.policy, Recorder(), learner.policy), batch, KlSection(), 10**6, algo.Sums()
    )
    by_policy = gradient()
    update_value(ValueLearner(learner.model.value, Recorder(), learner.value), batch, 10**6, algo.Sums())
    return by_policy, gradient()


def engine_of(trunk: Trunk, *more) -> LocalEngine:
    return LocalEngine([ParameterGroup([*trunk.model.parameters(), *more], 0.1)], OptimizerSection(max_grad_norm=1e9))


class Kept(LocalEngine):
    """Keeps the gradient that it would have stepped by, and moves nothing."""

    kept: torch.Tensor

    def step(self) -> float:
        self.kept = torch.cat([torch.zeros(1) if g is None else g.flatten() for g in self.take()])
        return 0.0


@pytest.mark.parametrize("with_cosine", [False, True])
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_both_losses_at_once(trunk, stop_gradient, with_cosine):
    trunk.model.requires_grad_(True)
    kept = Kept([ParameterGroup(list(trunk.model.parameters()), 0.1)], OptimizerSection())
    learner = shared_learner(trunk, stop_gradient, kept)
    batch, _ = judged(trunk, learner.model.policy, learner.model.value, 10**6)
    results, cosines, ratios = [], [], []
    for budget in BUDGETS:
        sums = algo.Sums()
        measured = with_cosine and not stop_gradient
        assert update_both(learner, batch, KlSection(), budget, sums, with_cosine=measured)
        results.append(kept.kept)
        cosines.append(sums.means().get("policy/value_gradient_cosine", 0.0))
        ratios.append(sums.means().get("policy/value_gradient_ratio", 0.0))
    assert_all_close(results)
    by_policy, by_value = alone(learner, batch, trunk)
    expected = by_policy if stop_gradient else by_policy + 0.5 * by_value
    assert torch.allclose(results[0], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    if with_cosine and not stop_gradient:
        both = (by_policy != 0) & (by_value != 0)
        expected = torch.nn.functional.cosine_similarity(by_policy[both], by_value[both], dim=0)
        assert cosines == pytest.approx([float(expected)] * 3, abs=1e-4)
        assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-3)
        assert ratios[0] == pytest.approx(0.5 * float(by_value[both].norm() / by_policy[both].norm()), rel=0.5)


def test_a_policy_that_moved_too_far_rests_while_its_value_head_learns_on(trunk):
    trunk.model.requires_grad_(True)
    policy = {"max_approx_kl": 1e-9, "epochs": 3, "sequences_per_minibatch": 1, "lr": 0.1}
    learner = shared_learner(trunk, False, None, **policy)
    engine = engine_of(trunk, *learner.model.value.head.parameters())
    learner = replace(learner, engine=engine)
    batch, _ = judged(trunk, learner.model.policy, learner.model.value, 10**6)
    head = learner.model.value.head.weight.clone()
    random = torch.Generator().manual_seed(0)
    found = update_shared(learner, batch, KlSection(), 10**6, random, Course(0, 1))
    assert found["policy/updates"] == 1
    assert found["value/updates"] == 8
    assert found["policy/stopped_early"] == 1
    before = torch.cat([p.detach().flatten() for p in trunk.model.parameters()])
    found = update_shared(learner, batch, KlSection(), 10**6, random, Course(0, 1, warming_up=True), 5)
    assert found["value/updates"] == 15
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in trunk.model.parameters()]))
    assert not torch.equal(head, learner.model.value.head.weight)


def test_values_in_other_units_are_the_same_values_and_gradients_scale(trunk):
    settings = ValueSection(normalize=True)
    value = scalar(trunk, settings)
    batch, _ = judged(trunk, CausalPolicy(trunk, FULL_DISTRIBUTION), value, 10**6)
    before = value.values(batch.tokens)
    value.head.requires_grad_(True)
    learner, norms = ValueLearner(value, Recorder(), settings), []
    for mean, std in ((0.0, 1.0), (3.0, 4.0), (-1.0, 0.5)):
        value.rescale(mean, std)
        assert torch.allclose(value.values(batch.tokens), before, atol=1e-5)
        update_value(learner, batch, 10**6, algo.Sums())
        norms.append(value.head.bias.grad.item() * std)
        value.head.zero_grad()
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


@pytest.fixture
def few_in_cache(monkeypatch):
    """Two of the rows below at a time."""
    monkeypatch.setattr("tandem.algo.logits._NUMBERS_IN_CACHE", 22)


PROJECTIONS = pytest.mark.parametrize(("head_trains", "rows"), [(True, 3), (True, 7), (False, 3), (False, 7)])


def chunks_to_project(head_trains):
    """States [7, 5], a head [11, 5], targets [7] and what flows back to log-probabilities and entropies [2, 7]."""
    torch.manual_seed(0)
    states = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=head_trains)
    return states, weight, torch.randint(0, 11, (7,)), torch.randn(2, 7, dtype=torch.float64)


@PROJECTIONS
@pytest.mark.usefixtures("few_in_cache")
def test_chunks_have_the_gradient_of_the_whole(head_trains, rows):
    states, weight, targets, (upstream, _) = chunks_to_project(head_trains)
    trained = [tensor for tensor in (states, weight) if tensor.requires_grad]
    exact = torch.log_softmax(states @ weight.T, -1).gather(1, targets[:, None]).squeeze(1)
    expected = torch.autograd.grad((exact * upstream).sum(), trained)
    found, _ = algo.projected_logprobs(states, targets, lambda part, _: part @ weight.T, rows, head_trains=head_trains)
    assert torch.allclose(found.double(), exact, atol=1e-6)
    (found * upstream.float()).sum().backward()
    for tensor, gradient in zip(trained, expected, strict=True):
        assert torch.allclose(tensor.grad, gradient, atol=1e-5)


def test_a_token_that_is_all_but_certain_keeps_its_gradient_in_bfloat16():
    """Its slope is what is left of one: a difference of two numbers rounded to bfloat16 would be nothing."""
    logits = torch.tensor([[12.0, 0.0, 1.0]], dtype=torch.bfloat16)
    targets, exact = torch.zeros(1, dtype=torch.int64), logits.double().requires_grad_()
    torch.log_softmax(exact, -1)[:, 0].sum().backward()
    found = algo.Passes().read(logits, targets, with_entropy=False)
    slope = algo.Passes().slope(logits, targets, found, algo.Upstream(torch.ones(1), None))
    assert torch.allclose(slope.double(), exact.grad, rtol=0.01, atol=0.0)


@PROJECTIONS
@pytest.mark.usefixtures("few_in_cache")
def test_entropies_have_the_gradient_of_the_whole(head_trains, rows):
    states, weight, targets, upstream = chunks_to_project(head_trains)
    trained = [tensor for tensor in (states, weight) if tensor.requires_grad]

    def logits_of(part, _):
        logits = part @ weight.T
        return logits.masked_fill(logits < logits.topk(6, dim=-1).values[:, -1:], -torch.inf)

    logprobs = torch.log_softmax(logits_of(states, targets), -1)
    targets = logprobs.argmax(-1)
    exact = logprobs.gather(1, targets[:, None]).squeeze(1)
    entropies = -(logprobs.exp() * logprobs.masked_fill(logprobs.isinf(), 0.0)).sum(-1)
    expected = torch.autograd.grad((exact * upstream[0] + entropies * upstream[1]).sum(), trained)
    found = algo.projected_logprobs(states, targets, logits_of, rows, with_entropy=True, head_trains=head_trains)
    assert torch.allclose(found[1].double(), entropies, atol=1e-6)
    (found[0] * upstream[0].float() + found[1] * upstream[1].float()).sum().backward()
    for tensor, gradient in zip(trained, expected, strict=True):
        assert torch.allclose(tensor.grad, gradient, atol=1e-5)


@PROJECTIONS
@pytest.mark.usefixtures("few_in_cache")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_chunk_in_its_own_precision_has_the_gradient_but_for_its_rounding(head_trains, rows, dtype, tolerance):
    states, weight, targets, upstream = chunks_to_project(head_trains)

    def gradients(dtype):
        # What is rounded is the same for both.
        leaves = [
            tensor.detach().bfloat16().to(dtype).requires_grad_(tensor.requires_grad) for tensor in (states, weight)
        ]
        found = algo.projected_logprobs(
            leaves[0], targets, lambda part, _: part @ leaves[1].T, rows, head_trains=head_trains, with_entropy=True
        )
        (found[0] * upstream[0] + found[1] * upstream[1]).sum().backward()
        return [leaf.grad.double() for leaf in leaves if leaf.requires_grad]

    for found, exact in zip(gradients(dtype), gradients(torch.float64), strict=True):
        assert (found - exact).norm() < tolerance * exact.norm()


def test_spread_within_prompts_is_around_each_prompts_own_mean():
    tokens = pad_tokens([(1, 2), (1,), (1, 2), (1,), (3,)], [(4,), (4, 4), (4,), (4,), (4,)])
    found = spread_within_prompts(torch.tensor([1.0, 10.0, 3.0, 10.0, 99.0]), tokens)
    assert found == {"objective/score_std_within_prompts": pytest.approx(0.5**0.5)}
    assert spread_within_prompts(torch.tensor([1.0, 2.0]), tokens.select(torch.tensor([0, 1]))) == {}
