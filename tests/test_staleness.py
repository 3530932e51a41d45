"""One step off-policy: what is sampled while a step trains, by which weights, and what becomes of it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from tandem.cli import main
from tandem.run.folder import read_metrics
from tandem.stages.sampling import meanwhile
from test_commands import EXACT, ppo_words, refused

REWARD = "def reward(prompts, responses, rows):\n    return [float(r.count('a')) for r in responses]\n"


def run_of(tmp_path: Path, model: Path, *more: str) -> Path:
    function = tmp_path / "counts.py"
    function.write_text(REWARD)
    words = ppo_words(tmp_path, model, f"--rewards.0.function={function}:reward", "--value.start=policy", "--steps=5")
    words.append(EXACT)
    folder = tmp_path / "-".join(["run", *more]).replace("/", "").replace("--", "")
    assert main([*words, "--policy.lr=0.003", f"--run.directory={folder}", *more]) == 0
    return folder


def test_weights_that_sample_are_one_update_behind_and_never_two(tiny, tmp_path):
    rows = read_metrics(run_of(tmp_path, tiny(), "--rollout.staleness=1"))
    assert [row["rollout/staleness"] for row in rows] == [0, 1, 1, 1, 1]
    assert rows[0]["rollout/logprob_mismatch_max"] < 1e-4
    assert all(row["rollout/logprob_mismatch"] > 1e-4 for row in rows[1:])
    assert all(row["time/weight_sync"] > 0 for row in rows[:-1])
    fresh = read_metrics(run_of(tmp_path, tiny()))
    assert [row["rollout/staleness"] for row in fresh] == [0] * 5


def test_stale_samples_are_those_of_the_policy_one_update_before(tiny, tmp_path):
    """The second step's responses are what the policy says that no update has reached."""
    sampled = {}
    for staleness, lr in ((1, 0.003), (0, 1e-12)):
        more = [f"--rollout.staleness={staleness}", f"--policy.lr={lr}", "--rollout.recompute_logprobs=always"]
        folder = run_of(tmp_path, tiny(), *more)
        lines = (folder / "rollouts" / "step_000002.jsonl").read_text().splitlines()
        sampled[staleness] = [json.loads(line)["response"] for line in lines]
    assert sampled[0] == sampled[1]


def test_weights_correct_for_it_unless_that_is_turned_off(tiny, tmp_path):
    corrected = read_metrics(run_of(tmp_path, tiny(), "--rollout.staleness=1"))
    off = read_metrics(run_of(tmp_path, tiny(), "--rollout.staleness=1", '--policy.importance_cap="off"'))
    assert corrected[2]["rollout/importance_weight"] != 1.0
    assert off[2]["rollout/importance_weight"] == 1.0


def test_a_lag_of_more_than_one_is_refused(tiny, tmp_path, capsys):
    words = ppo_words(tmp_path, tiny(), "--rewards.0.function=none:none", "--value.start=policy")
    capsys.readouterr()
    assert "rollout.staleness = 2" in refused(capsys, [*words, "--rollout.staleness=2"])


def test_what_goes_on_meanwhile_is_ended_with_the_block():
    stop, ended = threading.Event(), threading.Event()

    def work() -> None:
        stop.wait(30)
        ended.set()

    began = time.monotonic()
    with pytest.raises(KeyError), meanwhile(work, give_up=stop.set):
        raise KeyError
    assert ended.is_set()
    assert time.monotonic() - began < 10


def test_what_fails_meanwhile_fails_the_block():
    with pytest.raises(ZeroDivisionError), meanwhile(lambda: 1 // 0, give_up=lambda: None) as found:
        found.result()
