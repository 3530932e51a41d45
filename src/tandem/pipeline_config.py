"""What a pipeline can be told: the recipes of its stages, less what the pipeline itself fills in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from tandem.config import (
    ComputeSection,
    DpoConfig,
    Fraction,
    NonEmpty,
    ParallelSection,
    PolicySection,
    PpoConfig,
    RewardConfig,
    RewardSource,
    RunSection,
    Section,
    SftConfig,
    merged,
)

REWARD_MODEL = "{reward}"
_FILLED_IN = "filled in by the pipeline"

StageRecipe: TypeAlias = SftConfig | RewardConfig | DpoConfig | PpoConfig
_KINDS: dict[str, type[StageRecipe]] = {"sft": SftConfig, "reward": RewardConfig, "dpo": DpoConfig, "ppo": PpoConfig}


def in_several_processes(recipe: StageRecipe) -> bool:
    """Whether processes of this machine train together; a cluster starts its own."""
    return recipe.parallel.processes > 1 and getattr(recipe, "cluster", None) is None


def _no_model(_: Any) -> str:
    raise ValueError(
        "a stage starts from the model of the one before it, and the first from the pipeline's own model; leave it out"
    )


def _no_directory(_: Any) -> str:
    raise ValueError("a stage is kept in the pipeline's own run.directory, under the stage's name; leave it out")


def _standing_for_reward_model(sources: Any) -> Any:
    """A reward that names no model, function or url stands for the pipeline's reward model."""
    named = {"model", "function", "url"}
    if not isinstance(sources, list):
        return sources
    return [
        {"model": REWARD_MODEL, **source} if isinstance(source, dict) and not named & source.keys() else source
        for source in sources
    ]


StartModel = Annotated[str, BeforeValidator(_no_model)]


class StageRun(RunSection):
    directory: Annotated[str, BeforeValidator(_no_directory)] = Field(_FILLED_IN, exclude=True)


class SftStage(SftConfig):
    """Supervised fine-tuning of the base model."""

    model: StartModel = Field(_FILLED_IN, exclude=True)
    run: StageRun = StageRun()


class RewardStage(RewardConfig):
    """A reward model on the model that SFT made, or on the base."""

    model: StartModel = Field(_FILLED_IN, exclude=True)
    run: StageRun = StageRun()


class DpoStage(DpoConfig):
    """Direct preference optimisation of the model that SFT made, or of the base."""

    model: StartModel = Field(_FILLED_IN, exclude=True)
    run: StageRun = StageRun()


class PolicyStage(PolicySection):
    model: StartModel = Field(_FILLED_IN, exclude=True)


class PpoStage(PpoConfig):
    """The joint stage on the model that SFT made, or on the base."""

    policy: PolicyStage = PolicyStage()
    rewards: Annotated[list[RewardSource], Field(min_length=1), BeforeValidator(_standing_for_reward_model)] = Field(
        [RewardSource(model=REWARD_MODEL)]
    )
    run: StageRun = StageRun()


