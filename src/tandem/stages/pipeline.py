"""All stages from one recipe, each from what the one before handed over: SFT, reward model, then PPO, A2C or DPO."""

from __future__ import annotations

import gc
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import tomli_w

from tandem.errors import DONE, INTERRUPTED, REFUSED, InputError, Interrupted, RunError
from tandem.launch import run_together
from tandem.models.loading import pick_device
from tandem.pipeline_config import PipelineConfig, StageRecipe, in_several_processes
from tandem.recipe import RECORD, is_finished, read_record, without_none
from tandem.run import Progress
from tandem.run.disk import write_json, write_whole, writing
from tandem.run.lock import claimed
from tandem.run.machine import machine_record
from tandem.run.memory import memory_limits, steps_in, training_knobs
from tandem.run.record import changed_inputs, made_with
from tandem.run.signals import Terminated, ended_by_sigterm
from tandem.run.start import Changed, changed_settings, check_free
from tandem.stages.answers import answers_by_stage
from tandem.stages.dpo import run_dpo
from tandem.stages.handover import Check, checks_after, checks_before
from tandem.stages.joint_run import run_joint
from tandem.stages.look_ahead import look_ahead, of_stage
from tandem.stages.reward import run_reward
from tandem.stages.sft import run_sft
from tandem.view import reported
from tandem.view.outcome import reached
from tandem.world import settle

_RUN: Mapping[str, Callable[..., dict[str, Any]]] = {
    "sft": run_sft,
    "reward": run_reward,
    "dpo": run_dpo,
    "ppo": run_joint,
}
# Settings of how a stage is computed, watched and saved: what it learns is the same with others.
_ANY_WILL_DO = (
    "compute.",
    "parallel.",
    "run.trackers",
    "run.grace_seconds",
    "run.max_faults_in_a_row",
    "checkpoints.every",
    "checkpoints.keep",
    "checkpoints.spare_copy",
    "save_rollouts_every",
    "rollouts_to_save",
)


def run_pipeline(config: PipelineConfig, progress: Progress, *, resume: bool = False) -> dict[str, Any]:
    """Run the stages that the recipe asks for, or go on with those that its folder holds; return the summary.

    Raises InputError for what cannot be used, RunError where a stage cannot go on or hands over what it must not,
    Interrupted where it is ended from outside.
    """
    path = Path(config.run.directory)
    with claimed(path):
        if not resume:
            for folder in (path, *(path / stage for stage in config.stages)):
                check_free(folder, whole=path)
        look_ahead(config, [stage for stage in config.stages if not Standing.of(stage, config).stands])
        write_down(config, path)
        with told_how_to_go_on(path), reported(path, progress.warn):
            return run_stages(config, path, progress)


def write_down(config: PipelineConfig, path: Path) -> None:
    """The recipe as it was given: what each stage makes of it stands in its own folder. Raises InputError."""
    try:
        write_whole(path / "config.toml", tomli_w.dumps(config.model_dump(exclude_unset=True)))
        write_json({"stage": "pipeline", "made_with": made_with()}, path / RECORD)
        (path / "summary.json").unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"run.directory = {str(path)!r} cannot be written: {error.strerror}.") from error


@contextmanager
def told_how_to_go_on(path: Path) -> Iterator[None]:
    """Where the pipeline is ended outside of a stage's steps, which tell it themselves, this does."""
    try:
        with ended_by_sigterm():
            yield
    except Terminated:
        raise Interrupted(f"ended by SIGTERM. {way_on(path)}") from None
    except KeyboardInterrupt:
        raise Interrupted(f"stopped. {way_on(path)}") from None


def way_on(path: Path) -> str:
    return f"What is done stays; go on with: tandem pipeline --resume {path}"


def run_stages(config: PipelineConfig, path: Path, progress: Progress) -> dict[str, Any]:
    """One stage after the other, each between its checks; what came about is summed up however it ends."""
    results: dict[str, dict[str, Any]] = {}
    checks: list[Check] = []
    answers: list[dict[str, Any]] = []
    complete = False
    try:
        for number, stage in enumerate(config.stages, start=1):
            hold(checks_before(stage, config), checks, path, progress)
            progress.say(f"stage {number} of {len(config.stages)}: {stage}, from {config.start_of(stage)}")
            results[stage] = run_stage(stage, config, path, progress)
            if results[stage]["interrupted"]:
                break
            hold(checks_after(stage, config, results[stage]), checks, path, progress)
            gc.collect()
        else:
            with progress.console.status("answers of every stage's model"):
                answers = answers_by_stage(config) if config.samples else []
            complete = True
    finally:
        summary = summed_up(config, results, checks, answers, complete)
        if results or checks:
            with writing(path / "summary.json"):
                write_json(summary, path / "summary.json")
    return summary


def hold(found: Iterable[Check], checks: list[Check], path: Path, progress: Progress) -> None:
    """Tell what was checked and keep it. Raises RunError for the first that does not hold, with its remedy."""
    for check in found:
        checks.append(check)
        if check.held is False:
            raise RunError(f"{check.where}: {check.said}; {check.remedy} {way_on(path)}")
        progress.say(f"{check.where}: {check.said}")


