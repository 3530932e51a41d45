"""Numbers that are not finite, injected at every place where one can arise: none reaches a weight."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tandem import algo
from tandem.cli import main
from tandem.engine.local import LocalEngine
from tandem.models.causal import CausalPolicy
from tandem.models.scalar import ScalarModel
from tandem.run.folder import read_metrics
from tandem.stages import joint
from test_commands import pair_file, ppo_words, with_function, write


def bad_at(function, call: int, spoil, last: int | None = None):
    """The function with its answer spoilt at one call, or at every call up to `last`."""
    calls = 0

    def spoilt(*arguments, **named):
        nonlocal calls
        calls += 1
        found = function(*arguments, **named)
        return spoil(found) if call <= calls <= (last or call) else found

    return spoilt


def nan(tensor: torch.Tensor) -> torch.Tensor:
    spoilt = tensor.clone()
    spoilt.view(-1)[0] = float("nan")
    return spoilt


def infinite(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * float("inf")


PLACES = {
    "the generator": (CausalPolicy, "draw", 20, lambda found: (found[0], nan(found[1]))),
    "the policy's log-probabilities": (CausalPolicy, "logprobs", 8, nan),
    "values": (ScalarModel, "values", 6, nan),
    "advantages": (joint.algo, "gae", 8, nan),
    "the policy's loss, NaN": (
        algo,
        "ppo_policy_loss",
        3,
        lambda found: replace(found, total=found.total * float("nan")),
    ),
    "the policy's loss, infinite": (
        algo,
        "ppo_policy_loss",
        3,
        lambda found: replace(found, total=found.total + float("inf")),
    ),
    "the value loss": (algo, "value_loss", 3, nan),
}


def finite_models(run) -> bool:
    tensors = [t for path in run.glob("*model/*.safetensors") for t in load_file(path).values()]
    assert tensors
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_a_step_that_meets_one_is_skipped_and_kept(tiny, tmp_path, monkeypatch, place):
    owner, name, call, spoil = place
    monkeypatch.setattr(owner, name, bad_at(getattr(owner, name), call, spoil))
    words = [*ppo_words(tmp_path, tiny()), *with_function(tmp_path), "--steps=5", "--policy.lr=0.001"]
    assert main(words) == 0
    run = tmp_path / "ppo"
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["fault/skipped_total"] == 1
    skipped = [row["step"] for row in rows if row.get("fault/skipped")]
    assert len(skipped) == 1
    kept = [json.loads(line) for line in (run / "faults" / f"step_{skipped[0]:06d}.jsonl").read_text().splitlines()]
    assert kept[0]["where"]
    assert len(kept) == 1 + 4
    assert all(sample["ids"] for sample in kept[1:])
    assert finite_models(run)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(tiny, tmp_path, monkeypatch, value):
    backward = LocalEngine.backward
    calls = 0

    def spoilt(self, loss, **named):
        nonlocal calls
        calls += 1
        backward(self, loss, **named)
        if calls == 3:
            self._pairs[0][1].grad[0] = value

    monkeypatch.setattr(LocalEngine, "backward", spoilt)
    words = [*ppo_words(tmp_path, tiny()), *with_function(tmp_path), "--steps=4"]
    assert main(words) == 0
    assert read_metrics(tmp_path / "ppo")[-1]["fault/skipped_total"] == 1
    assert finite_models(tmp_path / "ppo")


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_a_reward_that_is_not_finite_skips_the_step(tiny, tmp_path, bad):
    body = f"globals()['n'] = globals().get('n', 0) + 1; return [float('{bad}') if n == 3 else 1.0 for r in responses]"
    assert main([*ppo_words(tmp_path, tiny()), *with_function(tmp_path, body), "--steps=4"]) == 0
    rows = read_metrics(tmp_path / "ppo")
    assert [row.get("fault/skipped", 0.0) for row in rows] == [0.0, 1.0, 0.0, 0.0]
    assert "policy/loss" not in rows[1]
    assert finite_models(tmp_path / "ppo")


def test_too_many_in_a_row_end_the_run_with_a_diagnosis(tiny, tmp_path, capsys):
    body = "globals()['n'] = globals().get('n', 0) + 1; return [float('nan') if n > 3 else 1.0 for r in responses]"
    words = [*ppo_words(tmp_path, tiny()), *with_function(tmp_path, body), "--steps=20", "--run.max_faults_in_a_row=2"]
    assert main(words) == 1
    said = capsys.readouterr().err
    for part in ("2 steps in a row", "the reward 'reward'", "Mend the reward", "faults/", "tandem ppo --resume"):
        assert part in said
    assert "Traceback" not in said
    assert len(read_metrics(tmp_path / "ppo")) == 3
    assert list((tmp_path / "ppo" / "checkpoints").glob("step_000003"))


def test_a_held_out_evaluation_that_meets_one_is_left_out(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ScalarModel, "values", bad_at(ScalarModel.values, 1, nan))
    words = [*ppo_words(tmp_path, tiny()), *with_function(tmp_path)]
    assert main([*words, f"--data.eval_prompts={tmp_path / 'prompts.jsonl'}"]) == 0
    assert "is left out" in capsys.readouterr().out
    summary = json.loads((tmp_path / "ppo" / "summary.json").read_text())
    assert summary["heldout"]["before"] == {}
    assert summary["heldout"]["after"]


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_training_from_data_skips_them_too(tiny, tmp_path, monkeypatch, stage):
    if stage == "sft":
        rows = [{"prompt": "the sea", "completion": " was quiet"}] * 24
        words = [f"--data.train={write(tmp_path / 's.jsonl', rows)}", "--sequences_per_minibatch=4"]
        spoil = bad_at(algo.masked_sum, 5, nan)
        monkeypatch.setattr(algo, "masked_sum", spoil)
    else:
        words = [f"--data.train={pair_file(tmp_path)}", "--pairs_per_minibatch=4"]
        monkeypatch.setattr(algo, "preference_loss", bad_at(algo.preference_loss, 5, infinite))
    run = tmp_path / "run"
    assert main([stage, f"--model={tiny()}", *words, f"--run.directory={run}"]) == 0
    rows = read_metrics(run)
    assert sum(row.get("fault/skipped", 0.0) for row in rows) == 1
    assert all(math.isfinite(row.get("train/loss", 0.0)) for row in rows)
    assert len(list((run / "faults").glob("*.jsonl"))) == 1
    assert finite_models(run)
