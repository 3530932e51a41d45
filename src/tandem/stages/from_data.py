"""Training one model from data: what supervised fine-tuning, the reward model and DPO have in common."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from tandem.config import AdapterSection, DpoConfig, RewardConfig, SftConfig
from tandem.data.feed import Feed, Place
from tandem.engine.local import LocalEngine
from tandem.errors import NotFinite
from tandem.models.trunk import Trunk
from tandem.recipe import command_to_resume
from tandem.run import Progress, RunFolder
from tandem.run.checkpoints import Snapshot
from tandem.run.disk import writing
from tandem.run.faults import Faults, diagnosis
from tandem.run.machine import machine_record
from tandem.run.memory import memory_limits
from tandem.run.random_state import random_numbers, random_tensors, restore_random
from tandem.run.record import Recipe
from tandem.run.signals import Signals
from tandem.run.start import check_planned
from tandem.stages.together import begun, reported_once
from tandem.world import world

Item = TypeVar("Item")


@dataclass(frozen=True)
class Lesson(Generic[Item]):
    """What is learnt: from which items, how, and how it is measured.

    `planned_by` is the setting that says how many steps there are; `learn` takes one optimiser step on a minibatch and
    returns its metrics; `measure` returns metrics on held-out rows; `write_down` is what is kept of an item whose step
    is skipped; `save` writes the model, as far as training has come; `facts` are the lesson's own lines of the summary;
    `memory_knobs` are the settings that make it need less.
    """

    name: str
    engine: LocalEngine
    feed: Feed[Item]
    items_per_step: int
    steps: int
    planned_by: str
    eval_every: int
    learn: Callable[[Sequence[Item]], dict[str, float]]
    measure: Callable[[], dict[str, float]]
    write_down: Callable[[Item], Mapping[str, Any]]
    save: Callable[[Path, Standing], None]
    facts: Callable[[Standing], Mapping[str, Any]]
    headline: Sequence[str]
    memory_knobs: Mapping[str, str]
    device: torch.device


@dataclass(frozen=True)
class Standing:
    """How far training has come: the latest step with its metrics, whether they are written down already, the latest
    held-out metrics and those before the first step, the steps that were skipped, where the data stand, and the step
    whose model is kept where training ended for getting no better."""

    step: int
    row: Mapping[str, float]
    logged: bool
    before: Mapping[str, float]
    heldout: Mapping[str, float]
    faults: Faults
    data: Place = None
    best_step: int | None = None


@dataclass(frozen=True)
class Training(Generic[Item]):
    """A lesson on its way; `stage` is the command's name for it.

    `since` is when it would have begun had it run in one piece, on the monotonic clock.
    """

    stage: str
    lesson: Lesson[Item]
    folder: RunFolder
    signals: Signals
    progress: Progress
    max_faults_in_a_row: int
    since: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since

    def snapshot(self, standing: Standing) -> Snapshot:
        """All that is needed to go on exactly."""
        tensors = {f"model/{name}": tensor for name, tensor in self.lesson.engine.state().items()}
        tensors |= {f"process/{name}": tensor for name, tensor in random_tensors().items()}
        state = {
            "row": standing.row,
            "logged": standing.logged,
            "before": standing.before,
            "heldout": standing.heldout,
            "faults": [standing.faults.total, standing.faults.in_a_row],
            "data": standing.data,
            "random": random_numbers(),
            "seconds": self.seconds,
            "metrics_bytes": self.folder.metrics_bytes,
        }
        return Snapshot(standing.step, tensors, state)


def trained_part(trunk: Trunk, settings: AdapterSection | None) -> tuple[str | None, list[nn.Parameter]]:
    """The name of the adapter that trains, None where all weights do, and the parameters."""
    if settings is None:
        return None, list(trunk.model.requires_grad_(True).parameters())
    return "policy", trunk.add_adapter("policy", settings)


def planned(config: SftConfig | RewardConfig | DpoConfig, feed: Feed[Item], per_step: int) -> tuple[int, str]:
    """Steps in all, and the setting that says so: `steps`, or passes over the items, where those are counted."""
    if config.steps is not None:
        return config.steps, "steps"
    assert feed.count is not None
    return math.ceil(config.epochs * feed.count / per_step), "epochs"


def run_from_data(
    stage: str, config: Recipe, progress: Progress, resume: bool, prepare: Callable[[], Lesson[Item]]
) -> dict[str, Any]:
    """Prepare, train, save and sum up, in the run's folder, from its first step or from where it was cut short.

    `prepare` loads data and model. Raises InputError for what cannot be used, RunError where the run cannot go on,
    Interrupted for SIGTERM.
    """
    started, path = time.monotonic(), Path(config.run.directory)
    with begun(path, stage, config, resume, progress) as start:
        torch.manual_seed(config.run.seed)
        lesson = prepare()
        standing = take_up(lesson, start.snapshot) if start.snapshot else None
        since = started - (start.snapshot.state["seconds"] if start.snapshot else 0.0)
        with RunFolder(path, config, start) as folder, Signals(config.run.grace_seconds / 2) as signals:
            training = Training(stage, lesson, folder, signals, progress, config.run.max_faults_in_a_row, since)
            with reported_once(path, progress.warn), folder.keeper.safe(stage):
                return sum_up(training, train_from_data(training, standing), config.run.seed)


def sum_up(training: Training[Item], reached: Standing, seed: int) -> dict[str, Any]:
    """Save the model and write the summary."""
    lesson, folder = training.lesson, training.folder
    for line in lesson.feed.notes(reached.data):
        training.progress.say(line)
    with training.progress.console.status("saving the model"), writing(folder.model):
        lesson.save(folder.model, reached)
    summary = {
        "stage": training.stage,
        "interrupted": reached.step < lesson.steps and reached.best_step is None,
        "best_step": reached.best_step,
        "seed": seed,
        "steps": reached.step,
        "seconds": training.seconds,
        **machine_record(lesson.device),
        **lesson.facts(reached),
        **lesson.feed.facts(reached.data),
        "last_step": reached.row,
    }
    folder.write_summary(summary)
    return summary


def train_from_data(training: Training[Item], standing: Standing | None) -> Standing:
    """Step after step, from the first or from where a run stands, until all are done or an end is asked for.

    Raises RunError after too many steps in a row that were skipped for numbers that are not finite.
    """
    lesson, keeper, signals = training.lesson, training.folder.keeper, training.signals
    standing = standing or begin(training)
    keeper.check_space(training.snapshot(standing))
    batches = lesson.feed.batches(lesson.items_per_step, standing.step, standing.data)
    with training.progress.stage(lesson.name, lesson.steps, done=standing.step) as shown:
        while True:
            if not standing.logged:
                standing = conclude(training, standing)
                short = {name: standing.row.get(f"train/{name}", float("nan")) for name in lesson.headline}
                shown.advance(short)
            keeper.boundary(training.snapshot(standing), standing.row)
            if standing.step >= lesson.steps or keeper.out_of_patience or signals.agreed():
                break
            items, data = next(batches)
            standing = replace(step(training, standing, items), data=data)
            keeper.mark(training.snapshot(standing))
    signals.end_if_terminating()
    keeper.save_marked()
    if keeper.out_of_patience:
        return back_to_best(training, standing)
    return standing if standing.step == lesson.steps else interrupted(training, standing)


def begin(training: Training[Item]) -> Standing:
    """Before the first step: measure on held-out rows."""
    with training.signals.may_give_up():
        heldout = training.lesson.measure()
    return Standing(0, row={}, logged=True, before=heldout, heldout=heldout, faults=Faults())


def take_up(lesson: Lesson[Item], snapshot: Snapshot) -> Standing:
    """Bring a model that was just loaded to where the snapshot was taken.

    Raises InputError for another model's snapshot, one of more steps than are planned, or one of data in another order.
    """
    state = snapshot.state
    lesson.feed.check(snapshot.step, state.get("data"))
    check_planned(snapshot.step, lesson.steps, lesson.planned_by)
    lesson.engine.load_state(snapshot.under("model"))
    restore_random(snapshot.under("process"), state["random"])
    faults = Faults(*state["faults"])
    return Standing(
        snapshot.step, state["row"], state["logged"], state["before"], state["heldout"], faults, state.get("data")
    )


def step(training: Training[Item], standing: Standing, items: Sequence[Item]) -> Standing:
    """One optimiser step, skipped where a number is not finite."""
    lesson, number, faults = training.lesson, standing.step + 1, standing.faults.after_good_step()
    lesson.engine.set_progress(standing.step, lesson.steps)
    metrics = {"train/lr": lesson.engine.lr}
    try:
        with memory_limits("the update", number, lesson.memory_knobs), training.folder.keeper.updating():
            metrics |= lesson.learn(items)
    except NotFinite as fault:
        faults = standing.faults.after_fault()
        training.folder.keep_fault(number, fault, [lesson.write_down(item) for item in items])
        training.progress.warn(f"step {number} is skipped: {fault}; what it worked on is kept in faults/.")
        if faults.in_a_row >= training.max_faults_in_a_row:
            raise diagnosis(fault, faults, number) from None
    return replace(standing, step=number, row=metrics | faults.metrics(), logged=False, faults=faults)


def conclude(training: Training[Item], standing: Standing) -> Standing:
    """Evaluate where that is due, and write the row of metrics down."""
    lesson, heldout, row = training.lesson, standing.heldout, dict(standing.row)
    if standing.step % lesson.eval_every == 0 or standing.step == lesson.steps:
        with training.signals.may_give_up():
            heldout = lesson.measure()
        row |= heldout
    row = world().from_first(lambda: row)
    training.folder.log(standing.step, row)
    return replace(standing, row=row, logged=True, heldout=heldout)


def back_to_best(training: Training[Item], standing: Standing) -> Standing:
    """The model of the best checkpoint, where more steps did not make it better; the steps done stay as they are."""
    best = take_up(training.lesson, training.folder.keeper.best_snapshot())
    training.progress.say(f"no better since step {best.step}: training ends, and the model of that step is saved.")
    return replace(standing, heldout=best.heldout, best_step=best.step)


def interrupted(training: Training[Item], standing: Standing) -> Standing:
    """Tell the person how to go on, and measure the model as it is."""
    training.progress.warn(
        f"interrupted; the model is saved as it is after step {standing.step}. Go on with: "
        f"{command_to_resume(training.stage, training.folder.path)}"
    )
    return replace(standing, heldout=training.lesson.measure())
