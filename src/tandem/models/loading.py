"""Models and tokenizers from directories or the hub, with errors that a person can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tandem.errors import InputError

REWARD_CARD = "tandem.json"


def pick_device(name: str) -> torch.device:
    """Raises InputError where the device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"compute.device = {name!r}: allowed are auto, cpu, cuda and cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"compute.device = {name!r}: allowed are auto, cpu, cuda and cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"compute.device = {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here; "
            "set it to auto or cpu."
        )
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where matrix units multiply it faster than float32: CUDA, or a CPU with AMX."""
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.float32 if precision == "float32" else torch.bfloat16


def load_tokenizer(source: str, key: str) -> PreTrainedTokenizerBase:
    """`key` is the configuration's name for this model, for messages."""
    check_source(source, key)
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise InputError(f"{key} = {source!r}: its tokenizer cannot be loaded: {_first_line(error)}") from error


def load_causal(source: str, key: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A causal language model, without dropout. Raises InputError where it cannot be loaded whole."""
    return _load(AutoModelForCausalLM, source, key, dtype, device)


def load_scalar(source: str, key: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A one-label sequence classifier whose head is part of what was saved.

    Raises InputError where the model has no such head or more than one label.
    """
    labels = getattr(_config(source, key), "num_labels", None)
    if labels != 1:
        raise InputError(
            f"{key} = {source!r} has {labels} labels; a reward model is a sequence classifier with one. "
            "Train one with `tandem reward`."
        )
    return _load(AutoModelForSequenceClassification, source, key, dtype, device)


def is_classifier(source: str, key: str) -> bool:
    """Whether what was saved is a sequence classifier rather than a language model."""
    architectures = getattr(_config(source, key), "architectures", None) or [""]
    return architectures[0].endswith("ForSequenceClassification")


def check_source(source: str, key: str) -> None:
    """A path that looks local must exist: raises InputError before the hub is asked for it."""
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists():
        raise InputError(f"{key} = {source!r}: the folder holds no config.json, so it is no saved model.")
    if looks_local and not path.exists():
        raise InputError(f"{key} = {source!r}: there is no such folder.")


def _config(source: str, key: str) -> Any:
    check_source(source, key)
    try:
        return AutoConfig.from_pretrained(source)
    except Exception as error:
        raise InputError(f"{key} = {source!r} cannot be loaded: {_first_line(error)}") from error


def _load(kind: Any, source: str, key: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    check_source(source, key)
    try:
        model, report = kind.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except Exception as error:
        raise InputError(f"{key} = {source!r} cannot be loaded: {_first_line(error)}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"{key} = {source!r} lacks {len(missing)} of the weights that {type(model).__name__} needs "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}), so it is not such a model."
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to(device).eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return text if len(text) <= 300 else text[:297] + "..."


def layer_count(source: str, key: str) -> int:
    """Layers of a saved model. Raises InputError where it cannot be read."""
    return int(_config(source, key).get_text_config().num_hidden_layers)


def context_length(model: PreTrainedModel) -> int | None:
    """Positions that the model can read, or None where its configuration sets no limit."""
    return getattr(model.config, "max_position_embeddings", None)


def check_length(model: PreTrainedModel, longest: int, key: str) -> None:
    """Raises InputError where the longest sequence is more than the model reads."""
    limit = context_length(model)
    if limit is not None and longest > limit:
        raise InputError(
            f"the longest sequence has {longest} tokens, and {key} reads {limit}; lower data.max_tokens with "
            'data.too_long = "truncate" or "drop".'
        )


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
