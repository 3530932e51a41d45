"""What a recipe cannot say together, and what it says in vain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tandem.config import (
        ClusterSection,
        DpoConfig,
        EvalConfig,
        ParallelSection,
        PpoConfig,
        RewardConfig,
        RewardSource,
        Section,
        SftConfig,
    )

# Whether it applies, the section and its name, the fields that it concerns, and why they have no effect.
Idle = tuple[bool, "Section", str, list[str], str]


def impossible(config: PpoConfig) -> Iterator[str]:
    """What a joint recipe cannot have together, each with what to do instead."""
    yield from too_many_processes(config.parallel, "policy.", config.policy.sequences_per_minibatch, "sequences")
    yield from too_many_processes(config.parallel, "value.", config.value.sequences_per_minibatch, "sequences")
    yield from impossible_engines(config)
    yield from not_compiled_in_several_processes(config)
    policy, value, advantage, score = config.policy, config.value, config.advantage, config.score
    head = config.sharing.mode == "head"
    if head and value.start == "reward":
        yield (
            'sharing.mode = "head" puts the value head on the policy, which is no reward model; '
            'set value.start = "policy"'
        )
    if value.start == "reward" and not any(source.model for source in config.rewards):
        yield 'value.start = "reward" needs a reward model in rewards; set value.start = "policy"'
    if config.rollout.vllm is not None and config.rollout.generator != "vllm":
        yield 'rollout.vllm has no effect here: it is for rollout.generator = "vllm"; set that, or leave it out'
    if config.sharing.mode == "separate" and config.adapters is not None:
        yield 'adapters are set, but sharing.mode is "separate"; set sharing.mode = "adapters" or "head"'
    if head and (value.epochs, value.sequences_per_minibatch) != (policy.epochs, policy.sequences_per_minibatch):
        yield (
            'with sharing.mode = "head" one pass serves both losses, so value.epochs and '
            "value.sequences_per_minibatch must be the policy's"
        )
    if head and value.adaptive is not None:
        yield 'value.adaptive changes the value model\'s passes alone, which sharing.mode = "head" cannot; leave it out'
    if policy.loss == "a2c" and policy.epochs > 1 and policy.max_approx_kl is None:
        yield (
            'policy.loss = "a2c" has no clip, so further epochs on the same rollouts go astray; set policy.epochs = 1, '
            "or policy.max_approx_kl"
        )
    if all(source.weight == 0 for source in config.rewards):
        yield "every reward has the weight 0, so there is nothing to learn; give one of them another weight"
    if score.normalize == "running" and any(source.center for source in config.rewards):
        yield 'score.normalize = "running" takes the mean off anyway; leave center out'
    if config.kl.target is not None and config.kl.coefficient == 0:
        yield "kl.target adapts kl.coefficient by factors, and 0 stays 0; start from more than 0"
    if config.kl.placement == "loss" and config.kl.estimator == "k1" and policy.loss != "book":
        yield (
            'kl.estimator = "k1" as a loss has a gradient of mean zero, so it holds nothing; set kl.estimator = "k2", '
            'or kl.placement = "reward"'
        )
    best = config.checkpoints.best_metric
    if best is not None and best.startswith("heldout/") and config.eval_every is None:
        yield f"checkpoints.best_metric = {best!r} is measured only where eval_every and data.eval_prompts are set"
    if config.eval_every is not None and config.data.eval_prompts is None:
        yield "eval_every needs data.eval_prompts"
    if advantage.at_limit == "bootstrap" and (score.missing_eos_penalty > 0 or score.overlong_from is not None):
        yield (
            "the penalties score.missing_eos_penalty and score.overlong_from have no effect on a response cut at the "
            'limit with advantage.at_limit = "bootstrap", which pays it no score; set one of the two'
        )
    if score.overlong_from is not None and score.overlong_from >= config.rollout.max_new_tokens:
        yield (
            f"score.overlong_from = {score.overlong_from} must be less than rollout.max_new_tokens = "
            f"{config.rollout.max_new_tokens}"
        )
    if (value.loss == "hl_gauss") != (value.histogram is not None):
        yield 'value.loss = "hl_gauss" and value.histogram (low, high) go together; set both or neither'
    if value.loss == "hl_gauss" and (value.clip is not None or value.normalize):
        yield 'value.clip and value.normalize are for value.loss = "mse"; a histogram has a range of its own'
    if value.adaptive is not None and value.adaptive.max_epochs < value.epochs:
        yield f"value.adaptive.max_epochs = {value.adaptive.max_epochs} is less than value.epochs = {value.epochs}"
    if value.adaptive is not None and value.adaptive.raise_below >= value.adaptive.lower_above:
        yield "value.adaptive.raise_below must be less than value.adaptive.lower_above"
    if config.cluster is not None:
        yield from _impossible_cluster(config, config.cluster)


def _impossible_cluster(config: PpoConfig, cluster: ClusterSection) -> Iterator[str]:
    """Resource lines that the rest of the recipe leaves no use for."""
    if config.parallel.processes > 1 and cluster.trainer_gpus not in (0, 1):
        yield (
            f"cluster.trainer_gpus = {cluster.trainer_gpus:g}, and each of parallel.processes = "
            f"{config.parallel.processes} trains on one GPU; set cluster.trainer_gpus = 1"
        )
    device = config.compute.device
    gpus = {name: getattr(cluster, name) for name in ("trainer_gpus", "generator_gpus", "reward_gpus")}
    for name, count in gpus.items():
        if device == "cpu" and count > 0:
            yield f'cluster.{name} has no effect with compute.device = "cpu"; leave it out, or leave the device to auto'
    if device.startswith("cuda") and (device != "cuda" or cluster.trainer_gpus == 0):
        yield (
            f"compute.device = {device!r}, and with a cluster the resource lines say who has a GPU; leave it out and "
            "set cluster.trainer_gpus"
        )
    if config.rollout.vllm is not None and config.rollout.vllm.lora == "adapter":
        yield (
            'rollout.vllm.lora = "adapter" has no effect with a cluster: its generators are sent all weights, with the '
            "adapter folded in; leave it out"
        )
    samples = config.rollout.prompts_per_step * config.rollout.responses_per_prompt
    tasks = -(-samples // cluster.samples_per_task)
    for name in ("generators", "reward_workers"):
        if getattr(cluster, name) > tasks:
            yield (
                f"cluster.{name} = {getattr(cluster, name)}, and a step of {samples} samples makes {tasks} tasks of "
                f"cluster.samples_per_task = {cluster.samples_per_task}, so some would never work; lower one of the two"
            )
    slowest = max((source.timeout_seconds for source in config.rewards if source.model is None), default=0.0)
    if cluster.reward_workers and cluster.silent_seconds <= slowest:
        yield (
            f"cluster.silent_seconds = {cluster.silent_seconds:g} must be more than the rewards' timeout_seconds = "
            f"{slowest:g}"
        )


def impossible_from_data(config: SftConfig | RewardConfig | DpoConfig, rows: int, kind: str) -> Iterator[str]:
    """What a stage cannot do that learns from data, with so many rows in a minibatch.

    How long to train is said by epochs or by steps; of a stream nobody knows the rows beforehand.
    """
    if config.steps is not None and config.epochs != type(config).model_fields["epochs"].default:
        yield "epochs has no effect here: steps says how long to train; leave one of them out"
    if config.data.streaming and config.steps is None:
        yield (
            "with data.streaming the rows are not counted before they train, so epochs has no meaning; set steps "
            "(passes * rows / rows of a minibatch)"
        )
    yield from too_many_processes(config.parallel, "", rows, kind)


def too_many_processes(parallel: ParallelSection, section: str, rows: int, kind: str) -> Iterator[str]:
    """Every process needs a row of each minibatch."""
    if parallel.processes > rows:
        yield (
            f"parallel.processes = {parallel.processes} is more than the {rows} {kind} of a minibatch "
            f"({section}{kind}_per_minibatch); take at most {rows} processes, or larger minibatches"
        )


def impossible_engines(config: PpoConfig) -> Iterator[str]:
    """vLLM engines that several processes share are made of those that train."""
    share = 1 if config.rollout.vllm is None else config.rollout.vllm.tensor_parallel
    if share > 1 and config.cluster is not None:
        yield (
            f"rollout.vllm.tensor_parallel = {share}, and over a cluster each generator is one process; leave one of "
            "the two out"
        )
    elif config.parallel.processes % share:
        yield (
            f"rollout.vllm.tensor_parallel = {share} must divide parallel.processes = {config.parallel.processes}, "
            "the processes that share engines"
        )


def not_compiled_in_several_processes(config: PpoConfig) -> Iterator[str]:
    """Layers that are cut over processes, or computed twice, are not compiled, and neither are those of workers."""
    several = config.cluster is not None or config.parallel.processes > 1 or config.parallel.activation_checkpointing
    if config.compute.compiled and several:
        yield (
            "compute.compiled = true goes with one process that keeps its activations; leave it out, or leave out "
            "[cluster] and [parallel]"
        )


def without_effect(config: PpoConfig, preset: Mapping[str, Any]) -> Iterator[str]:
    """Settings that were changed from their defaults, or their preset's, and change nothing, each with why."""
    head, loss = config.sharing.mode == "head", config.policy.loss
    advantage = config.advantage
    idle: list[Idle] = [
        (
            head,
            config.value,
            "value",
            ["schedule", "warmup_fraction", "max_grad_norm", "weight_decay", "betas"],
            'sharing.mode = "head" has one optimiser, the policy\'s',
        ),
        (not head, config.value, "value", ["coefficient"], 'it is for sharing.mode = "head"'),
        (
            not head,
            config.sharing,
            "sharing",
            ["head_gradient", "gradient_cosine_every"],
            'it is for sharing.mode = "head"',
        ),
        (loss == "a2c", config.policy, "policy", ["clip_low", "clip_high", "dual_clip"], "a2c has no clip"),
        (loss == "book", config.policy, "policy", ["dual_clip"], "the textbook's clip has no second one"),
        (
            advantage.baseline == "batch",
            advantage,
            "advantage",
            ["lambda_policy", "length_adaptive"],
            'baseline = "batch" makes advantages without a lambda',
        ),
        (
            advantage.length_adaptive is not None and advantage.baseline != "batch",
            advantage,
            "advantage",
            ["lambda_policy"],
            "length_adaptive takes its place",
        ),
        (
            config.score.overlong_from is None,
            config.score,
            "score",
            ["overlong_penalty"],
            "it needs score.overlong_from",
        ),
        (
            not any(source.center for source in config.rewards),
            config.score,
            "score",
            ["reference_samples"],
            "no reward asks for center",
        ),
        (config.kl.target is None, config.kl, "kl", ["horizon"], "it needs kl.target"),
        (
            config.parallel.processes == 1,
            config.rollout,
            "rollout",
            ["gather"],
            "one process has the whole policy (parallel.processes = 1)",
        ),
        (
            config.cluster is not None
            and config.parallel.processes > 1
            and not any(source.center for source in config.rewards),
            config.rollout,
            "rollout",
            ["gather"],
            "each generator of a cluster has the whole policy",
        ),
        *_idle_in_rewards(config.rewards),
    ]
    yield from _changed_in_vain(idle, preset)


