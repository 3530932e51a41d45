"""vLLM as the generator of a joint run: `make test-vllm` runs these where it is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from faults.same import differences
from generators import engine_for, make, needs_vllm
from tandem.cli import main
from tandem.config import AdapterSection
from tandem.errors import InputError
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.loading import load_causal
from tandem.models.trunk import Trunk
from tandem.rollout import VllmGenerator
from tandem.run.folder import read_metrics
from tandem.stages.sampling import send_weights
from test_commands import ppo_words, prompt_file, refused
from test_generator import PROMPTS, recomputed
from test_processes import assert_same
from test_resume import self_ending_reward


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_is_said_how_to_get_it(tiny, tmp_path, capsys):
    words = ppo_words(tmp_path, tiny(), "--rewards.0.function=math:fsum", "--value.start=policy")
    capsys.readouterr()
    said = refused(capsys, [*words, "--rollout.generator=vllm"])
    assert "make .venv-vllm/ready" in said


def test_its_settings_without_it_are_refused(tiny, tmp_path, capsys):
    words = ppo_words(tmp_path, tiny(), "--rewards.0.function=none:none", "--value.start=policy")
    capsys.readouterr()
    assert "rollout.vllm has no effect here" in refused(capsys, [*words, "--rollout.vllm.kv_cache_gib=2.0"])


@needs_vllm
def test_an_adapter_is_sent_over_a_base_that_stays(tiny):
    trunk = Trunk(load_causal(str(tiny("llama-wide")), "model", torch.float32, torch.device("cpu")))
    parameters = trunk.add_adapter("policy", AdapterSection(rank=4))
    policy = CausalPolicy(trunk, FULL_DISTRIBUTION, "policy")
    engine = engine_for(policy, limit=6, batch=4, rank=4)
    engine.load_weights(trunk.merged_weights(None))
    generator = VllmGenerator(engine, lambda *_: "", set(), torch.Generator().manual_seed(0))
    for version in (1, 2):
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.2)
        send_weights(policy, generator, version)
        rollouts = generator.generate(PROMPTS)
        found = recomputed(policy, rollouts)
        for row, rollout in enumerate(rollouts):
            assert found[row, : len(rollout.ids)].tolist() == pytest.approx(rollout.logprobs, abs=1e-4)
    assert generator.version == 2


@needs_vllm
def test_a_model_that_it_cannot_serve_is_refused(tiny):
    model = load_causal(str(tiny()), "model", torch.float32, torch.device("cpu"))
    with pytest.raises(InputError, match=r'set rollout.generator = "torch"'):
        make("vllm", CausalPolicy(Trunk(model), FULL_DISTRIBUTION))


@needs_vllm
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_logs_its_mismatch_and_goes_on_exactly(tiny, tmp_path, staleness):
    function, marker = self_ending_reward(tmp_path, 4)

    def words(folder: str) -> list[str]:
        words = ppo_words(tmp_path, tiny("llama-wide"), f"--rewards.0.function={function}", "--value.start=policy")
        words += [f"--data.eval_prompts={prompt_file(tmp_path)}", "--eval_every=2", "--steps=5", "--policy.lr=0.001"]
        words += ["--rollout.generator=vllm", f"--rollout.staleness={staleness}", "--rollout.vllm.kv_cache_gib=0.1"]
        return [*words, "--compute.precision=float32", f"--run.directory={tmp_path / folder}"]

    assert main(words("cut")) == 130
    assert marker.exists()
    assert main(["ppo", "--resume", str(tmp_path / "cut")]) == 0
    assert main(words("whole")) == 0
    assert differences(tmp_path / "cut", tmp_path / "whole") == []
    rows = read_metrics(tmp_path / "whole")
    assert all("rollout/logprob_mismatch" in row and "rollout/importance_weight" in row for row in rows)
    assert [row["rollout/staleness"] for row in rows] == [0, *[staleness] * 4]
    assert max(row["rollout/logprob_mismatch_max"] for row in (rows[:1] if staleness else rows)) < 1e-4
    assert all(row["time/weight_sync"] > 0 for row in rows[:-1])


IN_PARTS = 1e-4
"""An engine in parts adds up in another order, and Adam's first steps are as long for a small gradient as for a large
one."""
IN_PROCESSES = {
    "an engine each": [],
    "one update behind": ["--rollout.staleness=1"],
    "an engine of both": ["--rollout.vllm.tensor_parallel=2"],
    "adapters over a base of both": [
        *("--sharing.mode=adapters", "--adapters.rank=4", "--rollout.vllm.lora=adapter"),
        "--rollout.vllm.tensor_parallel=2",
    ],
}


@needs_vllm
@pytest.mark.parametrize("options", IN_PROCESSES.values(), ids=IN_PROCESSES)
def test_two_processes_are_as_one(tiny, tmp_path, options):
    function, marker = self_ending_reward(tmp_path, 1)
    marker.touch()
    words = ppo_words(tmp_path, tiny("llama-wide"), f"--rewards.0.function={function}", "--value.start=policy")
    words += [f"--data.eval_prompts={prompt_file(tmp_path)}", "--eval_every=2", "--steps=3", "--policy.lr=0.001"]
    words += ["--rollout.generator=vllm", "--rollout.vllm.kv_cache_gib=0.1", "--compute.precision=float32", *options]
    in_one = [word for word in words if "tensor_parallel" not in word]
    assert main([*in_one, f"--run.directory={tmp_path / 'one'}"]) == 0
    command = [sys.executable, "-m", "tandem", *words, "--processes=2", f"--run.directory={tmp_path / 'two'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert_same(tmp_path / "one", tmp_path / "two", IN_PARTS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--processes=2", "--rollout.vllm.tensor_parallel=3"], "must divide parallel.processes = 2"),
        (["--cluster=ray", "--rollout.vllm.tensor_parallel=2"], "over a cluster each generator is one process"),
    ],
)
def test_engines_that_cannot_be_shared_are_refused(tiny, tmp_path, capsys, options, said):
    words = ppo_words(tmp_path, tiny(), "--rewards.0.function=none:none", "--value.start=policy")
    capsys.readouterr()
    assert said in refused(capsys, [*words, "--rollout.generator=vllm", *options])


@needs_vllm
def test_policies_that_are_adapters_train_with_either_way_of_sending(tiny, tmp_path):
    function, marker = self_ending_reward(tmp_path, 1)
    marker.touch()
    for way in ("adapter", "merge"):
        words = ppo_words(tmp_path, tiny("llama-wide"), f"--rewards.0.function={function}", "--value.start=policy")
        words += ["--sharing.mode=adapters", "--adapters.rank=4", "--steps=3", "--policy.lr=0.003"]
        words += ["--rollout.generator=vllm", f"--rollout.vllm.lora={way}", "--rollout.vllm.kv_cache_gib=0.1"]
        assert main([*words, "--compute.precision=float32", f"--run.directory={tmp_path / way}"]) == 0
        assert max(row["rollout/logprob_mismatch_max"] for row in read_metrics(tmp_path / way)) < 1e-4
