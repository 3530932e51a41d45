"""A pipeline from end to end on tiny models: what is handed over, what is refused, and how it goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from transformers import AutoModelForCausalLM, AutoTokenizer

from faults.same import differences
from tandem.cli import main
from tandem.config import DpoConfig, PpoConfig, RewardConfig, SftConfig
from tandem.errors import InputError
from tandem.pipeline_config import PipelineConfig
from tandem.recipe import is_finished, load_config
from tandem.run.folder import read_metrics
from tandem.run.signals import Signals, Terminated, ended_by_sigterm
from tandem.view.reading import read_run
from tandem.view.report import report_content
from test_commands import EXACT, WORDS, prompt_file, refused, write
from test_processes import assert_same
from test_resume import end_at_step

KINDS = {"sft": SftConfig, "reward": RewardConfig, "ppo": PpoConfig, "dpo": DpoConfig}
SMALLEST = ["--model=m", "--reward.data.train=p.jsonl", "--ppo.data.prompts=q.jsonl", "--run.directory=runs/p"]


# --- the recipe


def config_of(*words: str) -> PipelineConfig:
    return load_config(PipelineConfig, None, [*SMALLEST, *words])


def test_each_stage_has_an_ordinary_recipe():
    config = config_of("--sft.data.train=s.jsonl", "--run.seed=3", "--reward.run.seed=4", "--compute.device=cpu")
    assert config.stages == ["sft", "reward", "ppo"]
    recipes = {stage: config.recipe_of(stage) for stage in config.stages}
    assert {stage: type(recipe) for stage, recipe in recipes.items()} == {
        stage: KINDS[stage] for stage in config.stages
    }
    assert recipes["sft"].model == "m"
    assert recipes["reward"].model == recipes["ppo"].policy.model == "runs/p/sft/model"
    assert recipes["ppo"].rewards[0].model == "runs/p/reward/model"
    assert [recipe.run.directory for recipe in recipes.values()] == ["runs/p/sft", "runs/p/reward", "runs/p/ppo"]
    assert [recipe.run.seed for recipe in recipes.values()] == [3, 4, 3]
    assert {recipe.compute.device for recipe in recipes.values()} == {"cpu"}


def test_without_sft_all_start_from_the_base():
    config = config_of()
    assert config.recipe_of("reward").model == config.recipe_of("ppo").policy.model == "m"


def test_a_reward_without_a_source_stands_for_the_reward_model():
    config = config_of("--ppo.rewards.0.function=a.py:f", "--ppo.rewards.1.weight=0.5", "--ppo.rewards.1.center=true")
    rewards = config.recipe_of("ppo").rewards
    assert [(source.model, source.function) for source in rewards] == [(None, "a.py:f"), ("runs/p/reward/model", None)]
    assert (rewards[1].weight, rewards[1].center) == (0.5, True)


def test_a_presets_defaults_reach_the_stage():
    assert config_of("--ppo.preset=book").recipe_of("ppo").policy.loss == "book"


def test_the_recipe_reads_back_the_same(tmp_path):
    config = config_of("--sft.data.train=s.jsonl", "--ppo.rewards.0.weight=2.0", "--samples=2")
    (tmp_path / "r.toml").write_text(tomli_w.dumps(config.model_dump(exclude_unset=True)))
    assert load_config(PipelineConfig, tmp_path / "r.toml", []) == config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sft.model=x"], ["sft.model", "from the pipeline's own model", "leave it out"]),
        (["--ppo.policy.model=x"], ["ppo.policy.model", "from the pipeline's own model"]),
        (["--reward.run.directory=x"], ["reward.run.directory", "the pipeline's own run.directory"]),
        (["--dpo.data.train=p.jsonl"], ["ppo and dpo are both there", "leave one out"]),
        (
            ["--ppo.rewards.0.function=a.py:f", "--ppo.value.start=policy"],
            ["reward has no effect here: ppo.rewards does not use its model"],
        ),
        (["--reward.data.eval_fraction=0.0"], ["reward.data holds no pairs out", "reward.data.eval"]),
        (["--ppo.sharing.mode=adapters"], ["add a section [reward.adapters]"]),
        (["--ppo.steps=0"], ["ppo.steps = 0", "greater than or equal to 1"]),
        (["--reward.epocs=2"], ["reward.epocs = 2", "did you mean reward.epochs?"]),
        (["--accuracy_floor=1.5"], ["accuracy_floor = 1.5", "less than or equal to 1"]),
        (["--ppo.kl.target=1.0", "--ppo.kl.coefficient=0.0"], ["ppo: kl.target adapts"]),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) and given[0].startswith("--") else "",
)
def test_what_a_recipe_cannot_say(words, said):
    with pytest.raises(InputError) as refusal:
        config_of(*words)
    assert [part for part in said if part not in str(refusal.value)] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "add a section [ppo] or [dpo]"),
        (["--ppo.data.prompts=q"], "there is no section [reward] to train a model for it"),
        (["--dpo.data.train=p", "--reward.data.train=p"], "reward has no effect here: dpo learns with no reward model"),
        (["--dpo.data.train=p", "--accuracy_floor=0.6"], "accuracy_floor has no effect here"),
    ],
    ids=str,
)
def test_which_sections_go_together(words, said):
    with pytest.raises(InputError, match=re.escape(said)):
        load_config(PipelineConfig, None, ["--model=m", *words])


# --- a run


def data_words(folder: Path) -> list[str]:
    """Small data for every stage but dpo; what is chosen is easily told from what is rejected."""
    rows = [{"prompt": f"the {word} {n}", "completion": " was quiet"} for n in range(10) for word in WORDS]
    pairs = [
        {"prompt": f"the {w}", "chosen": " was good", "rejected": f" was {n} bad"} for n in range(8) for w in WORDS
    ]
    prompts = prompt_file(folder)
    return [
        f"--sft.data.train={write(folder / 'rows.jsonl', rows)}",
        f"--reward.data.train={write(folder / 'pairs.jsonl', pairs)}",
        "--reward.data.eval_fraction=0.2",
        f"--ppo.data.prompts={prompts}",
        f"--ppo.data.eval_prompts={prompts}",
    ]


def words_of(model: Path, folder: Path, run: Path, *more: str) -> list[str]:
    return [
        "pipeline",
        f"--model={model}",
        *data_words(folder),
        "--sft.sequences_per_minibatch=8",
        "--sft.epochs=4",
        "--sft.optimizer.lr=0.01",
        "--reward.pairs_per_minibatch=8",
        "--reward.epochs=6",
        "--reward.optimizer.lr=0.01",
        "--reward.adapters.rank=4",
        "--ppo.steps=12",
        "--ppo.policy.lr=0.001",
        "--ppo.rollout.prompts_per_step=4",
        "--ppo.rollout.max_new_tokens=5",
        "--ppo.sharing.mode=adapters",
        "--ppo.adapters.rank=4",
        "--run.trackers=[]",
        "--samples=2",
        f"--run.directory={run}",
        *more,
    ]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """A pipeline that nobody interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(words_of(tiny(), run.parent, run)) == 0
    return run


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def test_a_pipeline_takes_a_base_model_to_an_aligned_one(whole, tiny, capsys):
    summary = summary_of(whole)
    assert not summary["interrupted"]
    assert [(one["stage"], one["finished"]) for one in summary["stages"]] == [
        ("sft", True),
        ("reward", True),
        ("ppo", True),
    ]
    AutoModelForCausalLM.from_pretrained(summary["model"])
    assert (whole / "reward" / "model" / "adapter").is_dir()
    told = {(one["where"], one["name"]): one for one in summary["handovers"]}
    assert list(told) == [
        ("base -> sft", "tokenizer"),
        ("sft", "held-out loss"),
        ("sft -> reward", "tokenizer"),
        ("reward -> ppo", "accuracy"),
        ("reward -> ppo", "one start"),
        ("sft -> ppo", "tokenizer"),
        ("start of ppo", "reference"),
        ("start of ppo", "value model"),
    ]
    assert {one["held"] for one in told.values()} == {True}
    loss, accuracy = told["sft", "held-out loss"]["numbers"], told["reward -> ppo", "accuracy"]["numbers"]
    assert loss["after"] < loss["before"]
    assert accuracy["accuracy"] >= accuracy["floor"] > 0.5
    assert told["start of ppo", "reference"]["numbers"]["nats_a_token"] < 1e-5
    assert told["start of ppo", "value model"]["numbers"]["score"] < 1e-3
    assert [sorted(one["answers"]) for one in summary["answers"]] == [["base", "ppo", "sft"]] * 2
    assert main(["pipeline", "--resume", str(whole)]) == 0
    assert "finished" in capsys.readouterr().out
    assert main(["ppo", "--resume", str(whole / "ppo")]) == 0
    assert "already holds a run; go on with it by --resume" in refused(capsys, words_of(tiny(), whole.parent, whole))


