"""Recipes and overrides: what is refused, and how it is said."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import tomli_w

from tandem.config import DpoConfig, EvalConfig, PpoConfig, RewardConfig, SftConfig
from tandem.errors import InputError
from tandem.pipeline_config import PipelineConfig
from tandem.recipe import fields_of, load_config, without_none

KINDS = {
    "sft": SftConfig,
    "reward": RewardConfig,
    "dpo": DpoConfig,
    "ppo": PpoConfig,
    "pipeline": PipelineConfig,
    "eval": EvalConfig,
}
SMALLEST = ["--policy.model", "m", "--data.prompts", "p.jsonl", "--rewards.0.model", "r"]


def test_overrides_are_typed_and_reach_every_depth():
    config = load_config(
        PpoConfig, None, [*SMALLEST, "--policy.lr", "1e-6", "--rewards.1.function=f.py:g", "--steps=7"]
    )
    assert config.policy.lr == 1e-6
    assert config.steps == 7
    assert config.rewards[1].function == "f.py:g"
    assert config.rewards[0].model == "r"


def test_dashes_may_stand_for_underscores():
    assert load_config(PpoConfig, None, [*SMALLEST, "--rollout.max-new-tokens", "9"]).rollout.max_new_tokens == 9


def test_recipe_is_overridden_by_the_command_line(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('model = "a"\n[data]\ntrain = "t.jsonl"\n[optimizer]\nlr = 3e-4\n')
    config = load_config(SftConfig, recipe, ["--model", "b"])
    assert (config.model, config.optimizer.lr) == ("b", 3e-4)


def test_resolved_configuration_reads_back_the_same():
    config = load_config(PpoConfig, None, SMALLEST)
    again = PpoConfig.model_validate(tomllib.loads(tomli_w.dumps(without_none(config.model_dump()))))
    assert again == config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--polcy.lr", "1"], ["polcy", "not a known key"]),
        (["--policy.learning_rate", "1"], ["policy.learning_rate", "not a known key"]),
        (["--policy.clip_hig", "0.3"], ["did you mean policy.clip_high"]),
        (["--policy.lr", "fast"], ["policy.lr = 'fast'", "valid number"]),
        (["--policy.lr", "-1"], ["policy.lr = -1", "greater than 0"]),
        (["--policy.lr", "inf"], ["policy.lr", "finite"]),
        (["--steps", "2.5"], ["steps = 2.5", "valid integer"]),
        (["--steps", "0"], ["steps = 0", "greater than or equal to 1"]),
        (["--steps", "true"], ["steps", "valid integer"]),
        (["--sharing.mode", "both"], ["sharing.mode = 'both'", "'separate', 'adapters' or 'head'"]),
        (["--rewards", "[]"], ["rewards = []", "at least 1"]),
        (["--rewards.0.function", "f.py:g"], ["either model or function"]),
        (["--rewards", '[{function="f.py:g"}]'], ['value.start = "policy"']),
        (["--eval_every", "5"], ["eval_every needs data.eval_prompts"]),
        (["--steps"], ["--steps needs a value"]),
        (["steps=3"], ["'steps=3' was not understood"]),
        (["--policy.lr.x", "1"], ["policy.lr", "valid number"]),
        (["--policy.model.x", "1"], ["policy.model is a value"]),
        (["--rewards.5.model", "x"], ["must be an index from 0 to 1"]),
        (["--rollout.top_p", "1.5"], ["rollout.top_p = 1.5", "less than or equal to 1"]),
        (["--policy.betas", "[0.9]"], ["policy.betas", "at least 2"]),
        (
            ["--advantage.at_limit=bootstrap", "--score.missing_eos_penalty=1"],
            ["score.missing_eos_penalty", "have no effect"],
        ),
        (["--kl.placement=loss"], ['kl.estimator = "k2"']),
        (["--score.overlong_from=128"], ["overlong_from = 128 must be less than"]),
        (["--value.loss=hl_gauss"], ["value.histogram"]),
        (["--value.histogram.low=1.0", "--value.histogram.high=0.0"], ["low must be less than high"]),
        (["--value.loss=hl_gauss", "--value.histogram={low=0.0,high=1.0}", "--value.clip=1"], ["value.clip"]),
        (["--value.adaptive.max_epochs=2", "--value.epochs=3"], ["less than value.epochs"]),
        (["--sharing.mode=head"], ["sharing.mode", 'value.start = "policy"']),
        (["--sharing.mode=head", "--value.start=policy", "--value.epochs=2"], ["must be the policy's"]),
        (["--sharing.head_gradient=stop"], ["leave it out"]),
        (["--policy.dual_clip=1.0"], ["policy.dual_clip", "greater than 1"]),
        (["--preset=boook"], ["preset = 'boook'"]),
        (["--rewards.0.url=http://h/"], ["either model or function or url"]),
        (["--rewards.1.weight=1.0"], ["rewards.1", "either model or function or url"]),
        (["--rewards.1.url=localhost:80"], ["rewards.1.url", "'localhost:80' is no address of a server"]),
        (["--rewards.1.url=http://"], ["rewards.1.url", "no address"]),
        (["--rewards.1.url=http://h:x/"], ["rewards.1.url", "no address"]),
        (["--rewards.0.timeout_seconds=5.0"], ["rewards.0.timeout_seconds has no effect", "function or a url"]),
        (["--rollout.gather=layer"], ["rollout.gather has no effect", "one process has the whole policy"]),
        (["--rewards.1.function=f.py:g", "--rewards.1.retries=5"], ["rewards.1.retries has no effect", "for a url"]),
        (["--rewards.1.function=f.py:g", "--rewards.1.samples_per_request=5"], ["rewards.1.samples_per_request"]),
        (["--rewards.1.function=f.py:g", "--rewards.1.requests_at_once=5"], ["rewards.1.requests_at_once"]),
        (["--rewards.1.function=f.py:g", "--rewards.1.on_error=ignore"], ["rewards.1.on_error", "'fail' or 'skip'"]),
    ],
)
def test_what_is_refused_is_named(words, said):
    with pytest.raises(InputError) as refusal:
        load_config(PpoConfig, None, [*SMALLEST, *words])
    for part in said:
        assert part in str(refusal.value)


def test_settings_that_act_on_their_reward_are_accepted():
    words = ["--rewards.1.url=https://h:8/p", "--rewards.1.retries=0", "--rewards.1.timeout_seconds=2.5"]
    words += ["--rewards.2.function=f.py:g", "--rewards.2.timeout_seconds=9", "--rewards.0.on_error=skip"]
    config = load_config(PpoConfig, None, [*SMALLEST, *words])
    assert config.rewards[1].retries == 0
    assert config.rewards[2].timeout_seconds == 9.0
    assert config.rewards[0].on_error == "skip"


def test_missing_keys_are_named_all_at_once():
    with pytest.raises(InputError, match=r"policy.* is missing.*") as refusal:
        load_config(PpoConfig, None, ["--rewards.0.model", "r"])
    assert "data" in str(refusal.value)
    assert "policy" in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"a = ", "not valid TOML"), (b"\xff\xfe", "not UTF-8"), (None, "no such recipe")],
)
def test_bad_recipes(tmp_path, content, said):
    path = tmp_path / "r.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        load_config(RewardConfig, path, [])


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_field_is_described(kind):
    assert [name for name, field in fields_of(kind) if not field.description] == []


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "recipes").glob("*.toml")), ids=lambda p: p.name)
def test_recipes_in_the_repository_are_valid(path):
    assert load_config(KINDS[path.stem.split("-")[0]], path, [])


def test_a_preset_holds_where_the_recipe_is_silent():
    found = load_config(PpoConfig, None, [*SMALLEST, "--preset=book", "--advantage.lambda_value=0.5"])
    assert found.policy.loss == "book"
    assert (found.kl.placement, found.kl.estimator) == ("loss", "k1")
    assert (found.advantage.lambda_policy, found.advantage.lambda_value) == (0.0, 0.5)
    assert load_config(PpoConfig, None, SMALLEST).policy.loss == "ppo"
