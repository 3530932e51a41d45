"""Every command, end to end, on tiny models: what it leaves behind, what it says, and how it exits."""

from __future__ import annotations

import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from faults.same import timeless
from tandem.cli import main
from tandem.run.folder import read_metrics
from tiny import make_tokenizer

WORDS = ["good", "story", "film", "sea", "quiet", "slow"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompt_file(tmp_path, count=6):
    return write(
        tmp_path / "prompts.jsonl",
        [{"prompt": f"{'the' if n < 6 else 'a'} {WORDS[n % 6]} is", "n": n} for n in range(count)],
    )


def pair_file(tmp_path, count=24):
    rows = [
        {"prompt": f"the {WORDS[n % 6]}", "chosen": " was good", "rejected": " was a bad one"} for n in range(count)
    ]
    return write(tmp_path / "pairs.jsonl", rows)


def reward_file(tmp_path, body="return [float(len(r)) for r in responses]"):
    path = tmp_path / f"reward_{abs(hash(body))}.py"
    path.write_text(f"def reward(prompts, responses, rows):\n    {body}\n")
    return f"{path}:reward"


# "auto" is bfloat16 on machines with matrix units, which agrees to two digits.
EXACT = "--compute.precision=float32"


def ppo_words(tmp_path, model, *more):
    return [
        "ppo",
        f"--policy.model={model}",
        f"--data.prompts={prompt_file(tmp_path)}",
        "--steps=2",
        "--rollout.prompts_per_step=4",
        "--rollout.max_new_tokens=5",
        f"--run.directory={tmp_path / 'ppo'}",
        *more,
    ]


def with_function(tmp_path, body="return [float(len(r)) for r in responses]"):
    return [f"--rewards.0.function={reward_file(tmp_path, body)}", "--value.start=policy"]


def refused(capsys, words) -> str:
    """Run what must be refused: status 2 and one message."""
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("tandem: ")
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
    return said


@pytest.fixture(scope="module")
def reward_model(tiny, tmp_path_factory):
    """A reward model trained by the command as an adapter, for the joint stage."""
    folder = tmp_path_factory.mktemp("reward")
    words = [
        "reward",
        f"--model={tiny()}",
        f"--data.train={pair_file(folder)}",
        "--optimizer.lr=0.01",
        "--epochs=4",
        EXACT,
    ]
    assert main([*words, "--adapters.rank=4", "--every_token_weight=1.0", f"--run.directory={folder / 'run'}"]) == 0
    return folder / "run" / "model"


def test_sft_learns_and_saves(tiny, tmp_path):
    source = write(tmp_path / "s.jsonl", [{"prompt": "the sea", "completion": " was quiet"}] * 30)
    words = ["sft", f"--model={tiny()}", f"--data.train={source}", "--epochs=6", "--optimizer.lr=0.01"]
    assert main([*words, "--sequences_per_minibatch=9", f"--run.directory={tmp_path / 'run'}"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["heldout"]["after"]["heldout/loss"] < 0.5 * summary["heldout"]["before"]["heldout/loss"]
    metrics = read_metrics(tmp_path / "run")
    assert [row["step"] for row in metrics] == list(range(1, summary["steps"] + 1))
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    ids = torch.tensor([tokenizer("the sea").input_ids])
    answer = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == " was quiet"


def test_sft_by_adapters_on_conversations(tiny, tmp_path):
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a good story"}]
    source = write(tmp_path / "s.jsonl", [{"messages": turns}] * 12)
    words = [
        "sft",
        f"--model={tiny('qwen2')}",
        f"--data.train={source}",
        "--adapters.rank=4",
        "--adapters.upper_layers=1",
    ]
    assert main([*words, f"--run.directory={tmp_path / 'run'}"]) == 0
    assert (tmp_path / "run" / "model" / "adapter" / "adapter_config.json").exists()


def test_reward_model_learns_and_carries_its_accuracy(reward_model):
    card = json.loads((reward_model / "tandem.json").read_text())
    assert card["heldout_accuracy"] == 1.0
    assert card["heldout_pairs"] == 4
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    assert model.config.num_labels == 1
    score = model(input_ids=torch.tensor([card["probes"][0]["ids"]])).logits[0, 0].item()
    assert score == pytest.approx(card["probes"][0]["score"], abs=1e-3)


def test_reward_stage_goes_on_from_a_reward_model(reward_model, tmp_path):
    words = ["reward", f"--model={reward_model}", f"--data.train={pair_file(tmp_path)}"]
    assert main([*words, f"--run.directory={tmp_path / 'run'}"]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["heldout_accuracy"] == 1.0


@pytest.mark.parametrize("mode", ["separate", "adapters"])
def test_ppo_under_a_reward_model(tiny, reward_model, tmp_path, capsys, mode):
    words = ppo_words(tmp_path, tiny(), f"--rewards.0.model={reward_model}", f"--sharing.mode={mode}", EXACT)
    words += [
        f"--data.eval_prompts={prompt_file(tmp_path)}",
        "--policy.epochs=2",
        "--value.epochs=3",
        "--eval_every=1",
    ]
    assert main(words) == 0
    assert "accuracy 1.000 on 4 held-out pairs" in capsys.readouterr().out
    run = tmp_path / "ppo"
    metrics = read_metrics(run)
    names = {"objective/kl", "objective/score", "objective/rlhf_reward", "policy/loss", "policy/clipfrac"}
    names |= {"policy/approx_kl", "policy/entropy", "policy/ratio_max", "policy/grad_norm", "value/loss"}
    names |= {"value/explained_variance", "value/grad_norm", "rollout/length", "rollout/eos_rate"}
    names |= {
        "rollout/logprob_mismatch",
        "time/rollout",
        "throughput/tokens_per_second",
        "heldout/objective/score",
    }
    assert names <= metrics[0].keys()
    assert abs(metrics[0]["objective/kl"]) < 1e-3
    assert metrics[0]["rollout/logprob_mismatch"] < 1e-4
    sample = json.loads((run / "rollouts" / "step_000001.jsonl").read_text().splitlines()[0])
    lengths = {
        len(sample[key])
        for key in ("ids", "tokens", "logprobs", "values", "advantages", "rewards", "reference_logprobs")
    }
    assert len(lengths) == 1
    AutoModelForCausalLM.from_pretrained(run / "model")
    assert AutoModelForSequenceClassification.from_pretrained(run / "value_model").config.num_labels == 1
    assert (run / "model" / "adapter").exists() == (mode == "adapters")


def test_ppo_learns_a_function(tiny, tmp_path):
    words = ppo_words(tmp_path, tiny(), *with_function(tmp_path, "return [float('e' in r) for r in responses]"))
    words += [
        "--steps=12",
        "--rollout.prompts_per_step=32",
        "--policy.lr=0.003",
        "--value.lr=0.003",
        "--policy.epochs=2",
    ]
    assert main(words) == 0
    metrics = read_metrics(tmp_path / "ppo")
    assert metrics[-1]["objective/score"] > metrics[0]["objective/score"] + 0.2


def test_ppo_is_the_same_twice(tiny, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in "ab":
        assert main(ppo_words(tmp_path / name, tiny(), *with_function(tmp_path / name))) == 0
    first, second = (read_metrics(tmp_path / name / "ppo") for name in "ab")
    assert timeless(first) == timeless(second)


def test_encoder_with_its_own_tokenizer_as_reward_model(tiny, tmp_path):
    tokenizer = make_tokenizer(chat=False, size=290)
    tokenizer.pad_token = "</s>"
    config = BertConfig(
        vocab_size=400,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    words = ppo_words(tmp_path, tiny("gpt2"), f"--rewards.0.model={tmp_path / 'rm'}")
    assert main([*words, "--value.start=policy"]) == 0


def test_ppo_on_conversations_with_weighted_rewards(tiny, reward_model, tmp_path):
    prompts = write(tmp_path / "chat.jsonl", [{"prompt": [{"role": "user", "content": "the film?"}]}] * 4)
    words = ppo_words(
        tmp_path, tiny(), f"--rewards.0.model={reward_model}", f"--rewards.1.function={reward_file(tmp_path)}"
    )
    words += [
        "--rewards.1.weight=0.0",
        f"--data.prompts={prompts}",
        "--score.missing_eos_penalty=1.0",
        "--kl.target=3.0",
    ]
    assert main(words) == 0
    last = read_metrics(tmp_path / "ppo")[-1]
    assert {"objective/score/reward_model", "objective/score/reward"} <= last.keys()
    assert last["objective/shaped_score"] <= last["objective/score/reward_model"] + 1e-5


def test_ppo_in_bfloat16_with_a_truncated_distribution(tiny, tmp_path):
    words = ppo_words(tmp_path, tiny(), *with_function(tmp_path), "--compute.precision=bfloat16", "--rollout.top_k=20")
    assert main([*words, "--rollout.temperature=0.8", "--sharing.mode=adapters", "--adapters.upper_layers=1"]) == 0
    assert read_metrics(tmp_path / "ppo")[0]["policy/ratio_max"] < 1.5


@pytest.mark.parametrize("more", [[], ["--sharing.head_gradient=stop"], ["--adapters.rank=4"]], ids=str)
def test_a_value_head_on_the_policy(tiny, tmp_path, more):
    words = ppo_words(tmp_path, tiny("qwen2"), *with_function(tmp_path), "--sharing.mode=head", *more)
    assert (
        main([*words, "--value.warmup.steps=1", "--value.lr=0.01", f"--data.eval_prompts={prompt_file(tmp_path)}"]) == 0
    )
    warmup, joint, _ = read_metrics(tmp_path / "ppo")
    assert (warmup["value/warming_up"], joint["value/warming_up"]) == (1.0, 0.0)
    assert max(abs(warmup["objective/kl"]), abs(joint["objective/kl"])) < 1e-5
    assert "policy/loss" not in warmup
    assert ("policy/value_gradient_cosine" in joint) == ("--sharing.head_gradient=stop" not in more)
    assert (tmp_path / "ppo" / "model" / "adapter").exists() == ("--adapters.rank=4" in more)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "ppo" / "value_model")


def test_every_option_of_the_losses_and_rewards(tiny, reward_model, tmp_path):
    words = ppo_words(tmp_path, tiny(), f"--rewards.0.model={reward_model}", "--rewards.0.center=true")
    words += ["--score.scale=3.0", "--score.clip=2.0", "--score.overlong_from=2", "--score.reference_samples=6"]
    words += ["--kl.placement=loss", "--kl.estimator=k2", "--policy.entropy_coefficient=0.01", "--policy.dual_clip=3.0"]
    words += ["--policy.importance_cap=2.0", "--policy.max_approx_kl=1e-12", "--policy.epochs=3", "--policy.lr=0.01"]
    words += ["--value.normalize=true", "--value.clip=0.5", "--advantage.length_adaptive=0.5"]
    words += ["--value.adaptive.max_epochs=4", "--value.adaptive.raise_below=1.0", "--value.adaptive.lower_above=2.0"]
    assert main([*words, "--advantage.baseline=adaptive"]) == 0
    first, second = read_metrics(tmp_path / "ppo")
    assert first["value/epochs"] == 1
    assert second["value/epochs"] == 2
    assert first["policy/updates"] == 1
    assert first["policy/stopped_early"] == 1.0
    assert {"policy/kl_loss", "policy/exact_entropy", "value/clipfrac", "calibration/earned_10"} <= second.keys()
    assert (tmp_path / "ppo" / "value_model" / "value.json").exists()
    state = json.loads((tmp_path / "ppo" / "summary.json").read_text())["state"]
    assert state["value_epochs"] == 4
    assert state["returns"]["count"] > 0


def test_categorical_values_and_process_rewards(tiny, tmp_path):
    body = "return [[(len(r) // 2, 0.5), (len(r), 1.0)] for r in responses]"
    words = [*ppo_words(tmp_path, tiny()), *with_function(tmp_path, body), "--value.loss=hl_gauss"]
    words += ["--value.histogram.low=-3.0", "--value.histogram.high=3.0", "--value.histogram.bins=13"]
    words += [f"--data.prompts={prompt_file(tmp_path, 12)}", "--rollout.prompts_per_step=12"]
    assert main([*words, "--rollouts_to_save=24", "--rollout.responses_per_prompt=2"]) == 0
    kept = [json.loads(line) for line in (tmp_path / "ppo" / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    for sample in kept:
        assert sum(sample["rewards"]) == pytest.approx(1.5, abs=1e-4)
        assert sum(reward > 0 for reward in sample["rewards"]) in (1, 2)
    assert read_metrics(tmp_path / "ppo")[0]["objective/score"] == pytest.approx(1.5, abs=1e-4)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "ppo" / "value_model").config.num_labels == 13
    more = [f"--value.pretraining.rollouts={tmp_path / 'ppo' / 'rollouts'}", "--value.pretraining.epochs=20"]
    words = [word for word in words if not word.startswith("--run.directory")]
    assert main([*words, *more, "--value.lr=0.01", f"--run.directory={tmp_path / 'second'}"]) == 0
    learnt = json.loads((tmp_path / "second" / "summary.json").read_text())["value_pretraining"]
    assert learnt["rollouts"] + learnt["heldout_rollouts"] == 48
    values = [row["value/mean"] for row in read_metrics(tmp_path / "second")]
    assert values[0] > 0.5


def test_value_warmup_ends_on_its_criterion(tiny, tmp_path, capsys):
    words = ppo_words(tmp_path, tiny(), *with_function(tmp_path), "--value.warmup.steps=9")
    assert main([*words, "--value.warmup.explained_variance=-100.0"]) == 0
    assert "warm-up ends after 1 steps" in capsys.readouterr().out
    assert [row["value/warming_up"] for row in read_metrics(tmp_path / "ppo")] == [1.0, 0.0, 0.0]


def test_generate_answers_prompts(tiny, capsys):
    assert main(["generate", str(tiny()), "--prompt", "the film", "--prompt", "a story", "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "> the film\n" in out
    assert "> a story\n" in out
    assert main(["generate", str(tiny()), "--prompt", "what?", "--chat", "--responses", "2", "--top-k", "1"]) == 0
    answers = capsys.readouterr().out.strip().split("\n\n")
    assert answers[0] == answers[1]


def test_demo_on_a_tiny_model(tiny, tmp_path, capsys):
    pytest.importorskip("vaderSentiment")
    rows = [{"text": f"the {word} was {how}, {how}, {how}"} for word in WORDS for how in ("good", "bad", "slow")]
    words = ["sft", f"--model={tiny()}", f"--data.train={write(tmp_path / 's.jsonl', rows)}", "--optimizer.lr=0.01"]
    assert main([*words, "--epochs=80", "--sequences_per_minibatch=9", f"--run.directory={tmp_path / 'sft'}"]) == 0
    model = str(tmp_path / "sft" / "model")
    words = ["demo", "--quick", "--model", model, "--run-dir", str(tmp_path / "demo"), "--seed", "4"]
    assert main(words) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["seed"] == 4
    assert {"seconds", "peak_memory_gib", "explained_variance"} <= summary.keys()
    assert set(summary["gold"]) == {"before", "after"}
    assert len(summary["samples"]) == 4
    assert (tmp_path / "demo" / "curves.png").stat().st_size > 10_000
    assert main(words) == 0
    assert (tmp_path / "demo.1" / "summary.json").exists()
    capsys.readouterr()


def test_real_model_from_sft_to_ppo(stories, tmp_path):
    rows = [
        {"text": f"Once upon a time, there was a {word} dog. It was happy."} for word in ["big", "small", "red"] * 5
    ]
    words = [
        "sft",
        f"--model={stories}",
        f"--data.train={write(tmp_path / 's.jsonl', rows)}",
        "--optimizer.lr=1e-3",
    ]
    assert main([*words, f"--run.directory={tmp_path / 'sft'}", "--epochs=3", "--sequences_per_minibatch=5"]) == 0
    words = ppo_words(tmp_path, tmp_path / "sft" / "model", *with_function(tmp_path))
    assert main([*words, "--sharing.mode=adapters", "--adapters.upper_layers=2", EXACT]) == 0
    assert read_metrics(tmp_path / "ppo")[0]["rollout/logprob_mismatch"] < 1e-4


def test_bad_input_is_one_message(tiny, reward_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    model, stranger = tiny(), tmp_path / "stranger"
    shutil.copytree(reward_model, stranger)
    make_tokenizer(size=270).save_pretrained(stranger)
    assert "invalid choice" in refused(capsys, ["frobnicate"])
    cases = {
        "no such recipe": ["sft", str(tmp_path / "none.toml")],
        "nonsense: there is no such recipe": ["sft", "nonsense"],
        "there is no such folder": ppo_words(tmp_path, "./nowhere", *with_function(tmp_path)),
        "no config.json": ppo_words(tmp_path, tmp_path, *with_function(tmp_path)),
        "has no function": ppo_words(
            tmp_path, model, "--value.start=policy", f"--rewards.0.function={reward_file(tmp_path)[:-7]}:nope"
        ),
        "No module named": ppo_words(tmp_path, model, "--value.start=policy", "--rewards.0.function=nowhere:nope"),
        "returned 1 scores for": ppo_words(tmp_path, model, *with_function(tmp_path, "return [1.0]")),
        "returned nan": ppo_words(tmp_path, model, *with_function(tmp_path, "return [float('nan')] * len(responses)")),
        "must return numbers": ppo_words(tmp_path, model, *with_function(tmp_path, "return ['x'] * len(responses)")),
        "raised ZeroDivisionError": ppo_words(tmp_path, model, *with_function(tmp_path, "return 1 / 0")),
        "a reward model is a sequence classifier": ppo_words(tmp_path, model, f"--rewards.0.model={tiny('gpt2')}"),
        "together more than the 256": ppo_words(
            tmp_path, model, *with_function(tmp_path), "--rollout.max_new_tokens=255"
        ),
        "another tokenizer": ppo_words(tmp_path, model, f"--rewards.0.model={stranger}"),
        "upper_layers = 99": ppo_words(
            tmp_path, model, *with_function(tmp_path), "--sharing.mode=adapters", "--adapters.upper_layers=99"
        ),
        "lie outside": ppo_words(
            tmp_path,
            model,
            *with_function(tmp_path),
            "--value.loss=hl_gauss",
            "--value.histogram={low=90.0, high=91.0}",
        ),
        "among its process rewards": ppo_words(
            tmp_path, model, *with_function(tmp_path, "return [[(len(r) + 1, 1.0)] for r in responses]")
        ),
        "pretraining.rollouts": ppo_words(
            tmp_path, model, *with_function(tmp_path), f"--value.pretraining.rollouts={tmp_path / 'nothing'}"
        ),
        "is no rollout": ppo_words(
            tmp_path, model, *with_function(tmp_path), f"--value.pretraining.rollouts={prompt_file(tmp_path)}"
        ),
        "cuda": ppo_words(tmp_path, model, *with_function(tmp_path), "--compute.device=cuda:7"),
        "no prompt": ["generate", str(model)],
        "not a number above 0": ["generate", str(model), "--prompt", "x", "--temperature", "0"],
        "holds something that is no earlier demo": [
            "demo",
            "--model",
            str(model),
            "--run-dir",
            str(tmp_path),
        ],
    }
    for number, (said, words) in enumerate(cases.items()):
        directory = [f"--run.directory={tmp_path / f'run{number}'}"] if words[0] == "ppo" else []
        assert said in refused(capsys, [*words, *directory]), words


def test_a_run_is_not_overwritten(tiny, tmp_path, capsys):
    words = ppo_words(tmp_path, tiny(), *with_function(tmp_path))
    assert main(words) == 0
    assert "already holds a run" in refused(capsys, words)


def test_chance_is_warned_of(tiny, reward_model, tmp_path, capsys):
    for file in reward_model.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    card = json.loads((tmp_path / "tandem.json").read_text())
    (tmp_path / "tandem.json").write_text(json.dumps({**card, "heldout_accuracy": 0.5, "heldout_pairs": 100}))
    assert main(ppo_words(tmp_path, tiny(), f"--rewards.0.model={tmp_path}")) == 0
    assert "on 100 held-out pairs is chance" in " ".join(capsys.readouterr().out.split())


def test_a_transfer_that_is_not_whole_is_refused(tiny, reward_model, tmp_path, capsys):
    card = json.loads((reward_model / "tandem.json").read_text())
    original = (reward_model / "tandem.json").read_text()
    card["probes"][0]["score"] += 1.0
    (reward_model / "tandem.json").write_text(json.dumps(card))
    try:
        for mode in ("separate", "adapters"):
            words = ppo_words(tmp_path, tiny(), f"--rewards.0.model={reward_model}", f"--sharing.mode={mode}")
            assert "was not carried over whole" in refused(capsys, words)
    finally:
        (reward_model / "tandem.json").write_text(original)


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as end:
        main(["ppo", "--help"])
    assert end.value.code == 0
    assert "--policy.lr" in capsys.readouterr().out


def test_the_command_exits_as_documented():
    done = subprocess.run(
        [sys.executable, "-m", "tandem", "sft", "none.toml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_first_interrupt_saves_after_the_step(tiny, tmp_path):
    words = ppo_words(tmp_path, tiny(), *with_function(tmp_path), "--steps=100000")
    run = subprocess.Popen([sys.executable, "-m", "tandem", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = tmp_path / "ppo" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[0].decode()
    assert run.returncode == 130, said
    summary = json.loads((tmp_path / "ppo" / "summary.json").read_text())
    assert summary["interrupted"]
    assert summary["steps"] == len(read_metrics(tmp_path / "ppo"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "ppo" / "model")


def test_a_reward_model_that_learns_length_is_named(tiny, tmp_path, capsys):
    """Longer answers are chosen three times in four, and nothing else tells the answers apart."""
    fill = ["the sea", "a story", "the film", "a child"]
    rows, chance = [], random.Random(0)
    for n in range(160):
        long, short = f" {fill[n % 4]} and {fill[n % 3]} and the people", f" {fill[n % 4]}"
        chosen, rejected = (short, long) if chance.random() < 0.25 else (long, short)
        rows.append({"prompt": f"the {WORDS[n % 6]} {n}", "chosen": chosen, "rejected": rejected, "margin": 0.1})
    words = ["reward", f"--model={tiny()}", f"--data.train={write(tmp_path / 'pairs.jsonl', rows)}", "--epochs=2"]
    words += ["--optimizer.lr=0.003", "--data.eval_fraction=0.4", "--centring_weight=0.01"]
    assert main([*words, f"--run.directory={tmp_path / 'run'}"]) == 0
    assert "it has learnt length" in " ".join(capsys.readouterr().out.split())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    after = summary["heldout"]["after"]
    assert after["heldout/accuracy_chosen_longer"] > 0.9
    assert after["heldout/accuracy_chosen_shorter"] < 0.1
    assert abs(after["heldout/score"]) < 1.0
    assert main(ppo_words(tmp_path, tiny(), f"--rewards.0.model={tmp_path / 'run' / 'model'}")) == 0
    assert "it has learnt length" in " ".join(capsys.readouterr().out.split())
