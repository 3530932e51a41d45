"""Several processes give what one gives: losses, metrics, weights; and they end as one."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from conftest import ARCHITECTURES
from in_processes import run_in_processes
from sharded_memory import save_llama
from tandem.cli import main
from tandem.run.checkpoints import damage
from tandem.run.folder import read_metrics
from test_commands import EXACT, WORDS, pair_file, ppo_words, prompt_file, refused, with_function, write
from test_resume import self_ending_reward

TOLERANCE = 1e-5
# Rounded to 8 bits, in another order. In five steps weights move no further than this, so what it holds are losses and
# the gradient's norm.
BFLOAT16 = 1e-2
SMALL = "--compute.tokens_per_microbatch=40"
NOT_COMPARED = ("time/", "throughput/", "memory/", "cluster/")


def together(words: list[str]) -> int:
    return main([*words, "--processes=2"])


def metrics_of(run: Path) -> list[dict[str, float]]:
    """Where policy and reference are one still, rounding alone says which answer DPO puts ahead."""
    rows = [
        {name: value for name, value in row.items() if not name.startswith(NOT_COMPARED)} for row in read_metrics(run)
    ]
    for row in rows:
        if abs(row.get("train/margin", 1.0)) < TOLERANCE:
            del row["train/accuracy"]
    return rows


def assert_same(one: Path, other: Path, tolerance: float = TOLERANCE) -> None:
    """Metrics and weights of two runs, relative where they are larger than 1."""
    rows, others = metrics_of(one), metrics_of(other)
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, by_other in zip(rows, others, strict=True):
        for name, value in row.items():
            found = by_other[name]
            same = (
                value is found
                if value is None or found is None
                else math.isclose(value, found, rel_tol=tolerance, abs_tol=tolerance)
            )
            assert same, (row["step"], name, value, found)
    models = sorted(file.relative_to(one) for file in one.glob("*model/**/*.safetensors"))
    assert models
    for file in models:
        weights, by_other = load_file(one / file), load_file(other / file)
        assert weights.keys() == by_other.keys()
        for name, tensor in weights.items():
            assert (tensor - by_other[name]).abs().max() <= tolerance, (file, name)


def data_words(tmp_path: Path, stage: str, model: Path) -> list[str]:
    if stage == "sft":
        rows = [{"text": f"the {WORDS[n % 6]} was {'very ' * (n % 5)}good"} for n in range(22)]
        words = [f"--data.train={write(tmp_path / 'texts.jsonl', rows)}", "--sequences_per_minibatch=5"]
    else:
        words = [f"--data.train={pair_file(tmp_path)}", "--pairs_per_minibatch=5"]
    return [stage, f"--model={model}", *words, "--eval_every=2", "--optimizer.lr=0.001", EXACT]


def joint_words(tmp_path: Path, model: Path, options: list[str]) -> list[str]:
    words = [*ppo_words(tmp_path, model, *with_function(tmp_path)), "--compute.tokens_per_microbatch=20"]
    words += [f"--data.eval_prompts={prompt_file(tmp_path)}", "--policy.lr=0.001", "--value.lr=0.001", EXACT]
    return [*words, *options]


SHARING = {
    "separate": ["--value.normalize=true", "--policy.epochs=2"],
    "adapters": ["--sharing.mode=adapters", "--adapters.rank=4"],
    "head": ["--sharing.mode=head"],
}


STREAMED = ["--data.streaming=true", "--data.buffer_rows=8", "--data.max_tokens=64", "--steps=4"]
BY_LAYER = {"head": ["--rollout.gather=layer"]}
"""Settings that only several processes have, by the run that they are tried in."""
ONLY_IN_TWO = {"replicated": ("sft", ["--parallel.replicate=2"])}
"""Runs that only several processes can make, by the run of one process that they must equal."""


def changed(model: Path, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of a model with other tensors in its file."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def readable_whole_only(tied: Path, tmp_path: Path) -> list[Path]:
    """Models that cannot be read in parts: pickled, with weights of other names or twice there, or converted."""
    pickled = shutil.copytree(tied, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()

    def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    def with_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    unprefixed = changed(tied, tmp_path / "unprefixed", without_prefix)
    return [pickled, unprefixed, changed(tied, tmp_path / "twice", with_head), experts(tmp_path / "experts")]


def experts(folder: Path) -> Path:
    """A mixture of experts, which transformers keeps in one tensor and saves in one for each."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_local_experts": 2}
    config = MixtralConfig(vocab_size=300, num_attention_heads=2, num_key_value_heads=2, eos_token_id=1, **shape)
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def checks_in_processes(tiny: Callable[[str], Path], tmp_path: Path) -> list[list[str]]:
    models = {name: tiny(name) for name in ARCHITECTURES}
    in_files, large = tmp_path / "in_files", tmp_path / "large"
    AutoModelForCausalLM.from_pretrained(models["qwen2"]).save_pretrained(in_files, max_shard_size="50KB")
    assert len(list(in_files.glob("model-*.safetensors"))) > 1
    save_llama(large, 512, 4)

    def with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.layers.1.mlp.up_proj.weight"][-1] = float("nan")
        return tensors

    return [
        ["check", name, *(str(path) for path in paths)]
        for name, paths in {
            "parts_are_those_of_the_whole": [*models.values(), in_files],
            "others_are_read_whole": readable_whole_only(models["qwen2"], tmp_path),
            "all_refuse_what_one_cannot_use": [changed(models["llama"], tmp_path / "nan", with_nan)],
            "loading_needs_its_part_only": [models["llama"], large],
            "one_weight_is_gathered_at_a_time": [models["qwen2"], tmp_path / "saved"],
            "sampling_by_layer_is_sampling_from_the_whole": [models["qwen2"]],
        }.items()
    ]


