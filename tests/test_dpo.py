"""DPO: its losses by hand, its closed form, and the command."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from oracles.preferences import responses_by_end, train_dpo
from oracles.tabular import TablePolicy, tree
from tandem import algo
from tandem.cli import main
from tandem.config import DpoConfig
from tandem.data.examples import Pair
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.run.folder import read_metrics
from tandem.stages.dpo import DpoLearner, measure_heldout, reference_logprobs, train_on
from test_commands import pair_file, refused


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_losses_by_hand():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0])
    margins = [0.5 * 1.0, 0.5 * -3.0]
    expected = -sum(log_sigmoid(m) for m in margins)
    assert algo.dpo_loss(chosen, rejected, beta=0.5).item() == pytest.approx(expected, rel=1e-6)
    smooth = -sum(0.9 * log_sigmoid(m) + 0.1 * log_sigmoid(-m) for m in margins)
    assert algo.dpo_loss(chosen, rejected, beta=0.5, label_smoothing=0.1).item() == pytest.approx(smooth, rel=1e-6)
    assert algo.ipo_loss(chosen, rejected, beta=0.5).item() == pytest.approx((1 - 1) ** 2 + (-3 - 1) ** 2)
    with pytest.raises(ValueError, match="shapes differ"):
        algo.ipo_loss(chosen, rejected[:1], beta=0.5)


def test_gradients_weigh_pairs_by_how_wrong_they_are():
    chosen = torch.tensor([0.0, 5.0], requires_grad=True)
    algo.dpo_loss(chosen, torch.zeros(2), beta=1.0).backward()
    assert chosen.grad.tolist() == pytest.approx([-0.5, -1 / (1 + math.exp(5))], rel=1e-5)


@pytest.mark.long
def test_the_policy_nears_the_optimum_as_pairs_grow():
    task = tree(seed=0)
    gaps = [train_dpo(task, pairs, seed=0, steps=150) for pairs in (2**10, 2**12, 2**15)]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    assert gaps[2] < 0.6


def test_a_step_does_not_depend_on_the_micro_batch():
    task = tree(seed=0, horizon=3)
    answers = list(responses_by_end(task).values())
    pairs = [Pair("", answers[n], answers[(7 * n + 3) % 64]) for n in range(24)]
    results = []
    for budget in (8, 40, 10**9):
        config = DpoConfig.model_validate(
            {"model": "t", "data": {"train": "none"}, "compute": {"tokens_per_microbatch": budget}}
        )
        policy = TablePolicy(task.reference, task)
        engine = LocalEngine([ParameterGroup(list(policy.parameters()), 0.1)], config.optimizer)
        engine.set_peak()
        learner = DpoLearner(policy, reference_logprobs(policy, answers, budget), engine, config)
        metrics = train_on(learner, pairs)
        results.append((policy.logits.detach(), metrics, measure_heldout(learner, pairs)))
    for weights, metrics, after in results[1:]:
        assert torch.allclose(weights, results[0][0], atol=1e-12)
        assert metrics == pytest.approx(results[0][1])
        assert after == pytest.approx(results[0][2])
    assert results[0][1]["train/accuracy"] == 0.5
    assert results[0][2]["heldout/accuracy"] > 0.9


@pytest.mark.parametrize("more", [[], ["--adapters.rank=4"], ["--loss=ipo"], ["--label_smoothing=0.1"]], ids=str)
def test_the_command_learns_and_saves(tiny, tmp_path, capsys, more):
    run = tmp_path / "run"
    words = ["dpo", f"--model={tiny('qwen2')}", f"--data.train={pair_file(tmp_path)}", "--optimizer.lr=0.003"]
    words += ["--epochs=6", "--pairs_per_minibatch=8", *more, f"--run.directory={run}"]
    assert main(words) == 0
    assert "held-out accuracy 1.000" in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["heldout"]["before"]["heldout/accuracy"] == 0.5
    assert summary["heldout"]["after"]["heldout/margin"] > 0
    last = read_metrics(run)[-1]
    assert last["train/reward_chosen"] - last["train/reward_rejected"] == pytest.approx(last["train/margin"], abs=1e-4)
    AutoModelForCausalLM.from_pretrained(run / "model")
    assert (run / "model" / "adapter").exists() == ("--adapters.rank=4" in more)


def test_what_has_no_effect_is_refused(tiny, tmp_path, capsys):
    words = ["dpo", f"--model={tiny()}", f"--data.train={pair_file(tmp_path)}", "--loss=ipo", "--label_smoothing=0.1"]
    assert "label_smoothing has no effect here" in refused(capsys, words)
