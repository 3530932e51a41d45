"""Rewards that check: answers, forms, and sums at their own tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import SHARED
from tandem.cli import main
from tandem.rewards.verifiable import final_line, math_answer, one_box
from tandem.run.folder import read_metrics
from test_commands import refused

ROOT = Path(__file__).parents[1]
RECIPE, EXAMPLE = ROOT / "recipes" / "ppo-gsm8k.toml", ROOT / "examples" / "step_rewards.py"
ANSWERS = [
    ("so it is\n#### 72", "a sum\n#### 72", 1.0),
    ("The answer is 72.", "#### 72", 1.0),
    ("72.0 clips", "#### 72", 1.0),
    ("it is \\boxed{72}", "#### 72", 1.0),
    ("72 first, and then\n#### 27", "#### 72", 0.0),
    ("I do not know", "#### 72", 0.0),
    ("", "#### 72", 0.0),
    ("0.5", "1/2", 1.0),
    ("$\\frac{1}{2}$", "1/2", 1.0),
    ("2", "1/2", 0.0),
    ("#### $1,080", "#### 1,080", 1.0),
    ("3", 3, 1.0),
]


@pytest.mark.parametrize(("response", "answer", "expected"), ANSWERS)
def test_answers_are_equal_as_mathematics(response, answer, expected):
    assert math_answer(["q"], [response], [{"answer": answer}]) == [expected]


@pytest.mark.parametrize("row", [{}, {"answer": None}, {"answer": ["72"]}, {"answer": ""}])
def test_a_row_without_an_answer_is_told(row):
    with pytest.raises(ValueError, match="answer"):
        math_answer(["q"], ["72"], [row])


def test_forms():
    texts = ["so\n#### 72", "#### 72", "72", "#### 1\n#### 2", "so #### 72", "####"]
    assert final_line([""] * 6, texts, [{}] * 6) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert one_box([""] * 3, ["\\boxed{1}", "1", "\\boxed{1} \\boxed{2}"], [{}] * 3) == [1.0, 0.0, 0.0]


def gsm8k_words(source, tiny, tmp_path, *more):
    words = ["ppo", str(RECIPE), f"--policy.model={tiny()}", f"--data.prompts={source}", "--steps=2"]
    words += ["--rollout.prompts_per_step=4", "--rollout.responses_per_prompt=2", "--rollout.max_new_tokens=6"]
    return [*words, "--adapters.rank=4", f"--run.directory={tmp_path / 'run'}", *more]


def rows_file(tmp_path, **more):
    path = tmp_path / "train.jsonl"
    rows = [
        {"question": f"what is {n} and {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} | more for n in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_recipe_runs_with_process_rewards(tiny, tmp_path):
    steps = f"--rewards.2.function={EXAMPLE}:worked_sums"
    assert main(gsm8k_words(rows_file(tmp_path), tiny, tmp_path, steps)) == 0
    last = read_metrics(tmp_path / "run")[-1]
    names = ("math_answer", "final_line", "worked_sums")
    assert {f"objective/score/{name}" for name in names} <= last.keys()


def test_the_recipe_runs_on_real_problems(tiny, tmp_path):
    source = SHARED / "data" / "gsm8k" / "train.jsonl"
    if not source.is_file():
        pytest.skip("the GSM8K problems are not at hand")
    assert main(gsm8k_words(source, tiny, tmp_path, "--data.max_prompt_tokens=200")) == 0


def test_rows_without_answers_are_refused_before_training(tiny, tmp_path, capsys):
    said = refused(capsys, gsm8k_words(rows_file(tmp_path, answer=None), tiny, tmp_path))
    assert "math_answer" in said
    assert "no 'answer'" in said
