"""Several processes give what one gives: losses, metrics, weights; and they end as one."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors.torch import load_file

from in_processes import run_in_processes
from tandem.cli import main
from tandem.run.folder import read_metrics
from test_commands import WORDS, pair_file, ppo_words, prompt_file, refused, with_function, write

TOLERANCE = 1e-5
NOT_COMPARED = ("time/", "throughput/", "memory/")


def together(words: list[str]) -> int:
    return main([*words, "--processes=2"])


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if not name.startswith(NOT_COMPARED)} for row in read_metrics(run)
    ]


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
    return [stage, f"--model={model}", *words, "--eval_every=2", "--optimizer.lr=0.001"]


def joint_words(tmp_path: Path, model: Path, options: list[str]) -> list[str]:
    words = [*ppo_words(tmp_path, model, *with_function(tmp_path)), "--compute.tokens_per_microbatch=20"]
    return [*words, f"--data.eval_prompts={prompt_file(tmp_path)}", "--policy.lr=0.001", "--value.lr=0.001", *options]


SHARING = {
    "separate": ["--value.normalize=true", "--policy.epochs=2"],
    "adapters": ["--sharing.mode=adapters", "--adapters.rank=4"],
    "head": ["--sharing.mode=head"],
}


def test_two_processes_are_as_one(tiny, tmp_path):
    small = "--compute.tokens_per_microbatch=40"
    commands = {stage: [*data_words(tmp_path, stage, tiny()), small] for stage in ("sft", "reward", "dpo")}
    commands |= {name: joint_words(tmp_path, tiny(), options) for name, options in SHARING.items()}
    for name, words in commands.items():
        assert main([*words, f"--run.directory={tmp_path / 'one' / name}"]) == 0
    in_two = [[*words, f"--run.directory={tmp_path / 'two' / name}"] for name, words in commands.items()]
    assert run_in_processes(in_two, tmp_path / "processes") == [0] * len(commands)
    for name in commands:
        assert_same(tmp_path / "one" / name, tmp_path / "two" / name)


def test_more_processes_than_rows_are_refused(tiny, tmp_path, capsys):
    words = [*data_words(tmp_path, "sft", tiny()), f"--run.directory={tmp_path / 'run'}"]
    assert "at most 5 processes" in refused(capsys, [*words, "--processes=6"])


def kept_steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def test_a_run_goes_on_in_another_number_of_processes(tiny, tmp_path):
    def words(name: str, steps: int) -> list[str]:
        options = [*SHARING["separate"], f"--steps={steps}", "--checkpoints.every_steps=2"]
        return [*joint_words(tmp_path, tiny(), options), f"--run.directory={tmp_path / name}"]

    def onward(name: str) -> list[str]:
        return ["ppo", "--resume", str(tmp_path / name), "--steps=4"]

    assert main(words("whole", 4)) == 0
    assert main(words("one_then_two", 2)) == 0
    assert run_in_processes([words("two_then_one", 2), onward("one_then_two")], tmp_path / "processes") == [0, 0]
    assert (tmp_path / "two_then_one" / "checkpoints" / "step_000002" / "tensors" / ".metadata").exists()
    assert main([*onward("two_then_one"), "--parallel.processes=1"]) == 0
    for name in ("one_then_two", "two_then_one"):
        assert_same(tmp_path / "whole", tmp_path / name)
        assert "step_000004" in kept_steps(tmp_path / name)
