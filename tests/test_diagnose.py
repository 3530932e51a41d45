"""tandem diagnose: our own runs and those of other trainers, by the names that they log; and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
from torch.utils.tensorboard import SummaryWriter

from tandem.cli import main
from tandem.health import NAMES
from tandem.health.foreign import TRAINERS
from tandem.health.imports import read_run
from tandem.run.folder import read_metrics
from test_commands import ppo_words, reward_file
from test_health import FAULTS
from test_health import run as health_run

VERL = {
    "critic/score/mean": 0.4,
    "critic/values/mean": 0.1,
    "critic/returns/mean": 0.4,
    "critic/vf_explained_var": -0.6,
    "critic/vf_loss": 0.1,
    "critic/lr": 1e-5,
    "actor/entropy": 1.2,
    "actor/pg_clipfrac": 0.01,
    "actor/ppo_kl": 0.001,
    "actor/grad_norm": 0.3,
    "actor/lr": 2e-6,
    "actor/reward_kl_penalty": 0.02,
    "actor/reward_kl_penalty_coeff": 0.001,
    "response_length/mean": 200.0,
    "response_length/clip_ratio": 0.1,
    "training/rollout_probs_diff_mean": 0.002,
    "perf/throughput": 900.0,
    "timing_s/step": 30.0,
}
TRL = {
    "objective/scores": 0.4,
    "objective/kl": 3.0,
    "objective/rlhf_reward": 0.3,
    "objective/entropy": 40.0,
    "policy/approxkl_avg": 0.4,
    "policy/clipfrac_avg": 0.5,
    "policy/entropy_avg": 1.2,
    "val/ratio": 1.4,
    "loss/policy_avg": -0.01,
    "loss/value_avg": 0.2,
    "val/clipfrac_avg": 0.0,
    "lr": 3e-6,
    "eps": 4,
}
OPENRLHF = {
    "reward": 0.4,
    "kl": 0.02,
    "return": 0.3,
    "policy_loss": -0.01,
    "actor_lr": 5e-7,
    "ppo_kl": 0.001,
    "ppo_clip_ratio": 0.01,
    "critic_loss": 0.2,
    "values": 0.3,
    "critic_lr": 9e-6,
    "response_length": 200.0,
    "response_clip_ratio": 0.2,
    "vllm_kl": -0.3,
}


def rows_of(metrics, steps=12):
    return [{"step": step} | metrics for step in range(1, steps + 1)]


def as_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def diagnosed(capsys, path):
    assert main(["diagnose", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def rules(found):
    return [finding["rule"] for finding in found["findings"]]


def test_verl_by_its_tensorboard_folder(tmp_path, capsys):
    writer = SummaryWriter(str(tmp_path / "tensorboard_log" / "project" / "run"))
    for row in rows_of(VERL):
        for name, value in row.items():
            writer.add_scalar(name, value, row["step"])
    writer.close()
    found = diagnosed(capsys, tmp_path / "tensorboard_log")
    assert found["trainer"] == "verl"
    assert rules(found) == ["critic_worse_than_baseline"]
    assert found["steps"] == 12
    assert "gradient_conflict" in found["not_judged"]
    run = read_run(tmp_path / "tensorboard_log")
    assert run.rows[0]["objective/kl"] == pytest.approx(4.0)
    assert run.rows[0]["rollout/eos_rate"] == pytest.approx(0.9)
    assert run.config.policy.lr == pytest.approx(2e-6)


def test_verl_file_logger_lines(tmp_path, capsys):
    rows = [{"step": row["step"], "data": {k: v for k, v in row.items() if k != "step"}} for row in rows_of(VERL)]
    found = diagnosed(capsys, as_json_lines(tmp_path / "verl.jsonl", rows))
    assert (found["trainer"], rules(found)) == ("verl", ["critic_worse_than_baseline"])


def test_trl_by_its_trainer_state(tmp_path, capsys):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows_of(TRL)}))
    found = diagnosed(capsys, tmp_path)
    assert found["trainer"].startswith("TRL (PPO")
    assert rules(found) == ["updates_too_large"]
    assert found["findings"][0]["remedy"] == "policy.lr = 1e-06"


def test_trl_by_its_event_files_with_a_prefix(tmp_path, capsys):
    writer = SummaryWriter(str(tmp_path))
    for row in rows_of(TRL):
        for name, value in row.items():
            writer.add_scalar(f"train/{name}", value, row["step"])
    writer.close()
    assert rules(diagnosed(capsys, tmp_path)) == ["updates_too_large"]


def test_trl_of_before(tmp_path, capsys):
    rows = rows_of({"ppo/mean_scores": 0.4, "ppo/std_scores": 0.3, "objective/kl": -3.0, "ppo/val/var_explained": 0.3})
    found = diagnosed(capsys, as_json_lines(tmp_path / "old.jsonl", rows))
    assert found["trainer"].startswith("TRL up to 0.11")
    assert rules(found) == ["kl_negative"]


def test_openrlhf_as_exported_by_weights_and_biases(tmp_path, capsys):
    path = tmp_path / "wandb.csv"
    with path.open("w", newline="") as file:
        names = [f"run-7 - train/{name}{end}" for name in OPENRLHF for end in ("", "__MIN", "__MAX")]
        writer = csv.writer(file)
        writer.writerow(["Step", *names])
        for step in range(1, 13):
            writer.writerow([step, *(value for value in OPENRLHF.values() for _ in range(3))])
    found = diagnosed(capsys, path)
    assert found["trainer"] == "OpenRLHF"
    assert rules(found) == ["generator_mismatch"]


def test_every_trainer_is_told_from_the_others(tmp_path, capsys):
    for trainer in TRAINERS:
        names = {reading: 1.0 for reading in trainer.readings.values() if isinstance(reading, str)}
        path = as_json_lines(tmp_path / "run.jsonl", rows_of(names, steps=2))
        assert diagnosed(capsys, path)["trainer"] == trainer.name


def test_a_run_of_ours_is_told_its_story(tmp_path, capsys):
    as_json_lines(tmp_path / "metrics.jsonl", FAULTS["entropy_collapse"][0])
    assert main(["diagnose", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for part in ("entropy_collapse", "why:    the entropy fell from 1.3 to 0.1", "change: ", "docs/diagnosis/text.md"):
        assert part in said
    assert "Not judged" not in said
    as_json_lines(tmp_path / "metrics.jsonl", health_run(30))
    assert main(["diagnose", str(tmp_path)]) == 0
    assert "Nothing is wrong that these rules know of." in capsys.readouterr().out


def test_a_line_that_is_still_being_written_is_left_out(tmp_path, capsys):
    path = as_json_lines(tmp_path / "metrics.jsonl", health_run(5))
    path.write_text(path.read_text() + '{"step": 6, "objective/sco')
    assert diagnosed(capsys, tmp_path)["steps"] == 5


REFUSED = {
    "nothing there": (None, b"", "there is no such run"),
    "an empty folder": ("empty/", b"", "holds no metrics"),
    "another kind of file": ("run.txt", b"step 1", "of a kind that is not read"),
    "no JSON": ("run.jsonl", b"{]\n{}\n", "line 1: is no JSON object"),
    "a list for a row": ("run.jsonl", b"[1]\n", "line 1: is no JSON object"),
    "a number for a history": ("run.json", b"7", "must be a list of rows"),
    "broken JSON": ("run.json", b"{", "is not JSON"),
    "nesting without end": ("run.json", b"[" * 100_000, "is not JSON"),
    "no rows": ("run.jsonl", b"", "holds no row of metrics"),
    "no metric that is known": ("run.csv", b"step,accuracy\n1,0.5\n", "no metric that is known (it has accuracy)"),
    "not UTF-8": ("run.csv", b"step,\xff\n1,2\n", "cannot be read"),
    "a zero byte": ("run.csv", b"step,objective/kl\n\x00,2\n", ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(case, tmp_path, capsys):
    name, content, said = REFUSED[case]
    path = tmp_path / (name or "missing")
    if name is not None and name.endswith("/"):
        path.mkdir()
    elif name is not None:
        path.write_bytes(content)
    status = main(["diagnose", str(path)])
    captured = capsys.readouterr()
    if not said:
        assert status in (0, 2)
        return
    assert status == 2
    assert captured.err.startswith("tandem: ")
    assert len(captured.err.strip().splitlines()) == 1
    assert said in captured.err


def test_event_files_of_several_runs_are_refused(tmp_path, capsys):
    for name in ("one", "two"):
        writer = SummaryWriter(str(tmp_path / name))
        writer.add_scalar("objective/kl", 1.0, 1)
        writer.close()
    assert main(["diagnose", str(tmp_path)]) == 2
    assert "the event files of 2 runs" in capsys.readouterr().err


def words_that_collapse(tmp_path, tiny, *more):
    """A run whose every response earns the same, so that `no_signal` begins with step 5."""
    constant = reward_file(tmp_path, "return [1.0 for _ in responses]")
    words = ppo_words(tmp_path, tiny(), f"--rewards.0.function={constant}", "--value.start=policy", "--steps=8")
    return [*words, "--run.trackers=[]", *more]


def test_a_run_says_logs_and_sums_up_what_is_wrong(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*words_that_collapse(tmp_path, tiny), f"--run.directory={run}"]) == 0
    said = capsys.readouterr().out
    assert said.count("all responses earn the same") == 1
    assert "unwell: " in said
    assert f"tandem diagnose {run}" in said
    rows = read_metrics(run)
    assert [row.get("health/no_signal") for row in rows] == [None] * 4 + [1.0] * 4
    summary = json.loads((run / "summary.json").read_text())
    found = diagnosed(capsys, run)
    assert [one for one in summary["health"] if one["about"] == "training"] == [
        one for one in found["findings"] if one["about"] == "training"
    ]
    assert "no_signal" in rules(found)


def test_a_run_may_stop_itself_and_be_taken_on(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    silence = json.dumps([name for name in NAMES if name != "no_signal"])
    stop = ["--health.act=stop", f"--health.silence={silence}"]
    assert main([*words_that_collapse(tmp_path, tiny, *stop), f"--run.directory={run}"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["interrupted"]) == (5, False)
    assert (run / "model").is_dir()
    assert "the run ends" in capsys.readouterr().out
    assert main(["ppo", "--resume", str(run), "--health.act=warn"]) == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 8


def test_a_lowered_rate_is_lowered_after_a_resume_too(tiny, tmp_path, capsys):
    """The policy learns so fast that updates go too far; what a cut run does is what a whole one does."""
    lengths = reward_file(tmp_path)
    words = ppo_words(tmp_path, tiny(), f"--rewards.0.function={lengths}", "--value.start=policy", "--policy.lr=0.05")
    words += ["--health.act=lower_lr", "--run.trackers=[]"]
    assert main([*words, "--steps=8", f"--run.directory={tmp_path / 'whole'}"]) == 0
    assert main([*words, "--steps=5", f"--run.directory={tmp_path / 'cut'}"]) == 0
    shutil.rmtree(tmp_path / "cut" / "model")
    assert main(["ppo", "--resume", str(tmp_path / "cut"), "--steps=8"]) == 0
    rates = [[row["policy/lr"] for row in read_metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert rates[0] == rates[1]
    assert rates[0][0] == pytest.approx(0.05)
    assert rates[0][-1] < 0.05
    assert "learning rate is" in capsys.readouterr().out


def test_a_silenced_rule_must_exist(capsys):
    words = ["ppo", "--policy.model=m", "--data.prompts=p.jsonl", "--rewards.0.model=r"]
    assert main([*words, '--health.silence=["entropy"]']) == 2
    assert "'entropy_collapse'" in capsys.readouterr().err
