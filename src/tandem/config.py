"""What a run can be told: one TOML file, any field overridden on the command line, all of it checked at once.

A configuration is frozen. Names carry their unit; a field's description is what `--help` prints.
"""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tandem.errors import InputError

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunSection(Section):
    """Where the run is kept."""

    directory: str = Field("runs/{stage}", description="the run's folder; {stage} is the command's name")
    seed: int = Field(0, ge=0, description="seed of everything random")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        ["tensorboard"], description="where metrics go besides metrics.jsonl"
    )


class ComputeSection(Section):
    """How the arithmetic is done; but for rounding, none of it changes what is computed."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="type of the matrix products; auto takes bfloat16 where the hardware multiplies it faster. "
        "Master weights and optimiser state are float32 either way",
    )
    tokens_per_microbatch: Count = Field(4096, description="tokens (with padding) in one forward and backward")


class OptimizerSection(Section):
    """AdamW for one model."""

    lr: Positive = Field(1e-5, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="course of the learning rate after the warm-up; linear and cosine end at zero"
    )
    warmup_fraction: Fraction = Field(0.0, description="share of all updates over which lr rises from zero")
    max_grad_norm: Positive = Field(1.0, description="gradients are scaled down to this norm")
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay")
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.999], description="AdamW's decay rates"
    )


class FineTuningSection(OptimizerSection):
    """AdamW where one model is trained from data: a short rise, then down to zero."""

    lr: Positive = Field(2e-5, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="course of the learning rate after the warm-up; linear and cosine end at zero"
    )
    warmup_fraction: Fraction = Field(0.05, description="share of all updates over which lr rises from zero")


class AdapterSection(Section):
    """LoRA (Hu et al. 2021)."""

    rank: Count = Field(16, description="rank of each adapter")
    alpha: Count = Field(32, description="scale: the adapter's output is multiplied by alpha / rank")
    upper_layers: Count | None = Field(
        None,
        description="adapt only this many layers, counted from the top (all if unset). What lies below is "
        "frozen and, where the models share it, runs once for all of them",
    )


class RowsSection(Section):
    """Rows in."""

    train: str = Field(description="a .jsonl, .json, .csv or .parquet file, or a hub id")
    eval: str | None = Field(None, description="held-out rows; unset: eval_fraction of train is held out")
    eval_fraction: Fraction = Field(0.1, description="share of train held out where eval is unset")
    split: str = Field("train", description="split of train, where it is a hub data set")
    eval_split: str = Field("test", description="split of eval, where it is a hub data set")
    columns: dict[str, str] = Field({}, description="standard name -> name in the data, for other conventions")
    max_tokens: Count = Field(1024, description="longest sequence, prompt and answer together")
    too_long: Literal["refuse", "truncate", "drop"] = Field(
        "refuse",
        description="what to do with a longer row; truncated and dropped rows are counted and reported",
    )
    bad_rows: Literal["refuse", "drop"] = Field(
        "refuse",
        description="what to do with a row that cannot be used (an empty answer, equal answers, a wrong role); "
        "dropped ones are counted and reported",
    )


class SftConfig(Section):
    """Supervised fine-tuning: the likelihood of the given answers."""

    model: str = Field(description="directory or hub id of a causal language model")
    epochs: Positive = Field(1.0, description="passes over the data")
    sequences_per_minibatch: Count = Field(32, description="sequences in one optimiser step")
    eval_every: Count = Field(50, description="steps between evaluations on held-out rows")
    data: RowsSection
    optimizer: FineTuningSection = FineTuningSection()
    adapters: AdapterSection | None = Field(None, description="train LoRA adapters instead of all weights")
    run: RunSection = RunSection()
    compute: ComputeSection = ComputeSection()


class RewardConfig(Section):
    """Reward model from preferences: Bradley-Terry."""

    model: str = Field(description="directory or hub id to start from, causal or one-label classifier")
    epochs: Positive = Field(1.0, description="passes over the data")
    pairs_per_minibatch: Count = Field(32, description="preference pairs in one optimiser step")
    every_token_weight: NonNegative = Field(
        0.0,
        description="weight of the pair loss at every token of the answers beside the one at their ends; it learns "
        "faster from few pairs and makes a better start for a value model",
    )
    eval_every: Count = Field(50, description="steps between evaluations on held-out pairs")
    head_lr: Positive | None = Field(None, description="learning rate of the new scalar head (lr if unset)")
    data: RowsSection
    optimizer: FineTuningSection = FineTuningSection()
    adapters: AdapterSection | None = Field(None, description="train LoRA adapters instead of all weights")
    run: RunSection = RunSection()
    compute: ComputeSection = ComputeSection()


class PromptsSection(Section):
    """Prompts in."""

    prompts: str = Field(description="a .jsonl, .json, .csv or .parquet file, or a hub id")
    eval_prompts: str | None = Field(None, description="held-out prompts, measured before and after")
    split: str = Field("train", description="split of prompts, where they are a hub data set")
    eval_split: str = Field("test", description="split of eval_prompts, where they are a hub data set")
    columns: dict[str, str] = Field({}, description="standard name -> name in the data, for other conventions")
    max_prompt_tokens: Count = Field(1024, description="longest prompt")
    too_long: Literal["refuse", "drop"] = Field(
        "refuse", description="what to do with a longer prompt; dropped ones are counted and reported"
    )


class RolloutSection(Section):
    """How responses are sampled."""

    prompts_per_step: Count = Field(32, description="prompts in one step")
    responses_per_prompt: Count = Field(1, description="responses sampled for each prompt")
    max_new_tokens: Count = Field(128, description="longest response")
    temperature: Positive = Field(1.0, description="divides the logits, here and in every log-probability")
    top_k: Count | None = Field(None, description="sample among the k likeliest tokens only")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="sample among the likeliest tokens that together reach this probability"
    )
    sequences_per_batch: Count = Field(64, description="rows that decode together")


class ScoreSection(Section):
    """From the reward's answer to the score at a sequence's last token."""

    missing_eos_penalty: NonNegative = Field(0.0, description="taken off the score of a response cut at the limit")


class KlSection(Section):
    """How the policy is held near the reference."""

    coefficient: NonNegative = Field(0.05, description="beta: reward per nat of log-ratio to the reference")
    target: Positive | None = Field(
        None, description="KL in nats a sequence that the coefficient is adapted to hold (fixed if unset)"
    )
    horizon: Positive = Field(10_000.0, description="sequences over which the adaptive coefficient reacts")


class AdvantageSection(Section):
    """Generalised advantage estimation (Schulman et al. 2015)."""

    gamma: Fraction = Field(1.0, description="discount; below 1 is a bias for a reward at the end")
    lambda_policy: Fraction = Field(0.95, description="lambda of the advantages that train the policy")
    lambda_value: Fraction = Field(1.0, description="lambda of the value targets; 1 is Monte-Carlo")
    whiten: bool = Field(False, description="scale advantages to mean 0 and variance 1 over the whole batch")
    at_limit: Literal["score", "bootstrap"] = Field(
        "score",
        description="a response cut at the length limit: score pays its score as at an end; bootstrap pays "
        "none and lets the value of the last state stand for what would follow",
    )


class PolicySection(OptimizerSection):
    """The policy's side of the joint update."""

    model: str = Field(description="directory or hub id of a causal language model")
    epochs: Count = Field(1, description="passes over a step's rollouts")
    sequences_per_minibatch: Count = Field(32, description="sequences in one optimiser step")
    clip_low: Positive = Field(0.2, description="ratios below 1 - clip_low earn no further gradient")
    clip_high: Positive = Field(0.2, description="ratios above 1 + clip_high earn no further gradient")


