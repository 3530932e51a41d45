"""vLLM workers of a Ray cluster that sample for a joint run: `make test-vllm` runs these where both are installed."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from generators import needs_vllm
from ray_runs import kill_when_at, loopback_cluster, lost, words_of
from tandem.cli import main
from tandem.run.folder import read_metrics
from test_processes import assert_same

pytestmark = [
    needs_vllm,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: make test-vllm"),
]
SIZE, TOLERANCE = 4, 1e-4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[str]:
    with loopback_cluster(tmp_path_factory.mktemp("ray")) as address:
        yield address


def vllm_words(folder: Path, model: Path) -> list[str]:
    """The words of a run of three steps of eight samples."""
    words = ["ppo", *words_of(folder, model, "run"), "--steps=3", "--compute.precision=float32"]
    words += ["--rollout.generator=vllm", "--rollout.vllm.kv_cache_gib=0.1", f"--rollout.sequences_per_batch={SIZE}"]
    return words


def over_ray(cluster: str) -> list[str]:
    """One vLLM worker, which has two tasks a step."""
    return ["--cluster=ray", f"--cluster.address={cluster}", f"--cluster.samples_per_task={SIZE}"]


@pytest.fixture(scope="module")
def in_one_process(tiny, tmp_path_factory) -> Path:
    """The run as it is with vLLM beside the trainer, from a command that ends without a word of what it tears down."""
    folder = tmp_path_factory.mktemp("in_one_process")
    words = vllm_words(folder, tiny("llama-wide"))
    done = subprocess.run([sys.executable, "-m", "tandem", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return folder / "run"


def mismatches(run: Path) -> list[float]:
    """The largest of each step between a worker's log-probabilities and the trainer's, in nats."""
    return [row["rollout/logprob_mismatch_max"] for row in read_metrics(run)]


def test_a_killed_worker_costs_its_task_alone_and_every_step_has_its_weights(cluster, tiny, tmp_path, in_one_process):
    done: list[int] = []
    watching = kill_when_at("ray::GeneratorWorker.answer", signal.SIGKILL, done)
    assert main([*vllm_words(tmp_path, tiny("llama-wide")), *over_ray(cluster)]) == 0
    watching.join()
    assert done
    run = tmp_path / "run"
    (event,) = lost(run, "worker lost")
    assert event["pool"] == "generator"
    assert event["lost_samples"] <= SIZE
    assert_same(run, in_one_process)
    rows = read_metrics(run)
    assert [row["rollout/staleness"] for row in rows] == [0, 0, 0]
    assert all(row["time/weight_sync"] > 0 for row in rows)
    assert max(mismatches(run)) < TOLERANCE


def test_a_worker_samples_one_update_behind_two_trainers(cluster, tiny, tmp_path, in_one_process):
    """Its first step is that of one process; from then on what the update changed shows in the log-probabilities."""
    words = [*vllm_words(tmp_path, tiny("llama-wide")), *over_ray(cluster)]
    assert main([*words, "--processes=2", "--rollout.staleness=1"]) == 0
    run = tmp_path / "run"
    assert lost(run, "worker lost") == []
    rows = read_metrics(run)
    assert [row["rollout/staleness"] for row in rows] == [0, 1, 1]
    first, *behind = mismatches(run)
    assert first < TOLERANCE < min(behind)
    assert rows[0]["objective/score"] == read_metrics(in_one_process)[0]["objective/score"]
