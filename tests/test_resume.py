"""A run that was cut short and went on is the run that was never interrupted, to the last bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults.same import differences
from tandem.cli import main
from tandem.run.folder import read_metrics
from test_commands import pair_file, ppo_words, prompt_file, refused, reward_model, write  # noqa: F401

ENDS_ITSELF = """
import os, pathlib, signal
marker = pathlib.Path({marker!r})
calls = 0

def reward(prompts, responses, rows):
    global calls
    calls += 1
    if calls == {call} and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.{signal})
    return [float(len(r)) + n % 3 for n, r in enumerate(responses)]
"""


def self_ending_reward(tmp_path: Path, call: int, name: str = "SIGTERM") -> tuple[str, Path]:
    """A reward function that ends its own run at a call, once; and the marker that stops it from doing so."""
    marker = tmp_path / f"ended_{call}_{name}"
    path = tmp_path / f"ends_at_{call}_{name}.py"
    path.write_text(ENDS_ITSELF.format(marker=str(marker), call=call, signal=name))
    return f"{path}:reward", marker


OPTIONS = {
    "separate": ["--score.normalize=running", "--kl.target=2.0", "--value.adaptive.max_epochs=4"],
    "adapters": ["--sharing.mode=adapters", "--adapters.rank=4", "--rewards.0.center=true", "--value.normalize=true"],
    "head": ["--sharing.mode=head", "--value.warmup.steps=2"],
    "staleness 1": ["--rollout.staleness=1", "--policy.epochs=2", "--rollout.temperature=0.8"],
    "bfloat16": ["--compute.precision=bfloat16", "--rollout.top_k=20", "--policy.epochs=2"],
}


# At which call of its reward each is ended.
CALLS = {"separate": 4, "adapters": 7, "head": 4, "staleness 1": 7, "bfloat16": 7}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_joint_run_goes_on_exactly(tiny, tmp_path, capsys, name):
    options = OPTIONS[name]
    function, marker = self_ending_reward(tmp_path, CALLS[name])

    def words(folder: str) -> list[str]:
        words = [*ppo_words(tmp_path, tiny(), f"--rewards.0.function={function}", "--value.start=policy"), *options]
        words += [f"--data.eval_prompts={prompt_file(tmp_path)}", "--eval_every=2", "--steps=6"]
        return [*words, "--policy.schedule=linear", "--policy.lr=0.001", f"--run.directory={tmp_path / folder}"]

    assert main(words("cut")) == 130
    assert "tandem ppo --resume" in capsys.readouterr().err
    assert marker.exists()
    assert main(["ppo", "--resume", str(tmp_path / "cut")]) == 0
    assert main(words("whole")) == 0
    assert differences(tmp_path / "cut", tmp_path / "whole") == []


def end_at_step(run: Path, step: int, number: int, words: list[str]) -> subprocess.Popen:
    """Start a run and send it a signal once it has written so many rows."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tandem", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= step:
            break
        time.sleep(0.005)
    process.send_signal(number)
    return process


@pytest.mark.parametrize(
    "stage", ["sft", *(pytest.param(stage, marks=pytest.mark.long) for stage in ("reward", "dpo"))]
)
def test_training_from_data_goes_on_exactly(tiny, tmp_path, stage):
    if stage == "sft":
        rows = [{"prompt": f"the sea {n}", "completion": " was quiet"} for n in range(60)]
        words = [f"--data.train={write(tmp_path / 's.jsonl', rows)}", "--sequences_per_minibatch=4"]
    else:
        words = [f"--data.train={pair_file(tmp_path)}", "--pairs_per_minibatch=4", "--adapters.rank=4"]
    words = [stage, f"--model={tiny()}", "--epochs=6", "--optimizer.lr=0.001", "--eval_every=7", *words]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = end_at_step(cut, 9, signal.SIGTERM, [*words, f"--run.directory={cut}"])
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert main([stage, "--resume", str(cut)]) == 0
    assert main([*words, f"--run.directory={whole}"]) == 0
    assert differences(cut, whole) == []


