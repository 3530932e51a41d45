"""What a run can be told.

A configuration is frozen. Names carry their unit; a field's description is what `--help` prints.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from tandem.consistency import (
    impossible,
    impossible_evaluation,
    impossible_from_data,
    without_effect,
)

_LONGEST_NAME = 255


def _possible_name(text: str) -> str:
    """A file, folder, model or data set can be called so."""
    if "\0" in text:
        raise ValueError(f"{text!r} holds a zero byte, which no name can; take it out")
    longest = max(text.split("/"), key=len)
    if len(longest.encode()) > _LONGEST_NAME:
        raise ValueError(
            f"{longest[:40]!r}... is longer than the {_LONGEST_NAME} bytes that a name can have; shorten it"
        )
    return text


def _at_least_one_or_off(value: object) -> object:
    """One message for both kinds: of a union each member would complain by itself."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < math.inf
    if value is None or value == "off" or number:
        return value
    raise PydanticCustomError("at_least_one_or_off", 'input should be greater than or equal to 1, or "off"')


Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Passes = Annotated[float, Field(gt=0, le=10_000)]
Temperature = Annotated[float, Field(ge=0.01, le=100)]
NonEmptyText = Annotated[str, Field(min_length=1)]
NonEmpty = Annotated[str, Field(min_length=1), AfterValidator(_possible_name)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FolderSection(Section):
    """Where what is done is kept."""

    directory: NonEmpty = Field("runs/{stage}", description="the run's folder; {stage} is the command's name")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of everything random")


class RunSection(FolderSection):
    """Where a training run is kept, and how it ends."""

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        ["tensorboard"], description="where metrics go besides metrics.jsonl"
    )
    grace_seconds: Positive = Field(
        30.0, description="after SIGTERM the state is saved within this time; the step at hand ends or is given up"
    )
    max_faults_in_a_row: Count = Field(
        3, description="the run stops once so many steps in a row were skipped for numbers that are not finite"
    )


class CheckpointSection(Section):
    """When a run's state is saved, and how much of it is kept."""

    every_minutes: Positive = Field(10.0, description="minutes between checkpoints")
    every_steps: Count | None = Field(None, description="steps between checkpoints, besides those by the clock")
    keep: Count = Field(2, description="the newest checkpoints that are kept")
    best_metric: str | None = Field(
        None, description="a metric whose best checkpoint is kept too, such as heldout/objective/score"
    )
    best_is: Literal["highest", "lowest"] = Field("highest", description="which value of best_metric is the best")
    patience: Count | None = Field(
        None,
        description="evaluations in a row that may fail to better best_metric; then training ends, and the best "
        "checkpoint's models are saved",
    )
    spare_copy: bool = Field(
        True,
        description="keep what trains twice in memory while an update runs that takes over 10 s, so that a SIGTERM "
        "within it loses nothing",
    )

    @model_validator(mode="after")
    def _meant(self) -> Self:
        for name, value, idle in (("best_is", self.best_is, "highest"), ("patience", self.patience, None)):
            if self.best_metric is None and value != idle:
                raise ValueError(f"{name} has no effect here: it needs best_metric; leave it out")
        return self


