"""Whether the layers of a joint run's models are compiled, and the trial that compiles them before the run begins."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor

from tandem.config import PpoConfig
from tandem.errors import InputError
from tandem.models.causal import CausalPolicy
from tandem.models.compiling import compile_layers
from tandem.models.scoring import DecoderScorer
from tandem.models.sharing import JointModels, RewardModel
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
    if config.compute.compiled and policy.device.type == "cpu" and not _compiler_is_here():
        raise InputError("compute.compiled = true needs a C++ compiler, and there is no g++ here; install one.")
    return config.compute.compiled


def _by_itself(config: PpoConfig, policy: CausalPolicy) -> bool:
    in_one_process = config.cluster is None and world().alone and not world().checkpointing
    return in_one_process and policy.device.type == "cpu" and _is_long(config, policy) and _compiler_is_here()


def _compiler_is_here() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None


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

    The code depends on the sizes that it is first made for; on these, a run that is gone on with computes as one that
    was not interrupted. `sampler` is the policy that is asked for tokens. Raises InputError where layers cannot be
    compiled and the recipe wants it; where the recipe is silent, a person is told.
    """
    scorers = [reward.scorer.model for reward in rewards if isinstance(reward.scorer, DecoderScorer)]
    learning: list[Model] = [(models.policy.trunk, models.policy.adapter), (models.value.trunk, models.value.adapter)]
    reading = [*learning, (models.reference.trunk, models.reference.adapter)]
    reading += [(scorer.trunk, scorer.adapter) for scorer in scorers]
    trunks = [trunk for trunk, _ in reading] + [sampler.trunk]
    with ExitStack() as undo, progress.console.status("compiling the models' layers"):
        for trunk in dict.fromkeys(trunks):
            undo.callback(compile_layers(trunk.layers))
        try:
            _try_out(dict.fromkeys(reading), dict.fromkeys(learning), sampler)
        except Exception as error:
            _cannot(config, error, progress)
        else:
            undo.pop_all()


def _cannot(config: PpoConfig, error: Exception, progress: Progress) -> None:
    said = str(error).strip().splitlines() or [type(error).__name__]
    if config.compute.compiled:
        raise InputError(
            f"compute.compiled = true: the layers cannot be compiled ({said[0]}); leave it out."
        ) from error
    progress.say(f"the layers are not compiled: {said[0]}")


def _try_out(reading: Iterable[Model], learning: Iterable[Model], sampler: CausalPolicy) -> None:
    texts = whole_texts([[row + place for place in range(_LENGTH)] for row in range(_ROWS)])
    for trunk, adapter in reading:
        _read(trunk, adapter, texts)
    for trunk, adapter in learning:
        _learn(trunk, adapter, texts)
    _sample(sampler, texts.ids.to(sampler.device))


@torch.no_grad()
def _read(trunk: Trunk, adapter: str | None, texts: Tokens) -> None:
    trunk.hidden(trunk.prepare(texts, texts.ids.numel()), adapter)
    trunk.forget()


def _learn(trunk: Trunk, adapter: str | None, texts: Tokens) -> None:
    hidden = trunk.hidden(trunk.prepare(texts, texts.ids.numel()), adapter)
    hidden.sum().backward()
    trunk.forget()
    for parameter in trunk.model.parameters():
        parameter.grad = None


def _sample(policy: CausalPolicy, ids: Tensor) -> None:
    """Two tokens after prompts with padding and without; a row leaves between them, as rows do."""
    prompts, tokens = ids[:, : _LENGTH // 2], ids[:, :1]
    rows, length = prompts.shape
    with policy.gathered():
        for mask in (None, torch.ones(rows, length + 2, dtype=torch.int64, device=ids.device)):
            if mask is not None:
                mask[: rows // 2, 0] = 0
            cache = policy.new_cache(_LENGTH)
            positions = torch.arange(length, device=ids.device).expand(rows, length)
            policy.next_logits(prompts, _first(mask, rows, length), positions, cache)
            policy.next_logits(tokens, _first(mask, rows, length + 1), tokens + length, cache)
            cache.batch_select_indices(torch.arange(rows - 1, device=ids.device))
            policy.next_logits(tokens[1:], _first(mask, rows - 1, length + 2), tokens[1:] + length, cache)


def _first(mask: Tensor | None, rows: int, columns: int) -> Tensor | None:
    return None if mask is None else mask[:rows, :columns]