def test_the_report_tells_of_the_whole(whole, capsys):
    page = (whole / "report.html").read_text()
    content = report_content(read_run(whole))
    assert content["state"].startswith("Finished: 3 stages")
    assert [stage["report"] for stage in content["pipeline"]["stages"]] == [
        "sft/report.html",
        "reward/report.html",
        "ppo/report.html",
    ]
    assert all((whole / stage["report"]).is_file() for stage in content["pipeline"]["stages"])
    assert len(content["pipeline"]["handovers"]) == 8
    assert {row["name"] for row in content["recipe"] if row["changed"]} >= {"model", "ppo.steps"}
    assert "pipelineSections" in page
    assert "look at one of them" in refused(capsys, ["view", str(whole), "--no-browser"])
    assert main(["view", str(whole), "--report"]) == 0


ENDS = {"sft": signal.SIGTERM, "reward": signal.SIGKILL, "ppo": signal.SIGTERM}


@pytest.mark.long
def test_a_pipeline_that_is_ended_in_each_stage_goes_on_exactly(whole, tiny, tmp_path):
    cut = tmp_path / "cut"
    start = words_of(tiny(), whole.parent, cut, *(f"--{stage}.checkpoints.every_steps=1" for stage in ENDS))
    for stage, number in ENDS.items():
        process = end_at_step(cut / stage, 3, number, start)
        said = process.communicate(timeout=120)[0].decode()
        assert process.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL), said
        assert "Traceback" not in said
        if number == signal.SIGTERM:
            assert f"go on with: tandem pipeline --resume {cut}" in said
            assert (cut / "report.html").is_file()
        assert not is_finished(cut)
        start = ["pipeline", "--resume", str(cut)]
    assert main(start) == 0
    assert differences(cut, whole) == []