class ComputeSection(Section):
    """How the arithmetic is done; but for rounding, none of it changes what is computed."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="type of the matrix products; auto takes bfloat16 where the hardware multiplies it faster. "
        "Master weights and optimiser state are float32 either way",
    )
    tokens_per_microbatch: Count = Field(4096, description="tokens (with padding) in one forward and backward")
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with a model; only for models you trust"
    )


class JointComputeSection(ComputeSection):
    """As in the other stages, with what pays in a long one."""

    compiled: bool | None = Field(
        None,
        description="compute the models' layers by code that torch's compiler makes at the start, in a minute or two "
        "(if unset: on a CPU, in a run that is long enough to earn that back); in one process",
    )


class ParallelSection(Section):
    """How many processes train together, and how they share the models."""

    processes: Count = Field(1, description="processes that train together, each on its own GPU where there are any")
    replicate: Count = Field(
        1, description="copies of the models: each is cut over processes / replicate of them (1 cuts over all)"
    )
    activation_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass, a layer at a time, to need less memory"
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.processes % self.replicate:
            raise ValueError(
                f"replicate = {self.replicate} does not divide the {self.processes} processes; give a divisor"
            )
        return self


class OptimizerSection(Section):
    """AdamW for one model."""

    lr: Positive = Field(1e-5, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="course of the learning rate after the warm-up; linear and cosine end at zero"
    )
    warmup_fraction: Fraction = Field(0.0, description="share of all updates over which lr rises from zero")
    max_grad_norm: Positive = Field(1.0, description="gradients are scaled down to this norm")
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay")
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.999], description="AdamW's decay rates"
    )


class FineTuningSection(OptimizerSection):
    """AdamW where one model is trained from data: a short rise, then down to zero."""

    lr: Positive = Field(2e-5, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="course of the learning rate after the warm-up; linear and cosine end at zero"
    )
    warmup_fraction: Fraction = Field(0.05, description="share of all updates over which lr rises from zero")


class PreferenceTuningSection(FineTuningSection):
    """AdamW where a policy learns from preferences: small steps, since nothing samples what becomes of it."""

    lr: Positive = Field(1e-6, description="peak learning rate")


class AdapterSection(Section):
    """LoRA (Hu et al. 2021)."""

    rank: Count = Field(16, description="rank of each adapter")
    alpha: Count = Field(32, description="scale: the adapter's output is multiplied by alpha / rank")
    upper_layers: Count | None = Field(
        None,
        description="adapt only this many layers, counted from the top (all if unset). What lies below is "
        "frozen and, where the models share it, runs once for all of them",
    )


class StreamSection(Section):
    """Whether rows are read whole or while training goes on."""

    streaming: bool = Field(
        False,
        description="read rows while training goes on, so that memory and start-up do not grow with the data "
        "(docs/streaming.md): not from .json, and steps take the place of epochs",
    )
    buffer_rows: Count = Field(
        10_000,
        description="rows in memory where data.streaming is set: so many are read, given in a random order, and the "
        "next ones read. 1 keeps the order of the file",
    )

    @model_validator(mode="after")
    def _buffer_meant(self) -> Self:
        if not self.streaming and self.buffer_rows != type(self).model_fields["buffer_rows"].default:
            raise ValueError("buffer_rows has no effect here: it is for streaming = true; set that, or leave it out")
        return self


ROW_COLUMNS = ("text", "messages", "prompt", "completion", "chosen", "rejected", "margin")


class RowsSection(StreamSection):
    """Rows in."""

    train: NonEmpty = Field(
        description="a .jsonl, .json, .csv or .parquet file, a folder or pattern (data/*.csv) of several, or a hub id"
    )
    eval: NonEmpty | None = Field(None, description="held-out rows; unset: eval_fraction of train is held out")
    eval_fraction: Fraction = Field(
        0.1,
        description="share of train held out where eval is unset; with streaming, of its first buffer_rows rows",
    )
    split: NonEmpty = Field("train", description="split of train, where it is a hub data set")
    eval_split: NonEmpty = Field("test", description="split of eval, where it is a hub data set")
    columns: dict[str, str] = Field({}, description="standard name -> name in the data, for other conventions")
    max_tokens: Annotated[Count, Field(ge=2)] = Field(1024, description="longest sequence, prompt and answer together")
    too_long: Literal["refuse", "truncate", "drop"] = Field(
        "refuse",
        description="what to do with a longer row; truncated and dropped rows are counted and reported",
    )
    bad_rows: Literal["refuse", "drop"] = Field(
        "refuse",
        description="what to do with a row that cannot be used (an empty answer, equal answers, a wrong role); "
        "dropped ones are counted and reported",
    )

    @model_validator(mode="after")
    def _meant(self) -> Self:
        for name in self.columns:
            if name not in ROW_COLUMNS:
                raise ValueError(
                    f"columns.{name} renames to no standard name; those are {', '.join(ROW_COLUMNS)} "
                    "(standard name = name in the data)"
                )
        if self.eval is not None and self.eval_fraction != type(self).model_fields["eval_fraction"].default:
            raise ValueError("eval_fraction has no effect here: eval gives the held-out rows; leave it out")
        return self


class SftConfig(Section):
    """Supervised fine-tuning: the likelihood of the given answers."""

    model: NonEmpty = Field(description="directory or hub id of a causal language model")
    epochs: Passes = Field(1.0, description="passes over the data")
    steps: Count | None = Field(None, description="optimiser steps, in the place of epochs; data.streaming needs it")
    sequences_per_minibatch: Count = Field(32, description="sequences in one optimiser step")
    eval_every: Count = Field(50, description="steps between evaluations on held-out rows")
    data: RowsSection
    optimizer: FineTuningSection = FineTuningSection()
    adapters: AdapterSection | None = Field(None, description="train LoRA adapters instead of all weights")
    run: RunSection = RunSection()
    checkpoints: CheckpointSection = CheckpointSection()
    compute: ComputeSection = ComputeSection()
    parallel: ParallelSection = ParallelSection()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for problem in impossible_from_data(self, self.sequences_per_minibatch, "sequences"):
            raise ValueError(problem)
        return self


class RewardConfig(Section):
    """Reward model from preferences: Bradley-Terry."""

    model: NonEmpty = Field(description="directory or hub id to start from, causal or one-label classifier")
    epochs: Passes = Field(1.0, description="passes over the data")
    steps: Count | None = Field(None, description="optimiser steps, in the place of epochs; data.streaming needs it")
    pairs_per_minibatch: Count = Field(32, description="preference pairs in one optimiser step")
    centring_weight: NonNegative = Field(
        0.0, description="weight of (score of chosen + score of rejected)^2, which draws the scores' middle to 0"
    )
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
    checkpoints: CheckpointSection = CheckpointSection()
    compute: ComputeSection = ComputeSection()
    parallel: ParallelSection = ParallelSection()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for problem in impossible_from_data(self, self.pairs_per_minibatch, "pairs"):
            raise ValueError(problem)
        return self


class DpoConfig(Section):
    """Direct preference optimisation: the policy from preferences, with no reward model between."""

    model: NonEmpty = Field(description="directory or hub id of a causal language model; it is the reference too")
    loss: Literal["sigmoid", "ipo"] = Field(
        "sigmoid", description="sigmoid: DPO. ipo: the margin is drawn to 1 / (2 beta) instead of without end"
    )
    beta: Positive = Field(0.1, description="how dearly leaving the reference is paid, in reward per nat")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="chance that a preference is the wrong way round (sigmoid only)"
    )
    epochs: Passes = Field(1.0, description="passes over the data")
    steps: Count | None = Field(None, description="optimiser steps, in the place of epochs; data.streaming needs it")
    pairs_per_minibatch: Count = Field(32, description="preference pairs in one optimiser step")
    eval_every: Count = Field(50, description="steps between evaluations on held-out pairs")
    data: RowsSection
    optimizer: PreferenceTuningSection = PreferenceTuningSection()
    adapters: AdapterSection | None = Field(None, description="train LoRA adapters instead of all weights")
    run: RunSection = RunSection()
    checkpoints: CheckpointSection = CheckpointSection()
    compute: ComputeSection = ComputeSection()
    parallel: ParallelSection = ParallelSection()

    @model_validator(mode="after")
    def _meant(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing > 0:
            raise ValueError('label_smoothing has no effect here: it is for loss = "sigmoid"; leave it out')
        for problem in impossible_from_data(self, self.pairs_per_minibatch, "pairs"):
            raise ValueError(problem)
        return self


class PromptSourceSection(Section):
    """Prompts in."""

    prompts: NonEmpty = Field(
        description="a .jsonl, .json, .csv or .parquet file, a folder or pattern (data/*.csv) of several, or a hub id"
    )
    split: NonEmpty = Field("train", description="split of prompts, where they are a hub data set")
    columns: dict[str, str] = Field({}, description="standard name -> name in the data, for other conventions")
    max_prompt_tokens: Count = Field(1024, description="longest prompt")
    too_long: Literal["refuse", "drop"] = Field(
        "refuse", description="what to do with a longer prompt; dropped ones are counted and reported"
    )
    bad_rows: Literal["refuse", "drop"] = Field(
        "refuse",
        description="what to do with a row that cannot be used (no prompt, a wrong role); dropped ones are counted and "
        "reported",
    )


class PromptsSection(PromptSourceSection, StreamSection):
    """Prompts in, to train on and to measure on."""

    eval_prompts: NonEmpty | None = Field(None, description="held-out prompts, measured before and after")
    eval_split: NonEmpty = Field("test", description="split of eval_prompts, where they are a hub data set")


class SamplingSection(Section):
    """How responses are sampled."""

    responses_per_prompt: Count = Field(1, description="responses sampled for each prompt")
    max_new_tokens: Count = Field(128, description="longest response")
    temperature: Temperature = Field(1.0, description="divides the logits, here and in every log-probability")
    top_k: Count | None = Field(None, description="sample among the k likeliest tokens only")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="sample among the likeliest tokens that together reach this probability"
    )
    sequences_per_batch: Count = Field(64, description="rows that decode together")


class VllmSection(Section):
    """vLLM's engine, where rollout.generator is vllm."""

    kv_cache_gib: Positive = Field(1.0, description="memory for keys and values, in GiB")
    lora: Literal["auto", "adapter", "merge"] = Field(
        "auto",
        description="how a policy that is a LoRA adapter is sent. adapter: as such, over a base that stays. merge: all "
        "weights, the adapter folded in. auto: adapter on a GPU, merge on a CPU, where applying it costs more",
    )
    compiled: bool | None = Field(
        None, description="compile the model and record CUDA graphs (if unset: on a GPU); costs time at the start"
    )
    sleep: bool = Field(True, description="give a GPU's memory back while the models train (staleness 0 only)")
    tensor_parallel: Count = Field(
        1, description="of parallel.processes, how many share one engine, each with a part of its weights"
    )