def into(folder: Path, words: list[str]) -> list[str]:
    return [*words, f"--run.directory={folder}"]


def test_two_processes_are_as_one(tiny, tmp_path):
    commands = {stage: [*data_words(tmp_path, stage, tiny()), SMALL] for stage in ("sft", "reward", "dpo")}
    commands |= {name: joint_words(tmp_path, tiny(), options) for name, options in SHARING.items()}
    in_one, in_two = tmp_path / "one", tmp_path / "two"
    for name, words in commands.items():
        assert main(into(in_one / name, words)) == 0
    all_in_two = [into(in_two / name, [*words, *BY_LAYER.get(name, [])]) for name, words in commands.items()]
    all_in_two += [into(in_two / name, [*commands[like], *options]) for name, (like, options) in ONLY_IN_TWO.items()]
    # In the same processes: to start them is what takes time.
    all_in_two += checks_in_processes(tiny, tmp_path)
    assert run_in_processes(all_in_two, tmp_path / "processes") == [0] * len(all_in_two)
    for name in commands:
        assert_same(in_one / name, in_two / name)
    for name, (like, _) in ONLY_IN_TWO.items():
        assert_same(in_one / like, in_two / name)
    for name in SHARING:
        again = tmp_path / "again" / name
        assert main(into(again, [*commands[name], "--parallel.activation_checkpointing=true"])) == 0
        assert_same(in_one / name, again)


@pytest.mark.long
def test_two_processes_are_as_one_in_other_ways_too(tiny, tmp_path):
    """Sampling ahead, data that is streamed, half precision."""
    sft, dpo = ([*data_words(tmp_path, stage, tiny()), SMALL] for stage in ("sft", "dpo"))
    commands = {
        "ahead": joint_words(tmp_path, tiny(), [*SHARING["adapters"], "--rollout.staleness=1"]),
        "streamed sft": [*sft, *STREAMED],
        "streamed dpo": [*dpo, *STREAMED],
        "bfloat16": [*sft, "--compute.precision=bfloat16"],
    }
    in_one, in_two = tmp_path / "one", tmp_path / "two"
    for name, words in commands.items():
        assert main(into(in_one / name, words)) == 0
    all_in_two = [into(in_two / name, words) for name, words in commands.items()]
    assert run_in_processes(all_in_two, tmp_path / "processes") == [0] * len(all_in_two)
    for name in commands:
        assert_same(in_one / name, in_two / name, BFLOAT16 if name == "bfloat16" else TOLERANCE)