# --- what must hold


@pytest.fixture
def before_ppo(whole, tmp_path) -> Iterator[Path]:
    """The pipeline as it was before its last stage; what a test does to it is undone."""
    kept = shutil.copytree(whole, tmp_path / "kept")
    shutil.rmtree(whole / "ppo")
    (whole / "summary.json").unlink()
    yield whole
    shutil.rmtree(whole)
    kept.rename(whole)


def test_a_reward_model_below_the_floor_stops_it(before_ppo, capsys):
    run = str(before_ppo)
    pairs = before_ppo / "other.jsonl"
    rows = [{"prompt": f"the {n}", "chosen": f" {n % 7}", "rejected": f" {(n + 3) % 7}"} for n in range(40)]
    write(pairs, rows)
    missing = "--reward.data.train=none.jsonl"
    assert "[reward] data.train" in refused(capsys, ["pipeline", "--resume", run, missing])
    sft = (before_ppo / "sft" / "summary.json").stat().st_mtime_ns
    assert main(["pipeline", "--resume", run, f"--reward.data.train={pairs}", "--reward.epochs=0.1"]) == 1
    said = capsys.readouterr()
    assert "reward is done again (epochs 6.0 -> 0.1; data.train has other content)" in said.out
    assert f"kept as {before_ppo / 'reward.1'}" in said.out
    assert "two standard errors above chance; a policy would climb this reward" in said.err
    assert f"go on with: tandem pipeline --resume {run}" in said.err
    broken = [one for one in summary_of(before_ppo)["handovers"] if one["held"] is False]
    assert [one["name"] for one in broken] == ["accuracy"]
    assert not (before_ppo / "ppo").exists()
    assert "Stopped: reward -> ppo: accuracy" in report_content(read_run(before_ppo))["state"]
    assert main(["pipeline", "--resume", run, "--accuracy_floor=0.0", "--ppo.policy.loss=a2c", "--ppo.steps=1"]) == 0
    assert "reward is finished: held-out accuracy" in capsys.readouterr().out
    assert (before_ppo / "sft" / "summary.json").stat().st_mtime_ns == sft
    assert not (before_ppo / "reward.2").exists()


def test_another_chat_template_stops_it(before_ppo, capsys):
    template = before_ppo / "sft" / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + "!")
    assert main(["pipeline", "--resume", str(before_ppo)]) == 1
    assert "base -> sft: another chat template than" in capsys.readouterr().err


def test_sft_that_makes_the_base_worse_stops_it(tiny, tmp_path, capsys):
    words = words_of(tiny(), tmp_path, tmp_path / "run", "--sft.optimizer.lr=50.0", "--sft.epochs=1")
    assert main(words) == 1
    assert "it must fall: lower sft.optimizer.lr" in capsys.readouterr().err
    assert not (tmp_path / "run" / "reward").exists()


def test_a_changed_model_has_what_was_made_from_it_done_again(before_ppo, capsys):
    """SFT was trained further by hand, so that the reward model is not of the policy's start."""
    assert main(["sft", "--resume", str(before_ppo / "sft"), "--epochs=5"]) == 0
    assert main(["pipeline", "--resume", str(before_ppo), "--sft.epochs=5", "--ppo.steps=1"]) == 0
    said = capsys.readouterr().out
    assert "sft is finished" in said
    assert "reward is done again (model has other content)" in said
    starts = [one for one in summary_of(before_ppo)["handovers"] if one["name"] == "one start"]
    assert [one["held"] for one in starts] == [True]


