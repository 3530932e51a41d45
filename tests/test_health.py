"""Health rules: each speaks where its signature is, is silent where it is not, and never raises."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.config import PpoConfig, RuleName
from tandem.health import NAMES, RULES, History, Watch, diagnose, unknown_recipe, watched
from tandem.health import thresholds as at
from tandem.health.remedies import override
from tandem.recipe import load_config

ROOT = Path(__file__).parents[1]
SMALLEST = ["--policy.model=m", "--data.prompts=p.jsonl", "--rewards.0.model=r"]
HEALTHY = {
    "objective/score": 0.4,
    "objective/score_std": 0.4,
    "objective/score_std_within_prompts": 0.3,
    "objective/kl": 1.0,
    "objective/kl_standard_error": 0.1,
    "objective/kl_coefficient": 0.05,
    "policy/loss": -0.1,
    "policy/entropy": 1.3,
    "policy/approx_kl": 0.001,
    "policy/clipfrac": 0.01,
    "policy/ratio_max": 1.4,
    "policy/lr": 1e-5,
    "policy/value_gradient_cosine": 0.1,
    "policy/value_gradient_ratio": 0.5,
    "value/explained_variance": 0.4,
    "value/explained_variance_by_position/1": 0.2,
    "value/mean": 0.4,
    "value/std": 0.2,
    "value/return_mean": 0.4,
    "value/return_std": 0.4,
    "advantage/credit_by_position/1": 0.9,
    "advantage/credit_by_position/4": 0.98,
    "advantage/from_value": 1.0,
    "advantage/std": 0.3,
    "rollout/length": 32.0,
    "rollout/eos_rate": 0.5,
    "rollout/repetition": 0.02,
    "rollout/reference_logprob": -1.3,
    "rollout/logprob_mismatch": 1e-6,
    "throughput/tokens_per_second": 1000.0,
    "memory/process_gib": 1.0,
    "time/rollout": 1.0,
    "time/score": 0.1,
}


def run(steps: int, healthy_until: int = 0, **faulty: Any) -> list[dict[str, Any]]:
    """Rows of a healthy run; from a step on with other numbers, each a value or a function of the step."""
    rows = []
    for step in range(1, steps + 1):
        changed = {name.replace("__", "/"): value for name, value in faulty.items()} if step > healthy_until else {}
        rows.append(
            {"step": step}
            | HEALTHY
            | {name: value(step) if callable(value) else value for name, value in changed.items()}
        )
    return rows


def named(rows: list[dict[str, Any]], *words: str) -> list[str]:
    config = load_config(PpoConfig, None, [*SMALLEST, *words])
    return [finding.rule for finding in watched(rows, config).findings]


FAULTS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "not_finite": (run(10, 5, fault__skipped=1.0, fault__skipped_total=1.0), []),
    "memory_grows": (run(20, 3, memory__process_gib=lambda step: 1.0 + 0.3 * step), []),
    "throughput_falls": (run(20, 8, throughput__tokens_per_second=100.0, time__score=9.0), []),
    "critic_worse_than_baseline": (run(10, value__explained_variance=-0.5), []),
    "critic_dead": (run(10, value__explained_variance=0.001, value__std=0.001), []),
    "value_start_biased": (run(10, value__mean=lambda step: 4.0 if step < 4 else 0.4), []),
    "critic_lags": (run(10, 3, value__mean=-0.2), []),
    "return_scale_drifts": (run(20, 3, value__return_mean=9.0, value__mean=9.0), []),
    "signal_decays": (
        run(10, **{"advantage/credit_by_position/1": 0.05, "value/explained_variance_by_position/1": 0.0}),
        [],
    ),
    "kl_does_not_bite": (run(10, 3, objective__kl=30.0, objective__score=0.9, objective__kl_coefficient=1e-4), []),
    "kl_reads_zero": (run(10, objective__kl=0.0), []),
    "kl_negative": (run(10, 2, objective__kl=-1.0), []),
    "updates_too_large": (run(10, 4, policy__approx_kl=0.5, policy__clipfrac=0.6), []),
    "gradient_conflict": (
        run(10, 4, policy__value_gradient_cosine=-0.6),
        ["--sharing.mode=head", "--value.start=policy"],
    ),
    "no_signal": (run(10, objective__score_std=0.0, objective__score_std_within_prompts=0.0), []),
    "learning_rate_too_small": (run(10, objective__kl=0.001, policy__approx_kl=1e-9), []),
    "kl_too_strong": (run(10, objective__kl=0.05, objective__kl_coefficient=5.0), ["--kl.coefficient=5.0"]),
    "entropy_collapse": (run(10, 4, policy__entropy=0.1), []),
    "repetition": (run(10, 4, rollout__repetition=0.6), []),
    "length_collapse": (run(10, 4, rollout__length=3.0), []),
    "length_runaway": (run(10, 4, rollout__length=100.0), []),
    "no_end": (run(10, 4, rollout__eos_rate=0.0), []),
    "reward_hacking": (run(12, 5, objective__score=0.9, rollout__reference_logprob=-3.0), []),
    "generator_mismatch": (run(10, rollout__logprob_mismatch=0.2), []),
    "stale_rollouts": (run(10, 1, rollout__logprob_mismatch=0.2), []),
}


def test_a_healthy_run_has_no_findings():
    assert named(run(60)) == []


@pytest.mark.parametrize("rule", NAMES)
def test_each_rule_names_its_signature_and_nothing_else(rule):
    rows, words = FAULTS[rule]
    assert named(rows, *words) == [rule]


@pytest.mark.parametrize("rule", NAMES)
def test_a_finding_says_why_with_numbers_and_what_to_change(rule):
    rows, words = FAULTS[rule]
    finding = watched(rows, load_config(PpoConfig, None, [*SMALLEST, *words])).findings[0]
    assert any(letter.isdigit() for letter in finding.explanation)
    assert " = " in finding.remedy
    assert finding.source
    assert (ROOT / finding.page).is_file()
    assert json.loads(json.dumps(finding.as_record())) == finding.as_record()


RECIPES = {
    "smallest": [],
    "head": ["--sharing.mode=head", "--value.start=policy"],
    "head with its own rate": ["--sharing.mode=head", "--value.start=policy", "--value.head_lr=0.001"],
    "adapters": ["--sharing.mode=adapters", "--adapters.rank=4"],
    "several epochs": ["--policy.epochs=4", "--value.epochs=3", "--policy.max_approx_kl=0.02"],
    "A2C": ["--policy.loss=a2c"],
    "the book": ["--preset=book"],
    "no KL": ["--kl.coefficient=0.0"],
    "a KL target": ["--kl.target=6.0"],
    "KL in the loss": ["--kl.placement=loss", "--kl.estimator=k2"],
    "batch baseline": ["--advantage.baseline=batch"],
    "adaptive baseline": ["--advantage.baseline=adaptive"],
    "adaptive lambda": ["--advantage.length_adaptive=0.05"],
    "lambda 1": ["--advantage.lambda_policy=1.0"],
    "discounted": ["--advantage.gamma=0.99"],
    "bootstrap": ["--advantage.at_limit=bootstrap"],
    "categorical": ["--value.loss=hl_gauss", "--value.histogram={low=-1.0, high=1.0}"],
    "normalised": ["--value.normalize=true", "--score.normalize=running"],
    "centred": ["--value.normalize=true", "--rewards.0.center=true"],
    "clipped": ["--value.clip=0.2", "--score.clip=1.0"],
    "value schedule": ["--value.adaptive.max_epochs=4", "--value.warmup.steps=5"],
    "penalties": ["--score.missing_eos_penalty=1.0", "--score.overlong_from=64"],
    "short answers": ["--rollout.max_new_tokens=1"],
    "cold": ["--rollout.temperature=0.7", "--rollout.responses_per_prompt=4"],
    "corrected": ["--policy.importance_cap=2.0", "--compute.precision=bfloat16"],
    "a reward server": ["--rewards.1.url=http://localhost:1/score"],
    "a bonus": ["--policy.entropy_coefficient=0.01", "--compute.precision=bfloat16"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_remedy_is_a_line_that_the_recipe_takes(recipe):
    words = [*SMALLEST, *RECIPES[recipe]]
    config = load_config(PpoConfig, None, words)
    for rule in RULES:
        load_config(PpoConfig, None, [*words, override(rule.remedy(History.of(FAULTS[rule.name][0]), config))])


@pytest.mark.parametrize("rule", [name for name in NAMES if name not in ("gradient_conflict", "memory_grows")])
def test_a_remedy_changes_the_recipe(rule):
    rows, words = FAULTS[rule]
    config = load_config(PpoConfig, None, [*SMALLEST, *words])
    finding = watched(rows, config).findings[0]
    changed = load_config(PpoConfig, None, [*SMALLEST, *words, override(finding.remedy)])
    assert changed != config or finding.remedy.startswith("sharing.mode")


def test_a_recipe_knows_the_names_of_the_rules():
    assert sorted(get_args(RuleName)) == sorted(NAMES)


def test_a_silenced_rule_says_nothing():
    rows, _ = FAULTS["entropy_collapse"]
    assert named(rows, '--health.silence=["entropy_collapse"]') == []


def test_a_finding_is_said_once_when_it_begins_and_once_when_it_ends():
    rows = [*run(8, 4, policy__entropy=0.1), *({**row, "step": row["step"] + 8} for row in run(12))]
    watch = Watch(unknown_recipe())
    changes = [watch.observe(row["step"], row) for row in rows]
    began = [(n, one.rule) for n, change in enumerate(changes, start=1) for one in change.began]
    ended = [(n, one.rule, one.last_step) for n, change in enumerate(changes, start=1) for one in change.ended]
    assert began == [(7, "entropy_collapse")]
    assert ended == [(12, "entropy_collapse", 8)]
    assert [(one.first_step, one.last_step, one.active) for one in watch.findings] == [(6, 8, False)]


def test_advantages_or_prompts_without_spread_are_no_signal_too():
    for name in ("advantage/std", "objective/score_std_within_prompts"):
        assert [one.rule for one in diagnose(run(10, **{name: 0.0}))] == ["no_signal"]


def test_one_odd_batch_says_nothing():
    rows = run(30, 3)
    rows[15] |= {"policy/entropy": 0.2, "policy/approx_kl": 0.05, "value/explained_variance": -0.3}
    assert diagnose(rows) == []


def test_the_policy_may_rest_while_the_value_model_warms_up():
    resting = {"value/warming_up": 1.0, "value/explained_variance": -2.0, "value/mean": 9.0}
    rows = [{name: value for name, value in (row | resting).items() if "policy/" not in name} for row in run(8)]
    assert diagnose(rows) == []


def test_one_update_a_step_reads_zero_and_a_slow_start_is_no_standstill():
    starting = {"objective/kl": lambda step: 0.002 * step, "policy/approx_kl": 0.0}
    assert diagnose(run(18, **starting)) == []
    assert [one.rule for one in diagnose(run(30, **starting | {"objective/kl": 0.002}))] == ["learning_rate_too_small"]


def test_a_verdict_does_not_depend_on_what_comes_later():
    rows = FAULTS["critic_lags"][0]
    whole, live = watched(rows, unknown_recipe()), Watch(unknown_recipe())
    for count, row in enumerate(rows, start=1):
        live.observe(row["step"], row)
        assert live.findings == watched(rows[:count], unknown_recipe()).findings
    assert live.findings == whole.findings


def test_null_in_a_file_is_nan_in_a_run():
    for rows, words in FAULTS.values():
        gaps = [row | {"value/explained_variance": math.nan, "policy/loss": math.nan} for row in rows]
        read = [{name: None if value != value else value for name, value in row.items()} for row in gaps]
        config = load_config(PpoConfig, None, [*SMALLEST, *words])
        assert watched(gaps, config).findings == watched(read, config).findings


NUMBERS = st.one_of(
    st.none(),
    st.just(math.nan),
    st.just(math.inf),
    st.just(0.0),
    st.floats(-1e6, 1e6, allow_nan=False),
    st.floats(-1.0, 1.0, allow_nan=False),
)
ALL_NAMES = sorted({*HEALTHY, "fault/skipped", "fault/skipped_total", "value/warming_up", "memory/device_gib"})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(ALL_NAMES), NUMBERS), max_size=14), st.sampled_from(sorted(RECIPES)))
def test_no_rule_raises_on_any_history(rows, recipe):
    config = load_config(PpoConfig, None, [*SMALLEST, *RECIPES[recipe]])
    watch = watched([row | {"step": step} for step, row in enumerate(rows)], config)
    for finding in watch.findings:
        load_config(PpoConfig, None, [*SMALLEST, *RECIPES[recipe], override(finding.remedy)])


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from(ALL_NAMES), NUMBERS, min_size=1), st.integers(1, 12))
def test_no_rule_raises_on_a_constant_history(row, steps):
    watched([row | {"step": step} for step in range(steps)], unknown_recipe())


def test_judging_a_step_is_cheap():
    rows, watch = run(2000), Watch(unknown_recipe())
    for row in rows[:-200]:
        watch.observe(row["step"], row)
    started = time.perf_counter()
    for row in rows[-200:]:
        watch.observe(row["step"], row)
    assert (time.perf_counter() - started) / 200 < 0.005


def test_thresholds_have_their_evidence_beside_them():
    names = [name for name in vars(at) if name.isupper()]
    page = (ROOT / "docs" / "diagnosis" / "README.md").read_text(encoding="utf-8")
    assert names
    for rule in RULES:
        assert f"`{rule.name}`" in page, rule.name
        assert (ROOT / rule.page).read_text(encoding="utf-8").count(f"`{rule.name}`") >= 1, rule.page