@dataclass(frozen=True)
class Standing:
    """What a stage's folder holds: whether a run has begun and finished there, and what it was told or given otherwise
    than the recipe now says: settings that let it learn something else, and models or data of other content."""

    begun: bool
    finished: bool
    told: Sequence[Changed]
    given: Sequence[str]

    @classmethod
    def of(cls, stage: str, config: PipelineConfig) -> Self:
        recipe, folder = config.recipe_of(stage), Path(config.folder_of(stage))
        if steps_in(folder) == 0:
            return cls(begun=False, finished=False, told=[], given=[])
        given = list(changed_inputs(read_record(folder), recipe, moved=True))
        told = [one for one in told_otherwise(recipe, folder, config) if one.name not in given]
        return cls(begun=True, finished=is_finished(folder), told=told, given=given)

    @property
    def stands(self) -> bool:
        """Whether the stage is done and stays as it is."""
        return self.finished and not self.told and not self.given

    @property
    def goes_on(self) -> bool:
        """Whether its run can be gone on with: by whatever its own --resume takes, a finished one by more steps."""
        return self.begun and not self.given and (all(map(plans_more, self.told)) or not self.finished)

    def changes(self) -> str:
        return "; ".join([*map(str, self.told), *(f"{name} has other content" for name in self.given)])


def plans_more(one: Changed) -> bool:
    """Whether a setting only lets a run take more steps than before."""
    known = isinstance(one.now, int | float) and isinstance(one.before, int | float)
    return one.name in ("steps", "epochs") and known and one.now > one.before


def run_stage(stage: str, config: PipelineConfig, path: Path, progress: Progress) -> dict[str, Any]:
    """Bring a stage to its end: from its beginning, from where it was cut short, or not at all where it is finished.

    One that was made from other data or models, or is finished by another recipe, is set aside and done again.
    """
    recipe, folder, standing = config.recipe_of(stage), path / stage, Standing.of(stage, config)
    if standing.stands:
        summary = summary_of(folder)
        progress.say(f"{stage} is finished: {reached(summary)}")
        return summary
    if standing.begun and not standing.goes_on:
        kept = set_aside(folder)
        progress.say(f"{stage} is done again ({standing.changes()}); what there was is kept as {kept}")
    if in_several_processes(recipe):
        with of_stage(stage, path):
            return run_in_processes(stage, recipe, path, resume=standing.goes_on)
    settle(recipe.parallel.activation_checkpointing)
    with of_stage(stage, path), memory_limits(f"tandem {stage}", lambda: steps_in(folder), training_knobs(recipe)):
        return _RUN[stage](recipe, progress, resume=standing.goes_on)


def run_in_processes(stage: str, recipe: StageRecipe, path: Path, *, resume: bool) -> dict[str, Any]:
    """The stage by its own command, whose processes say themselves how they fare; what a summary tells of it.

    Raises InputError, RunError and Interrupted as the stage does in this process.
    """
    folder = path / stage
    with tempfile.TemporaryDirectory(prefix="tandem-") as scratch:
        given = Path(scratch) / f"{stage}.toml"
        given.write_text(tomli_w.dumps(without_none(recipe.model_dump(exclude_unset=True))), encoding="utf-8")
        words = [stage, str(given), *(["--resume", str(folder)] if resume else [])]
        status = run_together(words, recipe.parallel.processes)
    if status == REFUSED:
        raise InputError("it was refused for the reason above.")
    if status not in (DONE, INTERRUPTED):
        raise RunError(f"{stage} failed for the reason above. {way_on(path)}")
    if status == INTERRUPTED and (is_finished(folder) or not (folder / "summary.json").exists()):
        raise Interrupted(f"{stage} was stopped. {way_on(path)}")
    return summary_of(folder)


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def told_otherwise(recipe: StageRecipe, folder: Path, config: PipelineConfig) -> list[Changed]:
    """Settings that let a stage learn something else than when its folder was written.

    Where an earlier stage's model stands is none of them, since a pipeline may be moved.
    """

    def is_place(one: Changed) -> bool:
        return one.name.endswith("model") and Path(str(one.now)).is_relative_to(config.run.directory)

    changed = changed_settings(folder, recipe)
    return [one for one in changed if not one.name.startswith(_ANY_WILL_DO) and not is_place(one)]


def set_aside(folder: Path) -> Path:
    """Give a run's folder a name of its own, so that its place is free."""
    number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.{n}").exists())
    with writing(folder.parent):
        return folder.rename(folder.with_name(f"{folder.name}.{number}"))


def summed_up(
    config: PipelineConfig,
    results: Mapping[str, Mapping[str, Any]],
    checks: Sequence[Check],
    answers: Sequence[Mapping[str, Any]],
    complete: bool,
) -> dict[str, Any]:
    return {
        "stage": "pipeline",
        "interrupted": not complete,
        "model": f"{config.folder_of(config.aligning)}/model" if complete else None,
        "seed": config.run.seed,
        "seconds": sum(result["seconds"] for result in results.values()),
        **machine_record(pick_device(config.compute.device)),
        "stages": [
            {
                "stage": stage,
                "finished": not result["interrupted"],
                "steps": result["steps"],
                "seconds": result["seconds"],
                "reached": reached(result),
            }
            for stage, result in results.items()
        ],
        "handovers": [check.as_record() for check in checks],
        "answers": list(answers),
    }
