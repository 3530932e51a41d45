"""What the later stages of a pipeline will read, read before the first one trains, so that a slip is not told hours on.

All stages read through the base model's tokenizer, which each hands on unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tandem.config import DpoConfig, PpoConfig, RewardConfig, SftConfig
from tandem.data.examples import as_read, as_written, read_examples, read_pairs
from tandem.data.prompts import split_prompts
from tandem.errors import InputError
from tandem.models.loading import check_device, load_tokenizer
from tandem.models.sharing import Placement
from tandem.models.source import check_length, read_config
from tandem.pipeline_config import PipelineConfig, in_several_processes
from tandem.rewards.function import load_function
from tandem.stages.joint_setup import check_context, check_models


def look_ahead(config: PipelineConfig, stages: Sequence[str]) -> None:
    """Raises InputError, which names the stage, for data, rewards and lengths that it would refuse when it begins."""
    trust = config.compute.trust_remote_code
    tokenizer = load_tokenizer(config.model, "model", trust)
    for stage in stages:
        recipe = config.recipe_of(stage)
        with of_stage(stage):
            if in_several_processes(recipe):
                check_device(recipe.compute.device, recipe.parallel.processes)
            if isinstance(recipe, PpoConfig):
                _look_at_joint(recipe, config, tokenizer)
            else:
                longest = _longest(recipe, tokenizer)
                check_length(read_config(config.model, "model", trust), longest, "model")


@contextmanager
def of_stage(stage: str, resumable: Path | None = None) -> Iterator[None]:
    """Within it, what is refused says of which stage it is, and how the pipeline in that folder goes on."""
    try:
        yield
    except InputError as error:
        again = (
            f" Mend it, by --{stage}.KEY VALUE if need be, and go on with: tandem pipeline --resume {resumable}"
            if resumable
            else ""
        )
        raise InputError(f"[{stage}] {error}{again}") from error


def _longest(recipe: SftConfig | RewardConfig | DpoConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest row that trains or is held out, at most."""
    if isinstance(recipe, SftConfig):
        return read_examples(recipe.data, tokenizer, recipe.run.seed).longest
    read = as_written if isinstance(recipe, DpoConfig) else as_read
    return read_pairs(recipe.data, tokenizer, recipe.run.seed, read).longest


def _look_at_joint(recipe: PpoConfig, config: PipelineConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """With the base in the place of the models that earlier stages will make: it is of their size."""
    own = f"{config.folder_of('reward')}/model"
    as_base = recipe.model_copy(
        update={
            "policy": recipe.policy.model_copy(update={"model": config.model}),
            "value": recipe.value.model_copy(update={"start": "policy"}),
            "rewards": [source for source in recipe.rewards if source.model != own],
        }
    )
    for source in as_base.rewards:
        if source.function is not None:
            load_function(source.function)
    check_models(as_base, Placement.of(recipe.compute, lambda _: None))
    check_context(as_base, split_prompts(recipe.data, tokenizer, recipe.run.seed).longest)
