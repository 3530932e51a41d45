"""Tokenizers and weights from directories or the hub, with errors that a person can act on."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tandem.errors import InputError, reason_of
from tandem.models.source import check_labels, check_tokenizer_files, is_classifier, loading, positions, read_config
from tandem.world import world

REWARD_CARD = "tandem.json"


def pick_device(name: str) -> torch.device:
    """Raises InputError where the device is not there."""
    if name == "auto":
        return _own_gpu() if torch.cuda.is_available() else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type != "cuda":
        raise InputError(f"compute.device = {name!r}: allowed are auto, cpu, cuda and cuda:N.")
    if (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"compute.device = {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here; "
            "set it to auto or cpu."
        )
    return device if device.index is not None else _own_gpu()


def _own_gpu() -> torch.device:
    """The GPU of this process: its own of several, else the default one."""
    return torch.device("cuda") if world().alone else torch.device("cuda", torch.cuda.current_device())


def check_device(name: str, processes: int) -> str:
    """The kind of device that so many processes train on, a GPU each. Raises InputError where there are too few."""
    kind = pick_device(name).type
    if ":" in name and processes > 1:
        raise InputError(
            f"compute.device = {name!r} is one GPU, and {processes} processes need one each; set it to cuda or cpu."
        )
    here = min(processes, int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
    if kind == "cuda" and here > torch.cuda.device_count():
        raise InputError(
            f"parallel.processes = {processes} needs a GPU for each of {here} processes, and torch sees "
            f'{torch.cuda.device_count()} here; take at most so many processes, or compute.device = "cpu".'
        )
    return kind


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where matrix units multiply it faster than float32: CUDA, or a CPU with AMX."""
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.float32 if precision == "float32" else torch.bfloat16


def load_tokenizer(source: str, key: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """`key` is the configuration's name for this model, for messages.

    Raises InputError where it cannot be loaded, or knows tokens that the model has no embeddings for.
    """
    config = read_config(source, key, trust_remote_code)
    check_tokenizer_files(source, key)
    named = f"{key} = {source!r}: its tokenizer"
    with loading(named, source):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(f"{named} knows no tokens but special ones; save the model's own in its folder.")
    embedded = getattr(config.get_text_config(), "vocab_size", None)
    if embedded is not None and tokenizer.vocab_size > embedded:
        raise InputError(
            f"{named} knows {tokenizer.vocab_size} tokens and its model embeds {embedded}, so they do not belong "
            "together; save the model's own tokenizer in its folder, or enlarge the embedding."
        )
    return tokenizer


def load_causal(
    source: str, key: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model, without dropout. Raises InputError where it cannot be loaded whole."""
    refuse_classifier(source, key, trust_remote_code)
    return _load(AutoModelForCausalLM, source, key, dtype, device, trust_remote_code)


def refuse_classifier(source: str, key: str, trust_remote_code: bool) -> None:
    """Raises InputError where what was saved is no language model."""
    if is_classifier(source, key, trust_remote_code):
        raise InputError(
            f"{key} = {source!r} is a sequence classifier, such as a reward or value model, and a causal language "
            "model is needed here; give the model that it was trained from, or one by `tandem sft`."
        )


def load_scalar(
    source: str, key: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A one-label sequence classifier whose head is part of what was saved.

    Raises InputError where the model has no such head or more than one label.
    """
    check_labels(source, key, trust_remote_code)
    return _load(AutoModelForSequenceClassification, source, key, dtype, device, trust_remote_code)


def _load(
    kind: Any, source: str, key: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    """Weights from safetensors, or else from a pickle.

    transformers (5.16 and newer) hands a pickle to torch.load with weights_only, which makes tensors and plain
    containers of it and refuses whatever else it would call, so that loading one runs nothing that came with it.
    """
    named = f"{key} = {source!r}"
    with loading(named, source):
        model, report = kind.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            weights_only=True,
        )
    check_whole(model, report, named)
    for name, parameter in model.named_parameters():
        check_finite(name, parameter, named)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to(device).eval().requires_grad_(False)


def check_whole(model: PreTrainedModel, report: Mapping[str, Any], named: str) -> None:
    """Raises InputError where weights are missing, or of another shape than the configuration says."""
    if report["mismatched_keys"]:
        name, saved, needed = sorted(report["mismatched_keys"])[0]
        raise InputError(
            f"{named}: {len(report['mismatched_keys'])} of its weights have another shape than its config.json says, "
            f"first {name}: {list(saved)} instead of {list(needed)}; the two files are not of one model."
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"{named} lacks {len(missing)} of the weights that {type(model).__name__} needs ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}), so it is not such a model, or not whole; give one that is."
        )


def check_finite(name: str, weight: Tensor, named: str) -> None:
    """Raises InputError where a weight holds numbers that are not finite."""
    if not weight.numel() or not weight.is_floating_point():
        return
    # The least and the greatest are not finite where any number is not; no array of the weight's size is made for it.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        raise InputError(
            f"{named}: the weight {name} holds numbers that are not finite, so nothing that it computes is a "
            "number; give a checkpoint from before it diverged."
        )


def runs_own_code(model: PreTrainedModel) -> bool:
    """Whether a model's class came with its weights rather than with transformers."""
    return type(model).__module__.startswith("transformers_modules.")


def check_classifier(model: PreTrainedModel) -> None:
    """Raises InputError where no sequence classifier of a model's kind can be made: scalar models are saved as one."""
    try:
        with torch.device("meta"):
            AutoModelForSequenceClassification.from_config(
                copy.deepcopy(model.config), trust_remote_code=runs_own_code(model)
            )
    except Exception as error:
        raise InputError(
            f"{model.name_or_path!r} ({type(model).__name__}) has no sequence classifier of its kind, as which reward "
            f"and value models are saved ({reason_of(error)}); take a model of an architecture that has one."
        ) from error


def context_length(model: PreTrainedModel) -> int | None:
    """Positions that the model can read, or None where its configuration sets no limit."""
    return positions(model.config)


def padding_id(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int | None:
    """An id for padding that the model can embed, EOS only where there is no other.

    A classifier finds a text's last token by passing over padding, so a text that ends in EOS would lose it.
    """
    embeddings: Any = model.get_input_embeddings()
    known = embeddings.weight.shape[0]
    eos = tokenizer.eos_token_id
    others = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    for token in [*(other for other in others if other != eos), eos]:
        if token is not None and token < known:
            return int(token)
    return None
