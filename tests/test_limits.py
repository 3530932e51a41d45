"""Memory and disk space that do not suffice: which message says so, and what it names."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tandem.config import PpoConfig, RewardConfig, SftConfig
from tandem.errors import InputError, RunError, is_out_of_memory
from tandem.recipe import load_config
from tandem.run.memory import memory_limits, sampling_knobs, steps_in, training_knobs
from tandem.run.space import check_space, readable

PPO = load_config(PpoConfig, None, ["--policy.model=m", "--data.prompts=p.jsonl", "--rewards.0.model=r"])
SFT = load_config(SftConfig, None, ["--model=m", "--data.train=t.jsonl"])
REWARD = load_config(RewardConfig, None, ["--model=m", "--data.train=t.jsonl", "--adapters.rank=4"])
ABSURD = 2**60


def allocate_too_much() -> torch.Tensor:
    return torch.empty(ABSURD, dtype=torch.uint8)


def test_the_allocators_refusal_names_phase_size_and_knobs():
    with pytest.raises(InputError) as refusal, memory_limits("the update", 1, training_knobs(PPO)):
        allocate_too_much()
    said = str(refusal.value)
    assert said.startswith("memory ran out in the update of step 1, which asked for 1048576.0 TiB more.")
    assert "compute.tokens_per_microbatch = 4096 (lower it)" in said
    assert 'sharing.mode = "separate" (set "adapters"' in said
    assert 'compute.precision = "auto" (set "bfloat16")' in said


def test_after_the_first_step_the_run_has_failed():
    with pytest.raises(RunError, match="the update of step 2"), memory_limits("the update", 2, training_knobs(PPO)):
        allocate_too_much()


@pytest.mark.parametrize(("done", "kind"), [(0, InputError), (3, RunError)])
def test_around_the_steps_what_is_done_decides(done: int, kind: type[Exception]):
    with pytest.raises(kind, match=r"in tandem sft, which"), memory_limits("tandem sft", lambda: done, {}):
        allocate_too_much()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:20],
)
def test_every_allocator_is_understood(error: Exception):
    with pytest.raises(InputError, match="memory ran out in the rollout of step 1"):  # noqa: SIM117
        with memory_limits("the rollout", 1, sampling_knobs(PPO)):
            raise error


def test_the_size_that_a_gpu_was_asked_for_is_told():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity")
    with pytest.raises(InputError, match=r"which asked for 2\.50 GiB more"), memory_limits("the update", 1, {}):
        raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="size mismatch"), memory_limits("the update", 1, {}):
        raise RuntimeError("size mismatch, got 3")
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_knobs_are_those_that_would_help():
    assert list(sampling_knobs(PPO))[:2] == ["rollout.sequences_per_batch = 64", "rollout.max_new_tokens = 128"]
    assert "adapters unset" in training_knobs(SFT)
    assert "adapters unset" not in training_knobs(REWARD)
    assert "adapters.rank = 4" in training_knobs(REWARD)
    shared = PPO.model_copy(update={"sharing": PPO.sharing.model_copy(update={"mode": "adapters"})})
    assert not any(knob.startswith("sharing.mode") for knob in training_knobs(shared))


def test_steps_in_a_folder_are_counted(tmp_path: Path):
    assert steps_in(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert steps_in(tmp_path) == 2


LIMITED = """
import resource, sys, threading
import torch
from tandem.cli import main, quiet_libraries
import tandem.stages.sft

quiet_libraries()
taken = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[1]), taken + int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_stage_that_does_not_fit_says_what_would_help(tiny, tmp_path: Path):
    (tmp_path / "t.jsonl").write_text('{"text": "%s"}\n' % ("the sea " * 60) * 4000)
    words = ["sft", f"--model={tiny()}", f"--data.train={tmp_path / 't.jsonl'}", "--data.eval_fraction=0"]
    words += ["--compute.tokens_per_microbatch=2000000", "--sequences_per_minibatch=4000", "--compute.device=cpu"]
    words += [f"--run.directory={tmp_path / 'run'}", "--compute.precision=float32"]
    command = [sys.executable, "-c", LIMITED, str(500 * 2**20), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("tandem: memory ran out in ")
    assert "compute.tokens_per_microbatch = 2000000 (lower it)" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_disk_without_room_is_refused_before_the_run(tmp_path: Path):
    folder = tmp_path / "not" / "yet" / "there"
    check_space(folder, 1, "a checkpoint")
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(InputError) as refusal:
        check_space(folder, 2 * free + 2**50, "two checkpoints and the models")
    said = str(refusal.value)
    assert f"run.directory = '{folder}'" in said
    assert "two checkpoints and the models will take" in said
    assert "free" in said
    assert "make room, or choose a folder on another disk" in said
    assert not folder.parent.exists()


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**51, "2048.0 TiB")],
)
def test_sizes_are_readable(size: int, said: str):
    assert readable(size) == said
