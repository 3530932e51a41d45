"""Models that are made without weights, of which each process then reads its own parts, a tensor at a time.

What a file's tensors are to a model is left to transformers to say, which is given their names and shapes alone. Where
it would do more with them than to put each in its place, or they are in no such file, a model can only be read whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from tandem.models.loading import check_finite, check_whole, load_causal, refuse_classifier
from tandem.models.shards import like, own_slices
from tandem.models.source import loading, read_config
from tandem.models.trunk import Trunk
from tandem.world import world

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_NOWHERE = torch.device("meta")


class OnlyWhole(Exception):
    """A model cannot be read in parts; the message says why not."""


@dataclass(frozen=True)
class Unread:
    """A model on the meta device, and the file that each of its tensors is in; `named` is its name in messages."""

    model: PreTrainedModel
    files: Mapping[str, Path]
    device: torch.device
    source: str
    named: str

    def read(self) -> None:
        """Give the model its weights, of which each process reads what it holds, and its buffers.

        Raises InputError, in all processes, where one of them cannot read its part or meets a number that is not
        finite.
        """
        world().each(self._read)

    def _read(self) -> None:
        with loading(self.named, self.source):
            self.model.load_state_dict(dict(self._parts()), assign=True)
            self._make_unsaved_buffers()

    def _parts(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model by name, as this process holds it; tied ones are one and the same."""
        parts: dict[int, Tensor] = {}
        with ExitStack() as held:
            opened = {path: held.enter_context(_open(path)) for path in dict.fromkeys(self.files.values())}
            for name, tensor in self.model.state_dict(keep_vars=True).items():
                if id(tensor) not in parts:
                    parts[id(tensor)] = self._part(name, opened[self.files[name]].get_slice(name), tensor)
                yield name, parts[id(tensor)]

    def _part(self, name: str, saved: Any, tensor: Tensor) -> Tensor:
        slices = own_slices(tensor)
        own = saved[slices] if all(part.start < part.stop for part in slices) else torch.empty(_lengths(slices))
        own = own.to(device=self.device, dtype=tensor.dtype)
        check_finite(name, own, self.named)
        part = like(tensor, own)
        return nn.Parameter(part, requires_grad=False) if isinstance(tensor, nn.Parameter) else part

    def _make_unsaved_buffers(self) -> None:
        """Compute the buffers that no file holds (rotary frequencies, say), on the CPU, by the model's own code.

        What is marked as initialised transformers leaves as it is.
        """
        buffers = [name for name, _ in self.model.named_non_persistent_buffers()]
        for tensor in self.model.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True
        for name in buffers:
            module, _, own = name.rpartition(".")
            holder: Any = self.model.get_submodule(module)
            setattr(holder, own, torch.empty_like(getattr(holder, own), device="cpu"))
            holder._is_hf_initialized = False
        self.model.initialize_weights()
        for name in buffers:
            module, _, own = name.rpartition(".")
            holder = self.model.get_submodule(module)
            setattr(holder, own, getattr(holder, own).to(self.device))


def load_trunk(
    source: str,
    key: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    say: Callable[[str], None],
) -> Trunk:
    """The decoder of a causal language model, its weights cut over the processes that train together.

    Each of several processes reads only what it holds, where that can be; `say` is told where it cannot. Raises
    InputError where the model cannot be loaded whole.
    """
    if not world().alone:
        refuse_classifier(source, key, trust_remote_code)
        unread = unread_model(AutoModelForCausalLM, source, key, dtype, device, trust_remote_code, say)
        if unread is not None:
            return Trunk(unread.model, unread.read)
    return Trunk(load_causal(source, key, dtype, device, trust_remote_code))


