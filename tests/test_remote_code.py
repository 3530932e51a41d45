"""Models that bring Python code of their own: refused, unless they are trusted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem.cli import main

CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "tandem_own"
"""
MODELING = """
from pathlib import Path

from torch import nn
from transformers import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

from .configuration_own import OwnConfig

Path({trace!r}).touch()


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


class OwnForSequenceClassification(LlamaPreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
"""
CLASSES = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    "AutoModelForSequenceClassification": "modeling_own.OwnForSequenceClassification",
}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code is copied before it is imported, and Python remembers from where: each test begins without that memory."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def own_model(tiny, tmp_path: Path) -> Path:
    """The tiny llama under a type and classes of its own; loading its code leaves a file `ran`."""
    folder = tmp_path / "own"
    folder.mkdir()
    for file in tiny().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "tandem_own", "architectures": ["OwnForCausalLM"], "auto_map": CLASSES}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING.format(trace=str(tmp_path / "ran")))
    return folder


def stage_words(stage: str, model: Path, folder: Path) -> list[str]:
    rows = {
        "sft": {"text": "the sea was quiet"},
        "reward": {"prompt": "the sea", "chosen": " was good", "rejected": " was bad"},
        "ppo": {"prompt": "the sea"},
    }[stage]
    (folder / "rows.jsonl").write_text(4 * (json.dumps(rows) + "\n"))
    (folder / "earned.py").write_text("def earned(prompts, responses, rows):\n    return [0.5] * len(responses)\n")
    words = [stage, f"--run.directory={folder / stage}"]
    if stage == "ppo":
        words += [f"--policy.model={model}", f"--data.prompts={folder / 'rows.jsonl'}", "--value.start=policy"]
        return [
            *words,
            f"--rewards.0.function={folder / 'earned.py'}:earned",
            "--steps=1",
            "--rollout.max_new_tokens=4",
        ]
    return [*words, f"--model={model}", f"--data.train={folder / 'rows.jsonl'}", "--data.eval_fraction=0"]


def test_code_that_is_not_trusted_does_not_run(own_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for stage in ("sft", "reward", "ppo"):
        assert main(stage_words(stage, own_model, tmp_path)) == 2
        said = capsys.readouterr().err
        assert "needs Python code that comes with it" in said
        assert "set compute.trust_remote_code = true" in said
    assert main(["generate", str(own_model), "--prompt", "the sea"]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_code_that_is_trusted_trains_and_is_saved_with_the_model(own_model: Path, tmp_path: Path, stage: str):
    assert main([*stage_words(stage, own_model, tmp_path), "--compute.trust_remote_code=true"]) == 0
    saved = tmp_path / stage / "model"
    assert (saved / "modeling_own.py").exists()
    if stage != "reward":
        ids = torch.tensor([[5, 6, 7]])
        model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
        assert type(model).__name__ == "OwnForCausalLM"
        assert model(input_ids=ids).logits.shape == (1, 3, 300)


def test_generate_runs_trusted_code(own_model: Path, capsys: pytest.CaptureFixture[str]):
    words = ["generate", str(own_model), "--prompt", "the sea", "--max-new-tokens", "3", "--trust-remote-code"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("> the sea\n")


def test_code_beside_a_model_that_does_not_need_it_stays_unused(own_model: Path, tmp_path: Path):
    """A model of a type that transformers has is built by transformers, in training and in saving."""
    config = json.loads((own_model / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (own_model / "config.json").write_text(json.dumps(config))
    assert main(stage_words("sft", own_model, tmp_path)) == 0
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "sft" / "model" / "modeling_own.py").exists()


def test_own_code_without_a_classifier_is_refused_before_training(own_model: Path, tmp_path: Path, capsys):
    config = json.loads((own_model / "config.json").read_text())
    del config["auto_map"]["AutoModelForSequenceClassification"]
    # transformers remembers the classes of a configuration that it has met, so this must be another one.
    (own_model / "configuration_own.py").write_text(CONFIGURATION.replace("OwnConfig(", "OwnConfig (  "))
    (own_model / "config.json").write_text(json.dumps(config))
    words = [*stage_words("reward", own_model, tmp_path), "--compute.trust_remote_code=true"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "OwnForCausalLM" in said
    assert "has no sequence classifier of its kind" in said
