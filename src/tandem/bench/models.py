"""Models to time on: real shapes with random weights, and the reward models that a joint step needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tandem.config import AdapterSection
from tandem.models.cards import RewardCard, make_probes, write_card
from tandem.models.loading import load_causal, load_tokenizer
from tandem.models.saving import save_scalar
from tandem.models.scalar import ScalarModel, zero_head
from tandem.models.scoring import DecoderScorer
from tandem.models.trunk import Trunk


def make_shape(folder: Path, shape: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """Save a model of a shape with random weights, and a tokenizer that has a word for each id."""
    settings = {name: value for name, value in shape.items() if name != "kind"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape["kind"](**settings, bos_token_id=1, eos_token_id=2), dtype=dtype)
    model.save_pretrained(folder)
    word_tokenizer(shape["vocab_size"]).save_pretrained(folder)
    return folder


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word an id, so that decoding and encoding keep a text's length."""
    words = {name: number for number, name in enumerate(("<unk>", "<s>", "</s>", "<pad>"))}
    words |= {f"w{number}": number for number in range(len(words), vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_reward_model(
    source: str, folder: Path, adapters: AdapterSection | None, dtype: torch.dtype = torch.float32
) -> Path:
    """Save a reward model with a random head on a causal model: whole, or as an adapter of it."""
    device = torch.device("cpu")
    tokenizer = load_tokenizer(source, "model")
    trunk = Trunk(load_causal(source, "model", dtype, device))
    name = None
    if adapters is not None:
        name = "reward"
        trunk.add_adapter(name, adapters)
    head = zero_head(trunk.model.config.get_text_config().hidden_size, device)
    torch.manual_seed(1)
    torch.nn.init.normal_(head.weight, std=0.02)
    model = ScalarModel(trunk, head.requires_grad_(False), name)
    save_scalar(model, tokenizer, folder)
    probes = make_probes(DecoderScorer(model, 4096), [list(range(5, 12)), list(range(20, 31))])
    write_card(RewardCard(source, None, 0, None, adapters, probes), folder)
    return folder