def impossible_evaluation(config: EvalConfig) -> Iterator[str]:
    """What the recipe of an evaluation cannot have together, and what has no effect in it."""
    if not config.rewards and config.judge is None:
        yield (
            "nobody judges; give a reward model (--rewards.0.model DIR), a function (--rewards.0.function FILE:NAME), "
            "a reward server (--rewards.0.url URL) or a chat endpoint (--judge.url URL --judge.model NAME)"
        )
    if config.best_of_n is not None and not config.rewards:
        yield "best_of_n needs a judge by score, whose best response it takes; give one in rewards, or leave it out"
    for name in ("benchmark_folder", "benchmark_limit"):
        if getattr(config, name) is not None and not config.benchmarks:
            yield f"{name} has no effect here: it needs benchmarks; leave it out"
    for index, source in enumerate(config.rewards):
        if source.weight != 1.0 or source.center:
            yield (
                f"rewards.{index}.weight and center have no effect here: each reward judges by itself, by which of two "
                "scores is higher; leave them out"
            )
    yield from _changed_in_vain(_idle_in_rewards(config.rewards), {})


def _changed_in_vain(idle: Iterable[Idle], preset: Mapping[str, Any]) -> Iterator[str]:
    for applies, section, name, fields, why in idle:
        for field in fields:
            default = preset.get(name, {}).get(field, type(section).model_fields[field].default)
            if applies and getattr(section, field) != default:
                yield f"{name}.{field} has no effect here: {why}; leave it out"


def _idle_in_rewards(sources: Sequence[RewardSource]) -> Iterator[Idle]:
    for index, source in enumerate(sources):
        name, of_requests = f"rewards.{index}", ["retries", "samples_per_request", "requests_at_once"]
        yield source.model is not None, source, name, ["timeout_seconds"], "it is for a function or a url"
        yield source.url is None, source, name, of_requests, "it is for a url"