def test_more_steps_go_on_from_the_last(before_ppo, capsys):
    assert main(["pipeline", "--resume", str(before_ppo), "--ppo.steps=1"]) == 0
    assert main(["pipeline", "--resume", str(before_ppo), "--ppo.steps=2"]) == 0
    assert "changed: steps 1 -> 2" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(before_ppo / "ppo")] == [1, 2]
    assert not (before_ppo / "ppo.1").exists()


def test_dpo_in_place_of_reward_model_and_ppo(tiny, tmp_path):
    words = [
        word for word in words_of(tiny(), tmp_path, tmp_path / "run") if not word.startswith(("--ppo", "--reward"))
    ]
    words += [f"--dpo.data.train={tmp_path / 'pairs.jsonl'}", "--dpo.data.eval_fraction=0.2", "--dpo.epochs=1"]
    assert main(words) == 0
    summary = summary_of(tmp_path / "run")
    told = {one["name"]: one for one in summary["handovers"] if one["where"].endswith("dpo")}
    assert told["tokenizer"]["held"]
    assert told["reference"]["held"]
    assert told["reference"]["numbers"]["nats_an_answer"] < 1e-3
    assert {tuple(one["answers"]) for one in summary["answers"]} == {("base", "sft", "dpo")}
    AutoTokenizer.from_pretrained(summary["model"])


@pytest.mark.long
def test_a_stage_in_two_processes_is_that_of_one_and_goes_on(tiny, tmp_path, capfd):
    dropped = ("--ppo", "--reward", "--run.directory", "--samples", "--sft.epochs", "--sft.optimizer")
    words = [word for word in words_of(tiny(), tmp_path, tmp_path) if not word.startswith(dropped)]
    words += [f"--dpo.data.train={tmp_path / 'pairs.jsonl'}", "--sft.steps=2", "--dpo.steps=8", EXACT, "--samples=0"]
    in_two = ["--processes=2", "--sft.parallel.processes=1", "--dpo.checkpoints.every_steps=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*words, f"--run.directory={one}"]) == 0
    cut = end_at_step(two / "dpo", 3, signal.SIGTERM, [*words, f"--run.directory={two}", *in_two])
    said = cut.communicate(timeout=120)[0].decode()
    assert cut.returncode == 130, said
    assert "Traceback" not in said
    assert f"go on with: tandem pipeline --resume {two}" in said
    assert 0 < len(read_metrics(two / "dpo")) < 8
    capfd.readouterr()
    assert main(["pipeline", "--resume", str(two), "--dpo.checkpoints.keep=3"]) == 0
    said = capfd.readouterr().out
    assert "sft is finished" in said
    assert "changed: checkpoints.keep 2 -> 3" in said
    for stage, processes in (("sft", 1), ("dpo", 2)):
        assert_same(one / stage, two / stage)
        assert load_config(KINDS[stage], two / stage / "config.toml", []).parallel.processes == processes


@pytest.mark.long
def test_all_stages_in_two_processes_are_those_of_one(tiny, tmp_path):
    """Each goes on from what the one before has rounded otherwise, and explained variances divide by what is small."""
    short = ["--sft.epochs=0.5", "--reward.epochs=0.5", "--ppo.steps=2", "--accuracy_floor=0.0", "--samples=0", EXACT]
    short += ["--sft.optimizer.lr=0.001", "--reward.optimizer.lr=0.001"]
    for name, processes in (("one", 1), ("two", 2)):
        assert main([*words_of(tiny(), tmp_path, tmp_path / name, *short), f"--processes={processes}"]) == 0
    for stage, tolerance in (("sft", 1e-5), ("reward", 1e-4), ("ppo", 1e-3)):
        assert_same(tmp_path / "one" / stage, tmp_path / "two" / stage, tolerance)


def test_how_many_processes_a_stage_takes_is_looked_at_first(tiny, tmp_path, capsys, monkeypatch):
    words = words_of(tiny(), tmp_path, tmp_path / "run")
    capsys.readouterr()
    said = refused(capsys, [*words, "--processes=9"])
    assert "sft: parallel.processes = 9 is more than the 8 sequences of a minibatch" in said
    assert "reward: parallel.processes = 9" in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "give the command once, without torchrun" in refused(capsys, words)


def test_what_a_later_stage_needs_is_looked_at_first(tiny, tmp_path, capsys):
    words = words_of(tiny(), tmp_path, tmp_path / "run", f"--ppo.data.prompts={tmp_path / 'none.jsonl'}")
    assert "[ppo] data.prompts" in refused(capsys, words)
    assert not (tmp_path / "run").exists()


def test_a_sigterm_that_a_stage_outlives_ends_what_is_around_it():
    with pytest.raises(Terminated), ended_by_sigterm(), Signals(grace_seconds=5):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
