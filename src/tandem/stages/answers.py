"""What the model of each stage of a pipeline answers to the same held-out prompts, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tandem.config import DpoConfig, PpoConfig
from tandem.data.examples import as_written, read_pairs
from tandem.data.prompts import split_prompts
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy, SamplingRule
from tandem.models.loading import load_causal, load_tokenizer, pick_device, pick_dtype
from tandem.models.source import positions, read_config
from tandem.models.trunk import Trunk
from tandem.pipeline_config import PipelineConfig, StageRecipe
from tandem.rollout import TorchGenerator
from tandem.text import decoder
from tandem.types import Prompt

SOME_LINES = 64


def answers_by_stage(config: PipelineConfig) -> list[dict[str, Any]]:
    """For each of the first held-out prompts of the aligning stage, one answer of every model from base to aligned.

    All sample by the same rule with the same random numbers; the rule is the aligning stage's own. Empty where nothing
    is held out.
    """
    recipe = config.recipe_of(config.aligning)
    tokenizer = load_tokenizer(config.model, "model", config.compute.trust_remote_code)
    prompts = heldout_prompts(recipe, tokenizer, config.samples)
    if not prompts:
        return []
    models = {"base": config.model} | {
        stage: f"{config.folder_of(stage)}/model" for stage in config.stages if stage != "reward"
    }
    answers = {name: answers_of(source, prompts, recipe, tokenizer) for name, source in models.items()}
    return [
        {"prompt": prompt.text, "answers": {name: texts[place] for name, texts in answers.items()}}
        for place, prompt in enumerate(prompts)
    ]


def heldout_prompts(recipe: StageRecipe, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Prompt]:
    """The first distinct prompts that the aligning stage holds out."""
    if isinstance(recipe, PpoConfig):
        found = split_prompts(recipe.data, tokenizer, recipe.run.seed).heldout
    elif isinstance(recipe, DpoConfig):
        pairs = read_pairs(recipe.data, tokenizer, recipe.run.seed, as_written).heldout
        ids = [pair.chosen.ids[: pair.chosen.prompt_length] for pair in pairs]
        found = [Prompt(one, _text_of(one, tokenizer), None, {}) for one in ids]
    else:
        raise TypeError(f"{type(recipe).__name__} aligns nothing")
    distinct: dict[tuple[int, ...], Prompt] = {}
    for prompt in found:
        distinct.setdefault(prompt.ids, prompt)
    return list(distinct.values())[:count]


def _text_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt's text, with the marks of its turns and without the one of its beginning."""
    return str(tokenizer.decode(list(ids))).removeprefix(tokenizer.bos_token or "").lstrip()


def how_to_answer(recipe: StageRecipe, source: str, prompts: Sequence[Prompt]) -> tuple[SamplingRule, int]:
    """The rule by which the joint stage samples, and its longest response; where there was none, some lines."""
    if isinstance(recipe, PpoConfig):
        rollout = recipe.rollout
        return SamplingRule(rollout.temperature, rollout.top_k, rollout.top_p), rollout.max_new_tokens
    limit = positions(read_config(source, "model", recipe.compute.trust_remote_code))
    room = SOME_LINES if limit is None else limit - max(len(prompt.ids) for prompt in prompts)
    return FULL_DISTRIBUTION, min(SOME_LINES, room)


def answers_of(
    source: str, prompts: Sequence[Prompt], recipe: StageRecipe, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """One answer to each prompt; empty ones where the prompts leave no room for any."""
    rule, longest = how_to_answer(recipe, source, prompts)
    if longest < 1:
        return [""] * len(prompts)
    compute, device = recipe.compute, pick_device(recipe.compute.device)
    dtype = pick_dtype(compute.precision, device)
    policy = CausalPolicy(Trunk(load_causal(source, "model", dtype, device, compute.trust_remote_code)), rule)
    generator = TorchGenerator(
        policy,
        decoder(tokenizer),
        policy.stop_ids(tokenizer),
        max_new_tokens=longest,
        sequences_per_batch=64,
        random=torch.Generator(device=device).manual_seed(recipe.run.seed),
    )
    return [rollout.text for rollout in generator.generate(prompts)]