class ValueSection(OptimizerSection):
    """The value model's side of the joint update."""

    start: Literal["reward", "policy"] = Field(
        "reward",
        description="start from the reward model (verified), or from the policy's trunk and a zero head",
    )
    epochs: Count = Field(1, description="passes over a step's rollouts")
    sequences_per_minibatch: Count = Field(32, description="sequences in one optimiser step")
    head_lr: Positive | None = Field(None, description="learning rate of the scalar head (lr if unset)")


class RewardSource(Section):
    """One term of the reward: a model or a Python function, times its weight."""

    model: str | None = Field(None, description="directory or hub id of a one-label sequence classifier")
    function: str | None = Field(None, description="module:function or path/to/file.py:function")
    weight: float = Field(1.0, description="multiplies the term")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.model is None) == (self.function is None):
            raise ValueError("give either model or function")
        return self


class SharingSection(Section):
    """How the four models share parameters."""

    mode: Literal["separate", "adapters"] = Field(
        "separate",
        description="separate: four models. adapters: one frozen trunk, which is the reference, carrying the "
        "others as LoRA adapters",
    )


class PpoConfig(Section):
    """The joint stage: policy and value model trained together under a reward."""

    steps: Count = Field(100, description="rollout-and-update steps")
    eval_every: Count | None = Field(None, description="steps between evaluations on eval_prompts")
    eval_responses_per_prompt: Count = Field(1, description="responses sampled for each held-out prompt")
    save_rollouts_every: Count = Field(1, description="steps between saved samples")
    rollouts_to_save: Count = Field(16, description="samples saved each time")
    data: PromptsSection
    policy: PolicySection
    value: ValueSection = ValueSection()
    rewards: Annotated[list[RewardSource], Field(min_length=1)]
    score: ScoreSection = ScoreSection()
    kl: KlSection = KlSection()
    advantage: AdvantageSection = AdvantageSection()
    rollout: RolloutSection = RolloutSection()
    sharing: SharingSection = SharingSection()
    adapters: AdapterSection | None = Field(
        None, description="settings of the adapters, where sharing.mode is adapters"
    )
    run: RunSection = RunSection()
    compute: ComputeSection = ComputeSection()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.value.start == "reward" and not any(source.model for source in self.rewards):
            raise ValueError('value.start = "reward" needs a reward model in rewards; set value.start = "policy"')
        if self.sharing.mode == "separate" and self.adapters is not None:
            raise ValueError('adapters are set, but sharing.mode is "separate"; set sharing.mode = "adapters"')
        if self.kl.target is not None and self.kl.coefficient == 0:
            raise ValueError("kl.target adapts kl.coefficient by factors, and 0 stays 0; start from more than 0")
        if self.eval_every is not None and self.data.eval_prompts is None:
            raise ValueError("eval_every needs data.eval_prompts")
        if self.advantage.at_limit == "bootstrap" and self.score.missing_eos_penalty > 0:
            raise ValueError(
                'score.missing_eos_penalty has no effect with advantage.at_limit = "bootstrap", which pays no '
                "score at the limit; set one of the two"
            )
        return self