def test_more_processes_than_rows_are_refused(tiny, tmp_path, capsys):
    words = [*data_words(tmp_path, "sft", tiny()), f"--run.directory={tmp_path / 'run'}"]
    capsys.readouterr()
    assert "at most 5 processes" in refused(capsys, [*words, "--processes=6"])


def test_a_cluster_starts_its_processes_itself(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = joint_words(tmp_path, tiny(), ["--cluster=ray"])
    assert "give the command once, without torchrun" in refused(capsys, words)


def kept_steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def ended_by_ctrl_c(tmp_path: Path, model: Path) -> list[str]:
    """A run of which one process is told to end while responses are scored."""
    function, _ = self_ending_reward(tmp_path, call=4, name="SIGINT")
    words = ppo_words(tmp_path, model, f"--rewards.0.function={function}", "--value.start=policy", "--steps=9")
    return [*words, f"--run.directory={tmp_path / 'ended'}"]


def assert_all_is_saved(run: Path) -> None:
    newest = kept_steps(run)[-1]
    assert damage(run / "checkpoints" / newest) is None
    assert newest == f"step_{len(read_metrics(run)):06d}"


@pytest.mark.long
def test_a_run_goes_on_in_another_number_of_processes(tiny, tmp_path):
    def words(name: str, steps: int) -> list[str]:
        options = [*SHARING["separate"], f"--steps={steps}", "--checkpoints.every_steps=2"]
        return [*joint_words(tmp_path, tiny(), options), f"--run.directory={tmp_path / name}"]

    def onward(name: str) -> list[str]:
        return ["ppo", "--resume", str(tmp_path / name), "--steps=4"]

    assert main(words("whole", 4)) == 0
    assert main(words("one_then_two", 2)) == 0
    in_two = [words("two_then_one", 2), onward("one_then_two"), ended_by_ctrl_c(tmp_path, tiny())]
    assert run_in_processes(in_two, tmp_path / "processes") == [0, 0, 130]
    assert_all_is_saved(tmp_path / "ended")
    assert (tmp_path / "two_then_one" / "checkpoints" / "step_000002" / "tensors" / ".metadata").exists()
    assert main([*onward("two_then_one"), "--parallel.processes=1"]) == 0
    for name in ("one_then_two", "two_then_one"):
        assert_same(tmp_path / "whole", tmp_path / name)
        assert "step_000004" in kept_steps(tmp_path / name)


def test_what_a_process_refuses_is_one_message(tiny, tmp_path, capfd):
    words = data_words(tmp_path, "sft", tiny())
    words[1] = f"--model={tmp_path / 'none'}"
    assert together([*words, f"--run.directory={tmp_path / 'run'}"]) == 2
    said = capfd.readouterr().err
    assert said.count("tandem: ") == 1
    assert "there is no such folder" in said
    assert "Traceback" not in said


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_sigterm_to_the_launcher_ends_all_with_a_checkpoint(tiny, tmp_path):
    run = tmp_path / "run"
    words = [*data_words(tmp_path, "sft", tiny()), "--epochs=10000", "--processes=2", f"--run.directory={run}"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "tandem", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.05)
    workers = children_of(launcher.pid)
    assert len(workers) == 2
    launcher.send_signal(signal.SIGTERM)
    said = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 130, said
    assert "Traceback" not in said
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert_all_is_saved(run)


ON_LOOPBACK = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
"""Before a command: a network of its own with nothing but loopback, since torchrun's store listens everywhere."""


def has_network_of_its_own() -> bool:
    try:
        return subprocess.run([*ON_LOOPBACK, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.long
def test_torchrun_gives_what_one_process_gives(tiny, tmp_path):
    if not has_network_of_its_own():
        pytest.skip("no process can be given a network of its own here")
    words = data_words(tmp_path, "sft", tiny())
    assert main([*words, f"--run.directory={tmp_path / 'one'}"]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tandem"]
    done = subprocess.run(
        [*ON_LOOPBACK, *torchrun, *words, f"--run.directory={tmp_path / 'two'}"],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert_same(tmp_path / "one", tmp_path / "two")
