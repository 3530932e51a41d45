"""The decoder of a model, from tokens to hidden states: with LoRA adapters to switch and a lower part to share.

Several models can stand on one frozen decoder, each as a named LoRA adapter; with all adapters off it is the
reference. Where only the upper layers are adapted, what lies below is the same for all of them, so `prepare`
runs it once and `hidden` starts from its activations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tandem.config import AdapterSection
from tandem.errors import InputError
from tandem.models.activations import Activations, Text
from tandem.models.attention import attend_by_device
from tandem.models.shards import gathered, shard, whole_tensor
from tandem.types import Tokens, whole_texts
from tandem.world import world

Found = TypeVar("Found")


class Trunk:
    """Hidden states of a Hugging Face causal decoder.

    `model` is the whole model, head included; only its decoder is used here. Where several processes train together
    its weights are cut over them, unless each is to have it `whole`; the weights of adapters, which are small, every
    process has whole. A model without weights, on the meta device, is given them by `read` once it is cut.
    """

    def __init__(self, model: PreTrainedModel, read: Callable[[], None] | None = None, *, whole: bool = False) -> None:
        self.model = model
        self.decoder: Any = model.base_model
        self._parent, self._blocks_name, self._blocks = _blocks_of(
            self.decoder, model.config.get_text_config().num_hidden_layers
        )
        self._first_layers: dict[str, int] = {}
        self._cut = 0
        self._activations = Activations(lambda ids: self.lower(ids.to(self.device)))
        self._linear_names = self._linear_layers()
        self._using: str | None = None
        self._caught: _Catch | None = None
        if world().checkpointing:
            for block in self._blocks:
                block.forward = self._computed_again(block.forward)
        self._whole = None if whole or world().alone else shard(model, self._blocks, world())
        if read is not None:
            read()
        attend_by_device(model)
        self._lora_layers: list[Any] = []
        self._lora_configs: dict[str, LoraConfig] = {}

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers, from the lowest up."""
        return self._blocks

    @property
    def in_parts(self) -> bool:
        """Whether the weights are cut over several processes."""
        return self._whole is not None

    def run(self, work: Callable[[], Found]) -> Found:
        """Do what reads the model's weights: everything that calls the decoder or its head does it within."""
        return work() if self._whole is None else self._whole(work)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it this process holds all weights, and passes need not go in step with those of other processes."""
        if self._whole is None:
            yield
        else:
            with gathered(self._whole):
                yield

    def hidden(self, tokens: Tokens, adapter: str | None = None) -> Tensor:
        """[B, L, H] under the named adapter, or none.

        Starts from `tokens.activations` where they are given and the adapter leaves the layers below them alone.
        """
        first = len(self._blocks) if adapter is None else self._first_layers[adapter]
        with self.using(adapter):
            if tokens.activations is None or first < self._cut:
                return self.decoder(input_ids=tokens.ids, use_cache=False).last_hidden_state
            with self._blocks_replaced(upper_from=tokens.activations):
                return self.decoder(input_ids=tokens.ids, use_cache=False).last_hidden_state

    def add_adapter(self, name: str, settings: AdapterSection) -> list[nn.Parameter]:
        """Add a LoRA adapter that starts as the identity; returns its parameters."""
        upper = settings.upper_layers or len(self._blocks)
        if upper > len(self._blocks):
            raise InputError(
                f"adapters.upper_layers = {upper}, but the model has {len(self._blocks)} layers; set at most that, or "
                "leave it out for all."
            )
        first = self._first_layers[name] = len(self._blocks) - upper
        targets = [name for block in self._linear_names[first:] for name in block]
        self._lora_configs[name] = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets)
        # peft knows the shape of a matrix that is cut over a mesh named "fsdp" alone; with copies it must see it whole.
        shapes_known = nullcontext() if world().replicate == 1 else self.gathered()
        with shapes_known, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            inject_adapter_in_model(self._lora_configs[name], self.model, adapter_name=name)
        self._lora_layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        self.model.eval()
        parameters = self.adapter_parameters(name)
        for parameter in parameters:
            parameter.data = parameter.data.to(self.model.dtype)
            parameter.requires_grad_(True)
        return parameters

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return [
            weights[name].weight
            for layer in self._lora_layers
            for weights in (layer.lora_A, layer.lora_B)
            if name in weights
        ]

    def copy_adapter(self, source: str, target: str) -> None:
        """Give one adapter the weights of another."""
        with torch.no_grad():
            pairs = zip(self.adapter_parameters(source), self.adapter_parameters(target), strict=True)
            for given, taken in pairs:
                taken.copy_(given)

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Within it the decoder computes under this adapter, or under none.

        Which parameters train is left as it is: gradients reach whatever the forward went through.
        """
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self._lora_layers]
        outer, self._using = self._using, adapter
        for layer in self._lora_layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        try:
            yield
        finally:
            self._using = outer
            for layer, (active, disabled) in zip(self._lora_layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled

    def _computed_again(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's forward that holds none of its activations: the backward pass computes them once more.

        It does so long after the forward pass, so under the adapter that was in use then.
        """

        def computed(*inputs: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*inputs, **named)
            adapter = self._using

            def under_adapter(*inputs: Any, **named: Any) -> Any:
                with self.using(adapter):
                    return forward(*inputs, **named)

            return checkpoint(under_adapter, *inputs, use_reentrant=False, **named)

        return computed

    def share_below(self, adapter: str) -> None:
        """Let `prepare` run the layers below this adapter's first one, for all models that leave them alone.

        Tried out on a few tokens first: a decoder whose layers cannot be skipped in this way runs whole. So does one
        that several processes train: each of them passes other rows through it each time.
        """
        if not world().alone:
            return
        self._cut = self._first_layers[adapter]
        tokens = whole_texts([[0, 1, 2, 3]]).to(self.device)
        try:
            with torch.no_grad():
                whole, split = self.hidden(tokens), self.hidden(self.prepare(tokens, 4))
            works = torch.allclose(whole, split, rtol=1e-2, atol=1e-2)
        except (TypeError, IndexError, AttributeError, RuntimeError):
            works = False
        self._cut = self._cut if works else 0

    def shares_below(self, adapter: str | None) -> bool:
        """Whether what `prepare` runs is what this adapter's model computes in its lower layers."""
        first = len(self._blocks) if adapter is None else self._first_layers[adapter]
        return 0 < self._cut <= first

    @torch.no_grad()
    def prepare(self, tokens: Tokens, tokens_per_microbatch: int) -> Tokens:
        """The tokens with the activations of the shared lower layers, if there are such layers.

        Texts that were run before (since `expect` or `forget`), or sampled (`keep`), are not run again, with or without
        their last token: what a causal model computes of a text does not depend on what follows.
        """
        tokens = tokens.to(self.device)
        if self._cut == 0:
            return tokens
        return self._activations.given(tokens, tokens_per_microbatch)

    def forget(self) -> None:
        """Let the next `prepare` run all that it is given: a step must not depend on what was read before it."""
        self._activations.forget()

    def expect(self, texts: Sequence[Text]) -> None:
        """What will be prepared, in place of all before: the next `prepare` runs it together with its own texts."""
        self._activations.expect(texts)

    def keep(self, texts: Sequence[Text], lower: Sequence[Tensor]) -> None:
        """What the shared lower layers made of whole texts while they were sampled, [L, H] each, for `prepare`."""
        self._activations.keep(texts, lower)

    @torch.no_grad()
    def lower(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """[B, S, H] of the shared lower layers for ids [B, S], after what is in the cache, which grows in these."""
        caught = _Catch()
        with self.using(None), self._blocks_replaced(lower_into=caught):
            self.decoder(
                input_ids=ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return caught.last()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it `last` says what the shared lower layers made of the ids of the decoder's last pass."""
        self._caught = caught = _Catch()

        def look(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            caught(*inputs, **named)

        hook = self._blocks[self._cut].register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            self._caught = None

    def last(self) -> Tensor:
        """[B, S, H]: see `watched`."""
        assert self._caught is not None
        return self._caught.last()

    @contextmanager
    def _blocks_replaced(self, upper_from: Tensor | None = None, lower_into: _Catch | None = None) -> Iterator[None]:
        """Skip the lower blocks, injecting their output, or skip the upper ones, catching their input.

        The list keeps its length and order, since models look up per-layer settings by position.
        """
        cut, count = self._cut, len(self._blocks)
        if upper_from is not None:
            parts = [_Skip() for _ in range(cut - 1)] + [_Inject(upper_from)] + list(self._blocks[cut:])
        else:
            assert lower_into is not None
            parts = [*self._blocks[:cut], lower_into] + [_Skip() for _ in range(count - cut - 1)]
        setattr(self._parent, self._blocks_name, nn.ModuleList(parts))
        try:
            yield
        finally:
            setattr(self._parent, self._blocks_name, self._blocks)

    def _linear_layers(self) -> list[list[str]]:
        """Names of the matrices of each block, as they are before any LoRA wraps them."""
        names = {id(module): name for name, module in self.model.named_modules()}
        return [
            [names[id(module)] for module in block.modules() if isinstance(module, nn.Linear | Conv1D)]
            for block in self._blocks
        ]

    def adapter_state(self, name: str) -> tuple[LoraConfig, dict[str, Tensor]]:
        """An adapter as peft keeps it: its configuration and its weights under peft's names."""
        state = get_peft_model_state_dict(self.model, adapter_name=name)
        return self._lora_configs[name], {f"base_model.model.{key}": value.contiguous() for key, value in state.items()}

    def merged_weights(self, adapter: str | None) -> Iterator[tuple[str, Tensor]]:
        """The whole model's weights with an adapter folded in, one by one, under the names of the model without LoRA.

        Only the one at hand is ever held beside the model's own. Where several processes share the model, each tensor
        is gathered when its turn comes, so all of them must go through all of it.
        """
        names = {id(module): name for name, module in self.model.named_modules()}
        carrying = {f"{names[id(layer)]}.weight": layer for layer in self._lora_layers if adapter in layer.lora_A}
        for name, part in self._own_weights().items():
            layer = carrying.get(name)
            if layer is None:
                yield name, whole_tensor(part)
            else:
                yield name, _with_adapter(whole_tensor(part), layer, adapter)

    def weight_names(self) -> list[str]:
        """The names of `merged_weights`, in their order."""
        return list(self._own_weights())

    def _own_weights(self) -> dict[str, Tensor]:
        """The model's tensors as this process holds them, without adapters, under the names of a model without LoRA."""
        state = self.model.state_dict().items()
        return {name.replace(".base_layer", ""): tensor for name, tensor in state if ".lora_" not in name}


@torch.no_grad()
def _with_adapter(weight: Tensor, layer: Any, adapter: str | None) -> Tensor:
    return (weight.float() + layer.get_delta_weight(adapter).float()).to(weight.dtype)


class _Skip(nn.Module):
    """Stands where a block is not to run."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class _Inject(nn.Module):
    """Stands where the last skipped block would have answered."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden


class _Catch(nn.Module):
    """Keeps what the block in its place would have read."""

    def __init__(self) -> None:
        super().__init__()
        self._hidden: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self._hidden = hidden_states
        return hidden_states

    def last(self) -> Tensor:
        assert self._hidden is not None
        return self._hidden


def _blocks_of(decoder: nn.Module, count: int) -> tuple[nn.Module, str, nn.ModuleList]:
    """The decoder's list of layers, with the module that holds it and its name there."""
    for parent in decoder.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return parent, name, child
    raise InputError(f"{type(decoder).__name__} keeps its layers in a way that Tandem does not know.")