Gather = Literal["auto", "model", "layer"]


def gathers_by_layer(gather: Gather, whole: float, free: float) -> bool:
    """Whether processes that share a policy of `whole` bytes gather a layer of it at a time to sample, by
    `rollout.gather`; `free` is the memory that is free in one of them."""
    return gather == "layer" or (gather == "auto" and whole > free / 2)


class RolloutSection(SamplingSection):
    """How the responses of a step are sampled."""

    prompts_per_step: Count = Field(32, description="prompts in one step")
    generator: Literal["torch", "vllm"] = Field(
        "torch",
        description="torch: the policy itself, in process. vllm: a vLLM engine that is sent the weights at every step "
        "(docs/generators.md)",
    )
    staleness: Annotated[int, Field(ge=0, le=1)] = Field(
        0,
        description="updates by which the weights that sample may be older than those that train. 1: the next step's "
        "responses are sampled while this step trains, by a generator with weights of its own",
    )
    vllm: VllmSection | None = Field(None, description="settings of vLLM, where generator is vllm")
    gather: Gather = Field(
        "auto",
        description="what each of several processes gathers of the policy to sample. model: all of it, for a batch; "
        "each then decodes at its own pace. layer: one layer at a time, at every token. auto: model, unless that would "
        "take more than half of the memory that is free in one of them",
    )
    recompute_logprobs: Literal["auto", "always"] = Field(
        "auto",
        description="auto: the log-probabilities of sampling are the policy's before the update, where an eighth of a "
        "step's rows agrees to 1e-4 nats with a forward of its own; always: that forward is run over all of them; so "
        "it is in any case where generator is vllm, staleness is 1, or precision is less than float32",
    )

    @property
    def off_policy(self) -> bool:
        """Whether what samples is not exactly the policy that trains."""
        return self.generator != "torch" or self.staleness > 0

    def recomputes(self, width: int) -> bool:
        """Whether all log-probabilities are run again, by models whose numbers have so many bytes.

        Half precision never says the same in sampling and in training.
        """
        return self.recompute_logprobs == "always" or self.off_policy or width < 4