StageConfig = TypeVar("StageConfig", SftConfig, RewardConfig, PpoConfig)


def load_config(kind: type[StageConfig], recipe: Path | None, overrides: Sequence[str]) -> StageConfig:
    """Read a recipe, apply `--section.key value` overrides, check the whole.

    Raises InputError for a file that cannot be read, an unknown key, a wrong type or an impossible combination.
    """
    tree: dict[str, Any] = {} if recipe is None else read_toml(recipe)
    for path, value in parse_overrides(overrides):
        _set(tree, path, value)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        origin = f"{recipe}" if recipe else "the command line"
        raise InputError(_explain(error, kind, origin)) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Raises InputError where there is no such file or it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such recipe.") from None
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: cannot be read as a recipe ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text, so not a TOML recipe.") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: is not valid TOML: {error}.") from None


def parse_overrides(words: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
    """`--a.b 1`, `--a.b=1` -> (["a", "b"], 1); a value is read as TOML, else as the plain text that it is."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise InputError(
                f"{word!r} was not understood: settings are given as --section.key value, after the recipe."
            )
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not rest:
                raise InputError(f"--{name} needs a value.")
            text = rest.pop(0)
        yield name.replace("-", "_").split("."), _toml_value(text)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    node: Any = tree
    for here, key in enumerate(path):
        last = here == len(path) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) > len(node):
                raise InputError(f"--{'.'.join(path)}: {key!r} must be an index from 0 to {len(node)}.")
            if int(key) == len(node):
                node.append({})
            slot: Any = int(key)
        elif isinstance(node, dict):
            slot = key
            if not last:
                following_is_index = path[here + 1].isdigit()
                node.setdefault(key, [] if following_is_index else {})
        else:
            raise InputError(f"--{'.'.join(path)}: {'.'.join(path[:here])} is a value, not a section.")
        if last:
            node[slot] = value
        else:
            node = node[slot]


def _explain(error: ValidationError, kind: type[BaseModel], origin: str) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        given, message = problem["input"], problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = [name for name, _ in fields_of(kind)]
            close = difflib.get_close_matches(where, known, n=1, cutoff=0.6)
            leaf = [name for name in known if name.rpartition(".")[2] == where.rpartition(".")[2]]
            hint = (close or leaf)[:1]
            meant = f"; did you mean {hint[0]}?" if hint else "; --help lists every key"
            lines.append(f"{where} = {_shown(given)} is not a known key{meant}")
        elif problem["type"] == "missing":
            lines.append(f"{where} is missing and has no default")
        elif problem["type"] == "value_error":
            lines.append(f"{where}: {message}" if where else message)
        else:
            lines.append(f"{where} = {_shown(given)}: {message[0].lower()}{message[1:]}")
    return f"{origin}: " + "; ".join(lines) + "."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def fields_of(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf field of a configuration with its dotted name, in the order of declaration."""
    for name, field in kind.model_fields.items():
        section, indexed = _section_of(field.annotation)
        dotted = f"{prefix}{name}"
        if section is None:
            yield dotted, field
        else:
            yield from fields_of(section, f"{dotted}.0." if indexed else f"{dotted}.")


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section inside an annotation, seen through Optional and list, and whether it is a list's item."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    if typing.get_origin(annotation) is Annotated:
        return _section_of(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, list):
        for inner in typing.get_args(annotation):
            section, indexed = _section_of(inner)
            if section is not None:
                return section, indexed or typing.get_origin(annotation) is list
    return None, False


def without_none(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree that TOML can hold: what is unset is left out."""

    def prune(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: prune(value) for key, value in node.items() if value is not None}
        return [prune(item) for item in node] if isinstance(node, list) else node

    return typing.cast(dict[str, Any], prune(tree))
