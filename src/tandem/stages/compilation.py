"""Whether the layers of a joint run's models are compiled, and the trial that compiles them before the run begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tandem.config import PpoConfig
from tandem.errors import InputError
from tandem.models.building import compiler
from tandem.models.causal import CausalPolicy
from tandem.models.compiling import CompiledLayers, CompiledPasses, KernelSampling
from tandem.models.scoring import DecoderScorer
from tandem.models.sharing import JointModels, RewardModel
from tandem.models.source import positions
from tandem.models.trunk import Trunk
from tandem.run import Progress
from tandem.types import Tokens, whole_texts
from tandem.world import world

Model = tuple[Trunk, str | None]
"""A trunk, and the adapter that it computes under."""
_EARNS_IT_BACK = 1e13
"""Response tokens of a run times parameters of its policy: from there on more is saved than compiling takes."""
_ROWS, _LENGTH = 19, 67
"""Of the texts of the trial: sizes that nothing else in a model has, so that none is taken for another."""


def compiles(config: PpoConfig, policy: CausalPolicy) -> bool:
    """Whether this run compiles. Raises InputError where the recipe wants it and there is no compiler."""
    if config.compute.compiled is None:
        return _by_itself(config, policy)
    if config.compute.compiled and policy.device.type == "cpu" and compiler() is None:
        raise InputError("compute.compiled = true needs a C++ compiler, and there is no g++ here; install one.")
    return config.compute.compiled


def _by_itself(config: PpoConfig, policy: CausalPolicy) -> bool:
    in_one_process = config.cluster is None and world().alone and not world().checkpointing
    return in_one_process and policy.device.type == "cpu" and _is_long(config, policy) and compiler() is not None


def _is_long(config: PpoConfig, policy: CausalPolicy) -> bool:
    rollout = config.rollout
    responses = rollout.prompts_per_step * rollout.responses_per_prompt
    parameters = sum(parameter.numel() for parameter in policy.trunk.model.parameters())
    return config.steps * responses * rollout.max_new_tokens * parameters >= _EARNS_IT_BACK


def compile_models(
    config: PpoConfig,
    models: JointModels,
    rewards: Iterable[RewardModel],
    sampler: CausalPolicy,
    progress: Progress,
) -> None:
    """Compile the layers of all models, in each way that a step calls them, on texts that are always the same.

    The code depends on the sizes that it is first made for: made here alone, it is the same in a run that is gone on
    with, so what this process has compiled before is forgotten. What the run calls in another way yet is computed as it
    is written. `sampler` is the policy, or the copy of it that samples. Raises InputError where layers cannot be
    compiled and the recipe wants it; where the recipe is silent, a person is told.
    """
    scorers = [reward.scorer.model for reward in rewards if isinstance(reward.scorer, DecoderScorer)]
    learning: list[Model] = [(models.policy.trunk, models.policy.adapter), (models.value.trunk, models.value.adapter)]
    reading = [*learning, (models.reference.trunk, models.reference.adapter)]
    reading += [(scorer.trunk, scorer.adapter) for scorer in scorers]
    progress.say("compiling the models' layers, which takes up to two minutes the first time")
    torch.compiler.reset()
    samplers = dict.fromkeys([models.policy, sampler])
    trunks = dict.fromkeys([trunk for trunk, _ in reading] + [policy.trunk for policy in samplers])
    compiled: list[KernelSampling | CompiledPasses | CompiledLayers] = []
    try:
        with progress.console.status("compiling"):
            compiled += _sampling_by_kernels(samplers, progress)
            compiled.append(CompiledPasses([models.policy, models.reference]))
            compiled.extend(CompiledLayers(trunk.layers) for trunk in trunks)
            texts = _texts(models.policy.trunk)
            _try_out(dict.fromkeys(reading), dict.fromkeys(learning), samplers, texts)
            _try_logprobs(models, texts, config.policy.entropy_coefficient > 0)
    except Exception as error:
        for part in compiled:
            part.undo()
        _cannot(config, error, progress)
    else:
        for part in compiled:
            part.settle()


def _sampling_by_kernels(samplers: Iterable[CausalPolicy], progress: Progress) -> Iterator[KernelSampling]:
    try:
        yield KernelSampling(samplers)
    except RuntimeError as error:
        progress.say(f"the run is slower than it could be: {error}")


def _cannot(config: PpoConfig, error: Exception, progress: Progress) -> None:
    said = str(error).strip().splitlines() or [type(error).__name__]
    if config.compute.compiled:
        raise InputError(
            f"compute.compiled = true: the layers cannot be compiled ({said[0]}); leave it out."
        ) from error
    progress.say(f"the layers are not compiled: {said[0]}")


def _try_out(
    reading: Iterable[Model], learning: Iterable[Model], samplers: Iterable[CausalPolicy], texts: Tokens
) -> None:
    for trunk, adapter in reading:
        _read(trunk, adapter, texts)
    for trunk, adapter in learning:
        _learn(trunk, adapter, texts)
    for policy in samplers:
        _sample(policy, texts.ids.to(policy.device))


def _texts(trunk: Trunk) -> Tokens:
    config = trunk.model.config
    length, vocabulary = min(_LENGTH, positions(config) or _LENGTH), config.get_text_config().vocab_size
    return whole_texts([[(row + place) % vocabulary for place in range(length)] for row in range(_ROWS)])


@torch.no_grad()
def _read(trunk: Trunk, adapter: str | None, texts: Tokens) -> None:
    trunk.hidden(trunk.prepare(texts, texts.ids.numel()), adapter)
    trunk.forget()


def _learn(trunk: Trunk, adapter: str | None, texts: Tokens) -> None:
    with _nothing_left(trunk):
        trunk.hidden(trunk.prepare(texts, texts.ids.numel()), adapter).sum().backward()


def _try_logprobs(models: JointModels, texts: Tokens, entropies: bool) -> None:
    """As the reference is asked for them, and as the policy is in an update."""
    reference, policy = models.reference, models.policy
    with torch.no_grad():
        reference.logprobs(reference.prepare(texts, texts.ids.numel()))
    reference.trunk.forget()
    with _nothing_left(policy.trunk):
        tokens = policy.prepare(texts, texts.ids.numel())
        asked = policy.logprobs_and_entropies(tokens) if entropies else [policy.logprobs(tokens)]
        torch.cat(list(asked)).sum().backward()


@contextmanager
def _nothing_left(trunk: Trunk) -> Iterator[None]:
    try:
        yield
    finally:
        trunk.forget()
        for parameter in trunk.model.parameters():
            parameter.grad = None


def _sample(policy: CausalPolicy, ids: Tensor) -> None:
    """After prompts that are all of one length, and after some that are not."""
    padded = torch.ones_like(ids)
    padded[: len(ids) // 2, 0] = 0
    with policy.gathered():
        _two_tokens(policy, ids, None)
        _two_tokens(policy, ids, padded)


def _two_tokens(policy: CausalPolicy, ids: Tensor, mask: Tensor | None) -> None:
    """Two tokens after prompts; a row leaves between them, as rows do."""
    rows, length = len(ids), ids.shape[1] // 2
    cache = policy.new_cache(ids.shape[1])

    def read(staying: int, first: int, end: int) -> None:
        places = torch.arange(first, end, device=ids.device).expand(staying, -1)
        seen = None if mask is None else mask[:staying, :end]
        policy.next_logits(ids[:staying, first:end], seen, places, cache)

    read(rows, 0, length)
    read(rows, length, length + 1)
    cache.batch_select_indices(torch.arange(rows - 1, device=ids.device))
    read(rows - 1, length + 1, length + 2)