class ScoreSection(Section):
    """From the reward's answer to the score at a sequence's last token, in this order: normalize, scale, clip, then
    the penalties, which are in the units of the clipped score."""

    normalize: Literal["none", "running"] = Field(
        "none", description="running: less the mean and divided by the standard deviation of all scores so far"
    )
    scale: Positive = Field(1.0, description="multiplies scores and process rewards")
    clip: Positive | None = Field(None, description="scores are clipped to [-clip, clip]")
    missing_eos_penalty: NonNegative = Field(0.0, description="taken off the score of a response cut at the limit")
    overlong_from: Count | None = Field(
        None,
        description="responses longer than this lose up to overlong_penalty, in proportion to how near they come to "
        "rollout.max_new_tokens",
    )
    overlong_penalty: NonNegative = Field(1.0, description="what a response of rollout.max_new_tokens loses")
    reference_samples: Count = Field(
        64, description="responses of the reference whose mean score is taken off rewards with center"
    )


class KlSection(Section):
    """How the policy is held near the reference."""

    coefficient: NonNegative = Field(0.05, description="beta: reward per nat of log-ratio to the reference")
    placement: Literal["reward", "loss"] = Field(
        "reward",
        description="reward: at every token, so that advantages carry it; loss: a term of the policy's loss, which "
        "does not see that a token leads to a larger KL later",
    )
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k1", description="k1 is right for the reward, k2 for the loss; k3 as a loss pulls by KL(reference, policy)"
    )
    target: Positive | None = Field(
        None, description="KL in nats a sequence that the coefficient is adapted to hold (fixed if unset)"
    )
    horizon: Positive = Field(10_000.0, description="sequences over which the adaptive coefficient reacts")