class PipelineConfig(Section):
    """All stages from one recipe: SFT, reward model, then PPO, A2C or DPO, each hand-over checked."""

    model: NonEmpty = Field(description="directory or hub id of the causal language model to begin with")
    accuracy_floor: Fraction | None = Field(
        None,
        description="held-out accuracy that a reward model needs before a policy is trained under it (unset: two "
        "standard errors above chance)",
    )
    samples: int = Field(
        4, ge=0, le=1000, description="held-out prompts that the model answers after each stage, for the report"
    )
    sft: SftStage | None = Field(None, description="a first stage, supervised fine-tuning")
    reward: RewardStage | None = Field(None, description="a reward model, for ppo")
    ppo: PpoStage | None = Field(None, description='the aligning stage: PPO, or A2C by ppo.policy.loss = "a2c"')
    dpo: DpoStage | None = Field(None, description="the aligning stage, in place of ppo")
    run: RunSection = RunSection()
    compute: ComputeSection = ComputeSection()
    parallel: ParallelSection = ParallelSection()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        problems = list(_impossible(self)) or list(_impossible_with_what_is_shared(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def aligning(self) -> str:
        """The stage that ends the pipeline."""
        return "dpo" if self.ppo is None else "ppo"

    @property
    def stages(self) -> list[str]:
        """The stages that the recipe asks for, in their order."""
        return [stage for stage in _KINDS if getattr(self, stage) is not None]

    def folder_of(self, stage: str) -> str:
        return str(Path(self.run.directory) / stage)

    def start_of(self, stage: str) -> str:
        """The model that a stage starts from."""
        return self.model if self.sft is None or stage == "sft" else f"{self.folder_of('sft')}/model"

    def recipe_of(self, stage: str) -> StageRecipe:
        """A stage's own recipe: what its section says, before what all share, with what the pipeline fills in."""
        own = getattr(self, stage).model_dump(exclude_unset=True)
        shared = self.model_dump(include={"run", "compute", "parallel"}, exclude_unset=True)
        filled: dict[str, Any] = {"run": {"directory": self.folder_of(stage)}}
        if self.ppo is not None and stage == "ppo":
            filled |= {"policy": {"model": self.start_of(stage)}, "rewards": list(self._rewards(self.ppo))}
        else:
            filled |= {"model": self.start_of(stage)}
        return _KINDS[stage].model_validate(merged(merged(shared, own), filled))

    def _rewards(self, ppo: PpoStage) -> Iterator[dict[str, Any]]:
        for source in ppo.rewards:
            own = {"model": f"{self.folder_of('reward')}/model"} if source.model == REWARD_MODEL else {}
            yield source.model_dump(exclude_unset=True) | own


def _impossible(config: PipelineConfig) -> Iterator[str]:
    """What a pipeline cannot have together, each with what to do instead."""
    reward, ppo, dpo = config.reward, config.ppo, config.dpo
    if ppo is None and dpo is None:
        yield "no stage aligns the model; add a section [ppo] or [dpo]"
    if ppo is not None and dpo is not None:
        yield "ppo and dpo are both there, and a pipeline ends in one of them; leave one out"
        return
    if dpo is not None and reward is not None:
        yield "reward has no effect here: dpo learns with no reward model between; leave it out"
    if ppo is not None:
        yield from _impossible_rewards(config, reward, ppo)
    models = [] if ppo is None else [source.model for source in ppo.rewards if source.model is not None]
    if config.accuracy_floor is not None and not models:
        yield "accuracy_floor has no effect here: there is no reward model; leave it out"


def _impossible_with_what_is_shared(config: PipelineConfig) -> Iterator[str]:
    """What a stage cannot have together with the sections that hold for all of them."""
    for stage in config.stages:
        try:
            config.recipe_of(stage)
        except ValidationError as error:
            yield from (f"{stage}: {found['msg'].removeprefix('Value error, ')}" for found in error.errors())


def _impossible_rewards(config: PipelineConfig, reward: RewardStage | None, ppo: PpoStage) -> Iterator[str]:
    needed = any(source.model == REWARD_MODEL for source in ppo.rewards)
    if needed and reward is None:
        where = (
            "ppo.rewards has an entry that names no" if "rewards" in ppo.model_fields_set else "ppo.rewards names no"
        )
        yield (
            f"{where} model, function or url, and there is no section [reward] to train a model for it; add one, or "
            "name a reward in [[ppo.rewards]]"
        )
    if reward is None:
        return
    if not needed:
        yield (
            "reward has no effect here: ppo.rewards does not use its model; add an entry that names no model, function "
            "or url, which stands for it, or leave reward out"
        )
    if reward.data.eval is None and reward.data.eval_fraction == 0 and config.accuracy_floor != 0:
        yield (
            "reward.data holds no pairs out, so the reward model's accuracy cannot be checked; give "
            "reward.data.eval, or a reward.data.eval_fraction above 0"
        )
    if ppo.sharing.mode == "adapters" and ppo.value.start == "reward" and reward.adapters is None and needed:
        yield (
            'ppo.sharing.mode = "adapters" starts the value model from the reward model\'s adapter, and reward trains '
            'none; add a section [reward.adapters], or set ppo.value.start = "policy" or ppo.sharing.mode = "separate"'
        )