def test_killed_runs_go_on_exactly(tiny, tmp_path):
    """kill -9 at random moments, with a save after every step so that saves are hit too."""
    function, marker = self_ending_reward(tmp_path, 1)
    marker.touch()
    words = [*ppo_words(tmp_path, tiny(), f"--rewards.0.function={function}", "--value.start=policy"), "--steps=40"]
    words += ["--checkpoints.every_steps=1", "--policy.lr=0.001", "--run.trackers=[]"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    moment, start = random.Random(0), [*words, f"--run.directory={cut}"]
    for life in range(3):
        process = end_at_step(cut, 0 if life == 0 else 1, 0, start)
        while process.poll() is None and not list(cut.glob("checkpoints/step_*")):
            time.sleep(0.01)
        time.sleep(moment.uniform(0.0, 0.5))
        process.kill()
        process.communicate()
        start = ["ppo", "--resume", str(cut)]
    assert main(start) == 0
    assert main([*words, f"--run.directory={whole}"]) == 0
    assert differences(cut, whole) == []
    assert [row["step"] for row in read_metrics(cut)] == list(range(1, 41))


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A joint run that was ended after its sixth step, with checkpoints of several steps, and the same run whole."""
    folder = tmp_path_factory.mktemp("made")
    function, _ = self_ending_reward(folder, 8)
    words = [*ppo_words(folder, tiny(), f"--rewards.0.function={function}", "--value.start=policy"), "--steps=8"]
    words += ["--checkpoints.every_steps=1", "--checkpoints.keep=3", "--policy.lr=0.001"]
    assert main(words) == 130
    assert main([*words, f"--run.directory={folder / 'whole'}"]) == 0
    return folder


@pytest.fixture
def cut_run(made, tmp_path):
    """A test's own copy of the run that was ended; the whole one lies beside it."""
    shutil.copytree(made / "whole", tmp_path / "whole")
    return shutil.copytree(made / "ppo", tmp_path / "ppo")


@pytest.mark.parametrize("harm", ["a bit", "cut off", "no tensors", "no manifest", "state"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(cut_run, tmp_path, capsys, harm):
    newest = sorted((cut_run / "checkpoints").glob("step_*"))[-1]
    tensors = newest / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    if harm == "a bit":
        content[len(content) // 2] ^= 1
        tensors.write_bytes(content)
    elif harm == "cut off":
        tensors.write_bytes(content[:-100])
    elif harm == "no tensors":
        tensors.unlink()
    elif harm == "no manifest":
        (newest / "manifest.json").write_text("{")
    else:
        (newest / "state.json").write_text((newest / "state.json").read_text().replace("1", "2", 1))
    assert main(["ppo", "--resume", str(cut_run)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{newest.name} is damaged" in said
    assert (newest.parent / f"damaged_{newest.name}").is_dir()
    assert differences(cut_run, tmp_path / "whole") == []


def test_all_checkpoints_damaged_begins_again(cut_run, tmp_path, capsys):
    for path in (cut_run / "checkpoints").glob("step_*"):
        (path / "tensors.safetensors").write_bytes(b"")
    assert main(["ppo", "--resume", str(cut_run)]) == 0
    assert "begins again" in capsys.readouterr().out
    assert differences(cut_run, tmp_path / "whole") == []


def test_what_cannot_be_resumed_is_refused(cut_run, made, tiny, tmp_path, capsys):
    run = str(cut_run)
    assert "--resume needs the folder" in refused(capsys, ["ppo", "--resume"])
    assert "holds no run" in refused(capsys, ["ppo", "--resume", str(tmp_path)])
    assert "tandem ppo --resume" in refused(capsys, ["sft", "--resume", run])
    assert "was not understood" in refused(capsys, ["ppo", "recipe.toml", "--resume", run])
    assert "already holds a run; go on with it by --resume" in refused(
        capsys, [*ppo_words(tmp_path, tiny()), "--rewards.0.function=none:none", "--value.start=policy"]
    )
    assert "go on with the recipe" in refused(capsys, ["ppo", "--resume", run, "--sharing.mode=adapters"])
    assert "6 steps are done" in refused(capsys, ["ppo", "--resume", run, "--steps=3"])
    assert 'mode = "separate"' in (cut_run / "config.toml").read_text()
    prompts = made / "prompts.jsonl"
    before = prompts.read_text()
    prompts.write_text(before.replace("the", "a", 1))
    assert "data.prompts" in refused(capsys, ["ppo", "--resume", run])
    prompts.write_text(before)
    (cut_run / "config.toml").write_text("steps = ")
    assert "not valid TOML" in refused(capsys, ["ppo", "--resume", run])


def test_a_finished_run_says_so_and_can_be_given_more_steps(cut_run, capsys):
    assert main(["ppo", "--resume", str(cut_run)]) == 0
    assert main(["ppo", "--resume", str(cut_run)]) == 0
    assert "finished" in capsys.readouterr().out
    assert main(["ppo", "--resume", str(cut_run), "--steps=10"]) == 0
    assert "changed: steps 8 -> 10" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(cut_run)] == list(range(1, 11))


def test_checkpoints_are_kept_by_count_and_by_metric(tiny, tmp_path):
    function, marker = self_ending_reward(tmp_path, 1)
    marker.touch()
    words = [*ppo_words(tmp_path, tiny(), f"--rewards.0.function={function}", "--value.start=policy"), "--steps=9"]
    words += [f"--data.eval_prompts={prompt_file(tmp_path)}", "--eval_every=1", "--policy.lr=0.003"]
    words += ["--checkpoints.keep=1", "--checkpoints.best_metric=heldout/objective/score"]
    assert main([*words, "--checkpoints.best_is=lowest"]) == 0
    scores = {row["step"]: row.get("heldout/objective/score") for row in read_metrics(tmp_path / "ppo")}
    measured = {step: score for step, score in scores.items() if score is not None}
    best = min(measured, key=measured.get)
    kept = {path.name for path in (tmp_path / "ppo" / "checkpoints").iterdir()}
    assert kept == {f"step_{best:06d}", "step_000009"}


def test_a_best_metric_that_is_none_is_refused(tiny, tmp_path, capsys):
    function, marker = self_ending_reward(tmp_path, 1)
    marker.touch()
    words = [*ppo_words(tmp_path, tiny(), f"--rewards.0.function={function}", "--value.start=policy")]
    assert "eval_every" in refused(capsys, [*words, "--checkpoints.best_metric=heldout/objective/score"])
    said = refused(capsys, [*words, "--checkpoints.best_metric=objective/scor"])
    assert "is no metric of this run" in said
    assert "objective/score" in said
    assert "best_is has no effect" in refused(capsys, [*words, "--checkpoints.best_is=lowest"])


def test_two_runs_in_one_folder_are_refused_and_a_stale_lock_is_not(cut_run, capsys):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time, pathlib\nfrom tandem.run.lock import claimed\n"
            "with claimed(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)",
            str(cut_run),
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    said = refused(capsys, ["ppo", "--resume", str(cut_run)])
    assert f"process {holder.pid}" in said
    holder.kill()
    holder.wait()
    assert (cut_run / ".lock").exists()
    assert main(["ppo", "--resume", str(cut_run)]) == 0


def test_a_refused_run_leaves_no_folder(tiny, tmp_path, capsys):
    words = ppo_words(tmp_path, tiny(), "--rewards.0.function=none:none", "--value.start=policy")
    refused(capsys, [*words, f"--run.directory={tmp_path / 'deep' / 'run'}"])
    assert not (tmp_path / "deep").exists()


def test_a_disk_without_room_loses_nothing(cut_run, tmp_path):
    """The disk takes no file beyond a limit: the run ends with one message, and goes on once there is room."""
    code = (
        "import resource, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "from tandem.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "ppo", "--resume", str(cut_run)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert main(["ppo", "--resume", str(cut_run)]) == 0
    assert differences(cut_run, tmp_path / "whole") == []


def test_too_little_room_is_refused_before_training(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10))
    function, _ = self_ending_reward(tmp_path, 99)
    words = ppo_words(tmp_path, tiny(), f"--rewards.0.function={function}", "--value.start=policy")
    assert "3 checkpoints at a time will take" in refused(capsys, words)


def test_second_interrupt_stops_at_once_and_loses_no_saved_step(tiny, tmp_path):
    words = ppo_words(
        tmp_path, tiny(), "--steps=100000", "--checkpoints.every_steps=1", "--rollout.prompts_per_step=64"
    )
    function, marker = self_ending_reward(tmp_path, 1)
    marker.touch()
    words += [f"--rewards.0.function={function}", "--value.start=policy"]
    process = end_at_step(tmp_path / "ppo", 2, signal.SIGINT, words)
    time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert list((tmp_path / "ppo" / "checkpoints").glob("step_*"))


def test_training_ends_where_it_gets_no_better_and_the_best_is_saved(tiny, tmp_path, capsys):
    rows = [{"prompt": f"the sea {n}", "completion": f" was {n}"} for n in range(30)]
    words = ["sft", f"--model={tiny()}", f"--data.train={write(tmp_path / 's.jsonl', rows)}", "--epochs=40"]
    words += [
        "--sequences_per_minibatch=9",
        "--optimizer.lr=0.03",
        "--eval_every=1",
        f"--run.directory={tmp_path / 'run'}",
    ]
    assert (
        main(
            [
                *words,
                "--checkpoints.best_metric=heldout/loss",
                "--checkpoints.best_is=lowest",
                "--checkpoints.patience=3",
            ]
        )
        == 0
    )
    assert "no better since step" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    losses = {row["step"]: row["heldout/loss"] for row in read_metrics(tmp_path / "run")}
    best = min(losses, key=losses.get)
    assert not summary["interrupted"]
    assert summary["best_step"] == best
    assert summary["steps"] == best + 3 == max(losses)
    assert summary["heldout"]["after"]["heldout/loss"] == losses[best]
    assert main(["sft", "--resume", str(tmp_path / "run")]) == 0
    assert "finished" in capsys.readouterr().out
    model = str(tmp_path / "run" / "model")
    again = ["sft", f"--model={model}", f"--data.train={tmp_path / 's.jsonl'}", f"--run.directory={tmp_path / 'again'}"]
    assert main([*again, "--epochs=0.1"]) == 0
    before = json.loads((tmp_path / "again" / "summary.json").read_text())["heldout"]["before"]["heldout/loss"]
    assert before == pytest.approx(losses[best], abs=1e-5)


def test_a_joint_run_ends_where_it_gets_no_better(tiny, tmp_path, capsys):
    function, marker = self_ending_reward(tmp_path, 1)
    marker.touch()
    words = [*ppo_words(tmp_path, tiny(), f"--rewards.0.function={function}", "--value.start=policy"), "--steps=40"]
    words += [f"--data.eval_prompts={prompt_file(tmp_path)}", "--eval_every=1", "--policy.lr=0.003"]
    words += ["--checkpoints.best_metric=heldout/objective/kl", "--checkpoints.best_is=lowest"]
    assert main([*words, "--checkpoints.patience=2"]) == 0
    assert "no better since step" in capsys.readouterr().out
    summary = json.loads((tmp_path / "ppo" / "summary.json").read_text())
    distances = {row["step"]: row["heldout/objective/kl"] for row in read_metrics(tmp_path / "ppo")}
    assert summary["best_step"] == min(distances, key=distances.get)
    assert summary["steps"] == summary["best_step"] + 2
    assert summary["heldout"]["after"]["objective/kl"] == distances[summary["best_step"]]