class AdvantageSection(Section):
    """Generalised advantage estimation (Schulman et al. 2015)."""

    gamma: Fraction = Field(1.0, description="discount; below 1 is a bias for a reward at the end")
    lambda_policy: Fraction = Field(
        0.95, description="lambda of the advantages that train the policy; 0 is the TD error"
    )
    lambda_value: Fraction = Field(
        1.0, description="lambda of the value targets; 1 is Monte-Carlo, 0 is TD(0), free of the policy's lambda"
    )
    length_adaptive: Positive | None = Field(
        None, description="alpha: lambda_policy becomes 1 - 1 / (alpha * tokens of the response) (VAPO uses 0.05)"
    )
    baseline: Literal["value", "batch", "adaptive"] = Field(
        "value",
        description="value: GAE with the value model. batch: return less the batch's mean return. adaptive: batch in "
        "every step in which the value model explains less than that mean does (EVPO)",
    )
    whiten: bool = Field(False, description="scale advantages to mean 0 and variance 1 over the whole batch")
    at_limit: Literal["score", "bootstrap"] = Field(
        "score",
        description="a response cut at the length limit: score pays its score as at an end; bootstrap pays "
        "none and lets the value of the last state stand for what would follow",
    )


USUAL_IMPORTANCE_CAP = 2.0


class PolicySection(OptimizerSection):
    """The policy's side of the joint update."""

    model: NonEmpty = Field(description="directory or hub id of a causal language model")
    loss: Literal["ppo", "a2c", "book"] = Field(
        "ppo",
        description="ppo: clipped ratio. a2c: log-probability times advantage. book: the textbook's clip, which "
        "ignores the advantage's sign, for study",
    )
    epochs: Count = Field(1, description="passes over a step's rollouts")
    sequences_per_minibatch: Count = Field(32, description="sequences in one optimiser step")
    clip_low: Positive = Field(0.2, description="ratios below 1 - clip_low earn no further gradient")
    clip_high: Positive = Field(
        0.2, description="ratios above 1 + clip_high earn no further gradient; above clip_low it is clip-higher"
    )
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        None, description="ratios above this stop counting where the advantage is negative (3 is usual)"
    )
    entropy_coefficient: NonNegative = Field(0.0, description="bonus per nat of entropy at each token")
    max_approx_kl: Positive | None = Field(
        None, description="a step's remaining policy updates are left out once KL(before, now) a token exceeds this"
    )
    importance_cap: Annotated[float | Literal["off"] | None, BeforeValidator(_at_least_one_or_off)] = Field(
        None,
        description="weigh tokens by min(policy / generator, this): corrects for a generator whose log-probabilities "
        "differ from the trainer's. Unset: 2 where rollout.generator is vllm or rollout.staleness is 1, else off",
    )


class HistogramSection(Section):
    """A categorical value head (HL-Gauss, Farebrother et al. 2024)."""

    low: float = Field(description="lowest value that it can say; returns must lie within the range")
    high: float = Field(description="highest value that it can say")
    bins: Annotated[int, Field(ge=2)] = Field(51, description="bins of equal width")
    sigma: Positive = Field(0.75, description="smoothing of the targets, in bin widths")

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low must be less than high, and {self.low:g} is not less than {self.high:g}")
        return self


class WarmupSection(Section):
    """Steps before the first joint one in which only the value model learns."""

    steps: Count = Field(description="value-only steps, at most where a criterion is set")
    explained_variance: Annotated[float, Field(lt=1)] | None = Field(
        None, description="end earlier, once this much is explained of rollouts that it was not yet trained on"
    )


class AdaptiveSection(Section):
    """Value epochs that follow the explained variance: doubled while it is low, halved once it is high."""

    max_epochs: Count = Field(8, description="most passes over a step's rollouts; value.epochs is the fewest")
    raise_below: float = Field(0.3, description="explained variance under which epochs are doubled")
    lower_above: float = Field(0.7, description="explained variance over which epochs are halved")


class PretrainingSection(Section):
    """Value learning on rollouts that an earlier run saved, before anything is sampled."""

    rollouts: NonEmpty = Field(description="a run's rollouts folder, or one of its .jsonl files")
    epochs: Count = Field(1, description="passes over them; a tenth is held out to measure the explained variance")


