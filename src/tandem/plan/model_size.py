"""How large a model is, counted on a model that has no memory: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tandem.errors import InputError, reason_of


@dataclass(frozen=True)
class ModelSize:
    """What a causal language model is made of, in numbers of weights and widths.

    `trunk` are the weights that are multiplied with each token in the layers together, `head` those of the projection
    on the vocabulary. `body` is everything but the head, embeddings and norms included; where the head is `tied`, it
    is the embedding. `attention` and `keys` are the widths of all query heads and of all key heads together,
    `head_width` that of one, `inner` that of the feed-forward part, `linear_ends` the inputs and outputs of one
    layer's matrices added up.
    """

    layers: int
    trunk: int
    head: int
    hidden: int
    attention: int
    keys: int
    head_width: int
    inner: int
    body: int
    tied: bool
    linear_ends: int

    @property
    def vocabulary(self) -> int:
        return self.head // self.hidden

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.attention // self.head_width

    @property
    def key_heads(self) -> int:
        return self.keys // self.head_width

    @property
    def parameters(self) -> int:
        """All weights of the language model; a tied head counts once."""
        return self.body if self.tied else self.body + self.head

    @property
    def scalar_parameters(self) -> int:
        """All weights of a one-label classifier of this size."""
        return self.body + self.hidden

    def adapter_parameters(self, rank: int, upper_layers: int | None) -> int:
        """Weights of one LoRA adapter: rank times inputs and outputs of every matrix that it stands on."""
        return rank * self.linear_ends * (upper_layers or self.layers)

    @classmethod
    def of(cls, source: str | Path) -> ModelSize:
        return cls.of_config(AutoConfig.from_pretrained(source))

    @classmethod
    def of_config(cls, config: PreTrainedConfig) -> ModelSize:
        """Raises InputError for a mixture of experts, whose weights are not all multiplied with each token."""
        text = config.get_text_config()
        if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            raise InputError(f"{config.model_type} is a mixture of experts, which is not counted; give a dense model.")
        model = _without_memory(config)
        head = model.get_output_embeddings()
        matrices = [
            module.weight
            for module in model.modules()
            if module is not head and hasattr(module, "weight") and module.weight.dim() == 2
            if not isinstance(module, torch.nn.Embedding)
        ]
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        layers = text.num_hidden_layers
        return cls(
            layers=layers,
            trunk=sum(weight.numel() for weight in matrices),
            head=head.weight.numel(),
            hidden=text.hidden_size,
            attention=text.num_attention_heads * head_dim,
            keys=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_dim,
            head_width=head_dim,
            inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            body=sum(parameter.numel() for parameter in model.base_model.parameters()),
            tied=head.weight is model.get_input_embeddings().weight,
            linear_ends=sum(sum(weight.shape) for weight in matrices) // layers,
        )


def _without_memory(config: PreTrainedConfig) -> Any:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise InputError(
            f"a model of type {config.model_type!r} cannot be counted: {reason_of(error)}. Give a causal decoder."
        ) from error