def unread_model(
    kind: Any,
    source: str,
    key: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    say: Callable[[str], None],
) -> Unread | None:
    """A model that is yet to be read in parts, or None where it can only be read whole, which is said.

    Raises InputError where weights are missing, or of another shape than the configuration says.
    """
    named = f"{key} = {source!r}"
    config = read_config(source, key, trust_remote_code)
    try:
        _check_plain(config, trust_remote_code)
        with loading(named, source):
            saved = _saved_tensors(source)
        shapes = _shapes(saved)
        with loading(named, source):
            model, report = _without_weights(kind, config, source, dtype, trust_remote_code, shapes)
        if model._weight_conversions:
            raise OnlyWhole("transformers converts its weights when it loads them")
        check_whole(model, report, named)
        _check_names(model, shapes)
    except OnlyWhole as reason:
        say(f"{named}: {reason}, so every process reads the whole model, and needs the memory for it.")
        return None
    return Unread(model, {name: path for path, name, _ in saved}, device, source, named)


def _check_plain(config: PreTrainedConfig, trust_remote_code: bool) -> None:
    """Raises OnlyWhole for models that transformers loads in ways of their own."""
    if trust_remote_code and getattr(config, "auto_map", None):
        raise OnlyWhole("its Python code came with it")
    if getattr(config, "quantization_config", None) or getattr(config, "transformers_weights", None):
        raise OnlyWhole("its weights are packed or named in a way of their own")


def _saved_tensors(source: str) -> list[tuple[Path, str, list[int]]]:
    """The tensors in a model's safetensors files, each with its file, name and shape."""
    found: list[tuple[Path, str, list[int]]] = []
    for path in _safetensors_files(source):
        with _open(path) as file:
            found += [(path, name, file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    return found


def _safetensors_files(source: str) -> list[Path]:
    """None where there are none, in a folder or on the hub."""
    optional: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    single = cached_file(source, _WEIGHTS, **optional)
    if single is not None:
        return [Path(single)]
    index = cached_file(source, _INDEX, **optional)
    return [] if index is None else [Path(path) for path in get_checkpoint_shard_files(source, index)[0]]


def _shapes(saved: Sequence[tuple[Path, str, list[int]]]) -> dict[str, list[int]]:
    """The shape of each tensor. Raises OnlyWhole where there are none, or where a name has two."""
    if not saved:
        raise OnlyWhole("its weights are in no safetensors files")
    shapes = {name: shape for _, name, shape in saved}
    if len(shapes) < len(saved):
        raise OnlyWhole("some of its weights are in two of its files")
    return shapes


def _without_weights(
    kind: Any,
    config: PreTrainedConfig,
    source: str,
    dtype: torch.dtype,
    trust_remote_code: bool,
    shapes: Mapping[str, list[int]],
) -> tuple[Any, dict[str, Any]]:
    """The model on the meta device, and what transformers reports of loading tensors of such names and shapes."""
    with _NOWHERE:
        own_class: Any = type(kind.from_config(config, trust_remote_code=trust_remote_code))
    model, report = own_class.from_pretrained(
        None,
        config=config,
        dtype=dtype,
        state_dict={name: torch.empty(shape, device=_NOWHERE) for name, shape in shapes.items()},
        device_map={"": _NOWHERE.type},
        generation_config=_generation_config(source),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model.name_or_path = model.config.name_or_path = source
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False), report


def _check_names(model: PreTrainedModel, shapes: Mapping[str, list[int]]) -> None:
    """Raises OnlyWhole where there is not one tensor of its own name and shape for each of the model's."""
    for name, tied_to in model.all_tied_weights_keys.items():
        if name in shapes and tied_to in shapes:
            raise OnlyWhole(f"{name} and {tied_to} are one weight of the model, and each is in its files")
    for name, tensor in _different(model):
        if shapes.get(name) != list(tensor.shape):
            raise OnlyWhole(f"the model's {name} has another name in its files")


def _different(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a model is saved with, tied ones once, by the first of their names."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _generation_config(source: str) -> GenerationConfig:
    """Its own, or what the model's configuration says of it, as transformers takes it for a model that it loads."""
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return GenerationConfig.from_pretrained(source, config_file_name="config.json", _from_model_config=True)


def _open(path: Path) -> Any:
    """A safetensors file of which what is not asked for is not read; what is stays no part of the file's pages."""
    return safe_open(path, framework="pt", backend="pread")


def _lengths(slices: tuple[slice, ...]) -> list[int]:
    return [part.stop - part.start for part in slices]