class ValueSection(OptimizerSection):
    """The value model's side of the joint update."""

    start: Literal["reward", "policy"] = Field(
        "reward",
        description="start from the reward model (verified), or from the policy's trunk and a zero head",
    )
    loss: Literal["mse", "hl_gauss"] = Field(
        "mse", description="squared error, or cross-entropy over the bins of value.histogram"
    )
    histogram: HistogramSection | None = Field(None, description="the categorical head, where loss is hl_gauss")
    clip: Positive | None = Field(
        None, description="hold values within this of what they were before the step's updates (mse only)"
    )
    normalize: bool = Field(
        False, description="learn in units of the returns' running mean and deviation (PopArt; mse only)"
    )
    epochs: Count = Field(1, description="passes over a step's rollouts")
    sequences_per_minibatch: Count = Field(32, description="sequences in one optimiser step")
    head_lr: Positive | None = Field(None, description="learning rate of the scalar head (lr if unset)")
    coefficient: Positive = Field(
        0.1, description='weight of the value loss beside the policy loss, where sharing.mode is "head"'
    )
    warmup: WarmupSection | None = Field(None, description="value-only steps before the first joint one")
    adaptive: AdaptiveSection | None = Field(None, description="value epochs that follow the explained variance")
    pretraining: PretrainingSection | None = Field(None, description="value learning on saved rollouts")


class RewardSource(Section):
    """One term of the reward: a model, a Python function or a server, times its weight."""

    model: NonEmpty | None = Field(None, description="directory or hub id of a one-label sequence classifier")
    function: NonEmpty | None = Field(None, description="module:function or path/to/file.py:function")
    url: NonEmpty | None = Field(None, description="http(s) address of a reward server (docs/remote-rewards.md)")
    weight: float = Field(1.0, description="multiplies the term")
    center: bool = Field(
        False, description="take off the mean score of responses that the reference gave before training"
    )
    timeout_seconds: Positive = Field(
        60.0, description="longest that one call of a function, or one request to a server, may take"
    )
    retries: int = Field(4, ge=0, description="further tries of a request that the server did not answer well")
    samples_per_request: Count = Field(32, description="most samples in one request to a server")
    requests_at_once: Count = Field(4, description="most requests to a server that are on their way together")
    on_error: Literal["fail", "skip"] = Field(
        "fail",
        description="fail: a sample that gets no score ends the run. skip: it is left out of its step and counted in "
        "reward/skipped; so is one whose score is not finite",
    )

    @field_validator("url")
    @classmethod
    def _web_address(cls, url: str | None) -> str | None:
        if url is not None and not _is_web_address(url):
            raise ValueError(f"{url!r} is no address of a server; give http://host:port/path or https://...")
        return url

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if sum(given is not None for given in (self.model, self.function, self.url)) != 1:
            raise ValueError("give either model or function or url, and one of them only")
        return self


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def term_names(sources: Sequence[RewardSource]) -> list[str]:
    """What metrics call the rewards: reward_model, remote or the function's name; a second of a name gets a number."""
    seen: Counter[str] = Counter()
    names = []
    for source in sources:
        of_others = "remote" if source.model is None else "reward_model"
        name = of_others if source.function is None else source.function.rpartition(":")[2]
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names


class SharingSection(Section):
    """How the four models share parameters."""

    mode: Literal["separate", "adapters", "head"] = Field(
        "separate",
        description="separate: four models. adapters: one frozen trunk, which is the reference, carrying the "
        "others as LoRA adapters. head: the value model is a scalar head on the policy, one pass for both losses",
    )
    head_gradient: Literal["flow", "stop"] = Field(
        "flow", description="whether the value loss reaches the policy's trunk, where mode is head"
    )
    gradient_cosine_every: Count = Field(
        10, description="steps between measurements of the cosine between the two losses' gradients, in mode head"
    )


RuleName = Literal[
    "not_finite",
    "memory_grows",
    "throughput_falls",
    "critic_worse_than_baseline",
    "critic_dead",
    "value_start_biased",
    "critic_lags",
    "return_scale_drifts",
    "signal_decays",
    "kl_does_not_bite",
    "kl_reads_zero",
    "kl_negative",
    "updates_too_large",
    "gradient_conflict",
    "no_signal",
    "learning_rate_too_small",
    "kl_too_strong",
    "entropy_collapse",
    "repetition",
    "length_collapse",
    "length_runaway",
    "no_end",
    "reward_hacking",
    "generator_mismatch",
    "stale_rollouts",
]


