"""What a model's directory or hub id says of itself, so that much is refused before any weight is read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from tandem.errors import InputError, is_out_of_memory, reason_of

_BESIDE_A_TOKENIZER = {"special_tokens_map.json", "added_tokens.json"}
_TOKENIZER_WORDS = ("token", "tekken", "vocab", "piece")


def read_config(source: str, key: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a saved model; `key` is the name that a recipe has for it, for messages.

    Raises InputError where there is none, or where it needs code that comes with it and is not trusted.
    """
    check_source(source, key)
    with loading(f"{key} = {source!r}", source):
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)


@contextmanager
def loading(named: str, source: str) -> Iterator[None]:
    """Within it, what transformers raises becomes one message; memory that ran out is not the model's fault.

    What it only warns of is not for the person who runs a command.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, SafetensorError):
            raise InputError(
                f"{named} cannot be loaded: {damaged_file(source)} is no whole safetensors file ({reason_of(error)}); "
                "copy it again, and see that it is the file itself and not a pointer to it."
            ) from error
        if isinstance(error, UnpicklingError):
            raise InputError(
                f"{named} cannot be loaded: its pickled weights hold more than tensors, and such a pickle could run "
                "anything, so it is not read; give weights as safetensors."
            ) from error
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{named} needs Python code that comes with it, and such code is run only where it is asked for: if "
                "you trust it, set compute.trust_remote_code = true (tandem generate: --trust-remote-code)."
            ) from error
        raise InputError(f"{named} cannot be loaded: {reason_of(error)}. Give a whole model of its kind.") from error


def damaged_file(source: str) -> str:
    """The first file of weights in a folder that cannot be opened."""
    for path in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                continue
        except (OSError, SafetensorError):
            return f"{path} ({path.stat().st_size} bytes)"
    return "one of its files"


def check_source(source: str, key: str) -> None:
    """A path that looks local must be a saved model's folder: raises InputError before the hub is asked for it."""
    named = f"{key} = {source!r}"
    if os.path.isdir(source):
        inside = set(os.listdir(source))
        if "adapter_config.json" in inside:
            raise InputError(
                f"{named}: the folder holds a PEFT adapter (adapter_config.json), not a whole model; give the folder "
                "into which it was merged, which for one of Tandem's is the folder around it."
            )
        if "config.json" not in inside:
            raise InputError(f"{named}: the folder holds no config.json, so it is no saved model; give one that does.")
    elif os.path.exists(source):
        raise InputError(f"{named} is a file; give the folder of a saved model.")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        hint = " (~ is not expanded here: write the path out)" if source.startswith("~") else ""
        raise InputError(f"{named}: there is no such folder, seen from {os.getcwd()}; mend the path{hint}.")


def check_tokenizer_files(source: str, key: str) -> None:
    """Raises InputError where a folder holds no tokenizer: transformers would make an empty one of it."""
    files = set(os.listdir(source)) - _BESIDE_A_TOKENIZER if os.path.isdir(source) else None
    if files is not None and not any(word in name for name in files for word in _TOKENIZER_WORDS):
        raise InputError(
            f"{key} = {source!r}: the folder holds no tokenizer (tokenizer.json or the like); save the model's own in "
            "it with tokenizer.save_pretrained."
        )


def is_classifier(source: str, key: str, trust_remote_code: bool = False) -> bool:
    """Whether what was saved is a sequence classifier rather than a language model."""
    return _saved_as(read_config(source, key, trust_remote_code)).endswith("ForSequenceClassification")


def check_labels(source: str, key: str, trust_remote_code: bool = False) -> None:
    """Raises InputError where a model is no sequence classifier with one label, as far as it says what it is."""
    config = read_config(source, key, trust_remote_code)
    saved_as = _saved_as(config)
    if saved_as and not saved_as.endswith("ForSequenceClassification"):
        raise InputError(
            f"{key} = {source!r} was saved as {saved_as}, and a reward model is a sequence classifier with one label. "
            "Train one with `tandem reward`."
        )
    if config.num_labels != 1:
        raise InputError(
            f"{key} = {source!r} has {config.num_labels} labels; a reward model is a sequence classifier with one. "
            "Train one with `tandem reward`."
        )


def _saved_as(config: PreTrainedConfig) -> str:
    """The class that the model was saved as, or nothing where it does not say."""
    return str((getattr(config, "architectures", None) or [""])[0])


def layer_count(source: str, key: str, trust_remote_code: bool = False) -> int:
    """Layers of a saved model. Raises InputError where it cannot be read."""
    return int(read_config(source, key, trust_remote_code).get_text_config().num_hidden_layers)


def positions(config: PreTrainedConfig) -> int | None:
    """Positions that a model of this configuration can read, or None where it sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_length(config: PreTrainedConfig, longest: int, key: str) -> None:
    """Raises InputError where the longest sequence is more than the model reads."""
    limit = positions(config)
    if limit is not None and longest > limit:
        raise InputError(
            f"sequences have up to {longest} tokens, and {key} reads {limit}; lower data.max_tokens with "
            'data.too_long = "truncate" or "drop".'
        )
