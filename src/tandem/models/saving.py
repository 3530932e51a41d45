"""Models to disk, so that transformers and peft load them with nothing of ours."""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping

from tandem.config import AdapterSection
from tandem.errors import InputError, reason_of
from tandem.models.loading import padding_id, runs_own_code
from tandem.models.scalar import ScalarModel
from tandem.models.trunk import Trunk
from tandem.models.weight_files import write_weights
from tandem.world import world

ADAPTER_FOLDER = "adapter"
_SCORE = "score.weight"


def save_policy(trunk: Trunk, adapter: str | None, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A causal language model with the adapter folded in; the adapter by itself, for peft, in a subfolder.

    Processes that share the model must all call this; the first of them writes.
    """
    config = copy.deepcopy(trunk.model.config)
    _save(AutoModelForCausalLM, config, trunk.weight_names(), trunk.merged_weights(adapter), trunk, folder)
    if not world().first:
        return
    tokenizer.save_pretrained(folder)
    if adapter is not None:
        _save_adapter(trunk, adapter, "CAUSAL_LM", {}, folder / ADAPTER_FOLDER)


def save_scalar(model: ScalarModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A sequence classifier with the adapter folded in; adapter and head, for peft, in a subfolder.

    It has one label, or one for each bin of a categorical head. What the classifier cannot hold, constants to add
    to its answers and the range of the bins, is written beside it as value.json. Processes that share the model must
    all call this; the first of them writes.
    """
    trunk = model.trunk
    config = copy.deepcopy(trunk.model.config)
    config.num_labels = model.head.out_features
    config.pad_token_id = padding_id(tokenizer, trunk.model)
    prefix = f"{trunk.model.base_model_prefix}."
    head = {_SCORE: model.head.weight.detach() * model.scale}
    names = [name for name in trunk.weight_names() if name.startswith(prefix)]
    weights = chain(trunk.merged_weights(model.adapter), head.items())
    _save(AutoModelForSequenceClassification, config, [*names, *head], weights, trunk, folder)
    if not world().first:
        return
    tokenizer.save_pretrained(folder)
    if model.histogram is not None:
        _write_note(folder, {"histogram": asdict(model.histogram), "add": model.head.bias.tolist()})
    elif model.head.bias is not None:
        _write_note(folder, {"add": float(model.shift + model.scale * model.head.bias.detach())})
    if model.adapter is not None:
        extra = {f"base_model.model.{name}": tensor for name, tensor in head.items()}
        _save_adapter(trunk, model.adapter, "SEQ_CLS", extra, folder / ADAPTER_FOLDER)


def _write_note(folder: Path, note: dict[str, Any]) -> None:
    (folder / "value.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _save(
    kind: Any, config: Any, names: Sequence[str], weights: Iterable[tuple[str, Tensor]], trunk: Trunk, folder: Path
) -> None:
    """Write a model of a kind: of the weights that come, those with these names that it has places for."""
    with torch.device("meta"):
        shell = kind.from_config(config, dtype=trunk.model.dtype, trust_remote_code=runs_own_code(trunk.model))
    places, tied = shell.state_dict(), shell.all_tied_weights_keys
    layout = {name: places[name] for name in names if name in places and name not in tied}
    if unfilled := [name for name in places if name not in layout and name not in tied]:
        raise RuntimeError(f"saving {type(shell).__name__}: no weights for {unfilled[:3]}")
    wanted = _only(layout, weights)
    if world().first:
        if shell.can_generate():
            shell.generation_config = _savable(trunk.model.generation_config)
        folder.mkdir(parents=True, exist_ok=True)
        _write(shell, layout, wanted, folder)
    # Those that share the model gather each weight together, whether it is written or not.
    deque(wanted, maxlen=0)


def _write(
    shell: PreTrainedModel, layout: Mapping[str, Tensor], weights: Iterable[tuple[str, Tensor]], folder: Path
) -> None:
    """A model's folder: its configuration, and its weights as they come.

    Where transformers saves weights under other names or in other shapes than a model has them, they are collected
    first.
    """
    if not get_model_conversion_mapping(shell, add_legacy=False):
        shell.save_pretrained(folder, state_dict={})
        write_weights(folder, layout, weights)
        return
    shell.load_state_dict({name: tensor.to(layout[name].dtype) for name, tensor in weights}, assign=True, strict=False)
    shell.tie_weights()
    shell.save_pretrained(folder)


def _only(names: Collection[str], weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Those of the weights with these names; none is held while the next one is made."""
    for name, tensor in weights:
        if name in names:
            yield name, tensor
        del tensor


def _savable(config: GenerationConfig) -> GenerationConfig:
    """transformers loads generation settings that it refuses to save; of those only the special tokens are kept."""
    try:
        config.validate(strict=True)
    except ValueError:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return GenerationConfig(**{name: getattr(config, name) for name in names})
    return config


def _save_adapter(trunk: Trunk, adapter: str, task: str, extra: dict[str, Tensor], folder: Path) -> None:
    config, state = trunk.adapter_state(adapter)
    config = copy.deepcopy(config)
    config.task_type = task
    config.base_model_name_or_path = trunk.model.name_or_path
    config.inference_mode = True
    if extra:
        config.modules_to_save = ["score"]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in (state | extra).items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def load_adapter(trunk: Trunk, name: str, settings: AdapterSection, folder: Path) -> nn.Linear:
    """Put a saved scalar adapter on a trunk under a name; returns its head.

    Raises InputError where the adapter does not fit this trunk.
    """
    try:
        saved = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{folder}: the adapter cannot be read: {reason_of(error)}. Copy the reward model's folder again, whole."
        ) from error
    weight = saved.pop(f"base_model.model.{_SCORE}", None)
    trunk.add_adapter(name, settings)
    _, own = trunk.adapter_state(name)
    if weight is None or own.keys() != saved.keys() or any(own[key].shape != saved[key].shape for key in own):
        raise InputError(
            f"{folder}: the adapter was not trained on {trunk.model.name_or_path!r} (its layers differ); set "
            'policy.model to the base that it was trained on, or sharing.mode = "separate".'
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(saved[key])
    for parameter in trunk.adapter_parameters(name):
        parameter.requires_grad_(False)
    head = nn.Linear(weight.shape[1], 1, bias=False, device=trunk.device)
    head.load_state_dict({"weight": weight.float()})
    return head.requires_grad_(False)