class HealthSection(Section):
    """What is done where the metrics say that something is wrong (docs/diagnosis)."""

    act: Literal["warn", "stop", "lower_lr"] = Field(
        "warn",
        description="warn: say what is wrong. stop: end the run too, for what training does. lower_lr: halve the "
        "policy's learning rate too, each time that helps against what begins",
    )
    silence: list[RuleName] = Field([], description="rules that are left out")


class ClusterSection(Section):
    """The processes of a joint run over a cluster (docs/cluster.md); a resource line is what one process takes."""

    kind: Literal["ray"] = Field(description="what places them; --cluster ray in short, --cluster none for no cluster")
    address: NonEmpty | None = Field(
        None,
        description="HOST:PORT of a Ray cluster, or auto for the one that this machine is part of; unset: one is "
        "started on this machine and ends with the run",
    )
    trainer_cpus: Count = Field(1, description="CPUs of each process that trains (parallel.processes)")
    trainer_gpus: NonNegative = Field(0.0, description="GPUs of each process that trains")
    trainer_restarts: int = Field(
        3, ge=0, description="how often in a row a trainer that died starts again without a new checkpoint between"
    )
    generators: Count = Field(1, description="processes that sample, each with a copy of the policy")
    generator_cpus: Count = Field(1, description="CPUs of each generator")
    generator_gpus: NonNegative = Field(0.0, description="GPUs of each generator; a share below 1 is allowed")
    reward_workers: int = Field(
        0, ge=0, description="processes that score, each with all rewards; 0: the trainer scores"
    )
    reward_cpus: Count = Field(1, description="CPUs of each reward worker")
    reward_gpus: NonNegative = Field(0.0, description="GPUs of each reward worker; a share below 1 is allowed")
    samples_per_task: Count = Field(
        8, description="samples that are handed to a generator or reward worker together, and lost together if it dies"
    )
    late_after: Annotated[float, Field(ge=1)] = Field(
        2.0,
        description="a task that takes so many times the median of its step goes to an idle worker too; the first "
        "answer counts",
    )
    silent_seconds: Positive = Field(
        600.0,
        description="a worker that has not answered for so long is ended and replaced; one that loads its models may "
        "take four times as long",
    )

    @model_validator(mode="after")
    def _meant(self) -> Self:
        for name in ("trainer_gpus", "generator_gpus", "reward_gpus"):
            gpus = getattr(self, name)
            if gpus > 1 and gpus != int(gpus):
                raise ValueError(f"{name} = {gpus:g}: above 1 it must be a whole number")
        for name in ("reward_cpus", "reward_gpus"):
            if self.reward_workers == 0 and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect here: it needs reward_workers; leave it out")
        if max(self.generators, self.reward_workers) == 1 and self.late_after != 2.0:
            raise ValueError("late_after has no effect here: there is no second worker; leave it out")
        return self


class PpoConfig(Section):
    """The joint stage: policy and value model trained together under a reward."""

    preset: Literal["book"] | None = Field(
        None, description="defaults of another kind; book: the textbook's literal form, for study"
    )
    steps: Count = Field(100, description="rollout-and-update steps, after those of value.warmup")
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
    health: HealthSection = HealthSection()
    run: RunSection = RunSection()
    checkpoints: CheckpointSection = CheckpointSection()
    compute: JointComputeSection = JointComputeSection()
    parallel: ParallelSection = ParallelSection()
    cluster: ClusterSection | None = Field(None, description="place the run's processes over a cluster")

    @field_validator("cluster", mode="before")
    @classmethod
    def _on_this_machine(cls, given: Any) -> Any:
        """`--cluster none` runs a recipe that has a cluster in one process here."""
        return None if isinstance(given, dict) and given.get("kind") == "none" else given

    @property
    def importance_cap(self) -> float | None:
        """The largest weight of a token where tokens are weighed, by what the recipe says or is silent about."""
        cap = self.policy.importance_cap
        if cap is None:
            return USUAL_IMPORTANCE_CAP if self.rollout.off_policy else None
        return None if cap == "off" else cap

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, tree: Any) -> Any:
        """What a preset says holds wherever the recipe is silent."""
        if isinstance(tree, dict) and isinstance(tree.get("preset"), str) and tree["preset"] in PRESETS:
            return merged(PRESETS[tree["preset"]], tree)
        return tree

    @model_validator(mode="after")
    def _possible(self) -> Self:
        problems = [*impossible(self), *without_effect(self, PRESETS.get(self.preset or "", {}))]
        if problems:
            raise ValueError("; ".join(problems))
        return self


JUDGE_PLACES = ("{prompt}", "{first}", "{second}")


class JudgeSection(Section):
    """A judge behind an OpenAI-compatible chat endpoint, shown every pair in both positions."""

    url: NonEmpty = Field(description="the endpoint's base address, such as http://localhost:8000/v1")
    model: NonEmpty = Field(description="the judging model, by the name that the endpoint has for it")
    prompt: NonEmptyText | None = Field(
        None,
        description="what the judge is asked, with {prompt}, {first} and {second} where they belong; it must ask for "
        "[[A]], [[B]] or [[C]] (a tie). Unset: which is more helpful, accurate, relevant and well written",
    )
    api_key_env: NonEmpty | None = Field(
        None, description="the environment variable that holds the key; the key itself is written nowhere"
    )
    request: dict[str, Any] = Field(
        {"temperature": 0.0}, description="further fields of every request, such as {max_tokens = 500}"
    )
    timeout_seconds: Positive = Field(120.0, description="longest that one request may take")
    retries: int = Field(4, ge=0, description="further tries of a request that was not answered well")
    requests_at_once: Count = Field(8, description="most requests that are on their way together")
    on_error: Literal["fail", "skip"] = Field(
        "fail",
        description="fail: a pair without a verdict ends the evaluation. skip: it is left out and counted",
    )

    @field_validator("url")
    @classmethod
    def _base_address(cls, url: str) -> str:
        if not _is_web_address(url):
            raise ValueError(f"{url!r} is no address of a server; give http://host:port/v1 or https://...")
        parts = urlsplit(url)
        if parts.username or parts.password:
            raise ValueError("the address holds a user name or password, which would be written down; use api_key_env")
        if parts.path.rstrip("/").endswith("/chat/completions"):
            raise ValueError(f"{url!r}: leave /chat/completions out; it is added")
        return url

    @field_validator("prompt")
    @classmethod
    def _has_places(cls, prompt: str | None) -> str | None:
        missing = [place for place in JUDGE_PLACES if prompt is not None and place not in prompt]
        if missing:
            raise ValueError(f"lacks {' and '.join(missing)}; the judge must see the prompt and both responses")
        return prompt

    @field_validator("request")
    @classmethod
    def _no_own_fields(cls, request: dict[str, Any]) -> dict[str, Any]:
        own = sorted({"model", "messages", "stream", "n"} & request.keys())
        if own:
            raise ValueError(f"{' and '.join(own)} cannot be set: the evaluation sets them; leave them out")
        try:
            json.dumps(request, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"holds what JSON has no form for ({error}); give texts, numbers, lists and tables"
            ) from None
        return request


class EvalConfig(Section):
    """Whether a model is better than another one: both answer held-out prompts, and judges compare."""

    model: NonEmpty = Field(description="directory or hub id of the model in question")
    baseline: NonEmpty = Field(description="directory or hub id of the model that it is compared with")
    reference: NonEmpty | None = Field(
        None, description="the model that KL is measured to and best_of_n samples from (baseline if unset)"
    )
    best_of_n: Annotated[int, Field(ge=2, le=1024)] | None = Field(
        None,
        description="compare with the best of so many responses of the reference too, by the score of the first reward",
    )
    benchmarks: list[NonEmpty] = Field(
        [], description='tasks of lm-evaluation-harness to run on both models, such as ["hellaswag"]'
    )
    benchmark_folder: NonEmpty | None = Field(None, description="a folder with the YAML files of tasks of your own")
    benchmark_limit: Count | None = Field(None, description="examples of each benchmark (all if unset)")
    data: PromptSourceSection
    rewards: list[RewardSource] = Field(
        [], description="judges by score, each by itself: the response with the higher score wins"
    )
    judge: JudgeSection | None = Field(None, description="a judge behind a chat endpoint")
    rollout: SamplingSection = SamplingSection()
    run: FolderSection = FolderSection()
    compute: ComputeSection = ComputeSection()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if problems := list(impossible_evaluation(self)):
            raise ValueError("; ".join(problems))
        return self


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "book": {
        "policy": {"loss": "book"},
        "kl": {"placement": "loss", "estimator": "k1"},
        "advantage": {"lambda_policy": 0.0, "lambda_value": 0.0},
    }
}


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees as one; where both say something, `over` holds."""
    out = dict(under)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out
