"""The joint stage: a policy and a value model trained together under a reward, near a frozen reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tandem.config import PpoConfig
from tandem.errors import InputError, NotFinite, RunError
from tandem.health import Watch, watched
from tandem.models.sharing import histogram_of
from tandem.recipe import command_to_resume
from tandem.run import Progress, RunFolder
from tandem.run.checkpoints import Snapshot
from tandem.run.clock import Clock
from tandem.run.disk import writing
from tandem.run.faults import diagnosis
from tandem.run.folder import read_metrics
from tandem.run.machine import machine_record, memory_in_use
from tandem.run.memory import memory_limits, sampling_knobs, training_knobs
from tandem.run.signals import Signals
from tandem.stages.finite import check_scores
from tandem.stages.joint_setup import JointStage, Workers, build
from tandem.stages.joint_start import StartGaps, check_start
from tandem.stages.sampling import InTurn, Sampled, batches, meanwhile, repeat, send_weights
from tandem.stages.saved_rollouts import (
    SavedRollout,
    as_scored,
    check_saved,
    read_saved,
    records,
    split_by_prompt,
    unjudged,
)
from tandem.stages.scoring import skipped_metric, with_scores_only
from tandem.stages.standing import Standing, snapshot_of, take_up
from tandem.stages.state import JointState, start_state
from tandem.stages.step import Judged, judge, learn
from tandem.stages.together import begun, reported_once
from tandem.stages.watching import note, set_rate, stops, tell
from tandem.types import Batch, Prompt, Rollout
from tandem.world import world


@dataclass(frozen=True)
class JointRun:
    """A joint stage on its way: what it works with, and where it leaves its traces.

    `start` is what was found of its models as they were loaded; `since` is when it would have begun had it run in one
    piece, on the monotonic clock.
    """

    stage: JointStage
    config: PpoConfig
    folder: RunFolder
    signals: Signals
    progress: Progress
    watch: Watch
    start: StartGaps
    since: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since

    @property
    def unwell(self) -> bool:
        """Whether the run is to end for what its health is."""
        return stops(self.watch, self.config)

    def snapshot(self, standing: Standing) -> Snapshot:
        return snapshot_of(self.stage, standing, self.folder.metrics_bytes, self.seconds)


def run_ppo(
    config: PpoConfig, progress: Progress, *, resume: bool = False, workers: Workers | None = None
) -> dict[str, Any]:
    """Train by the recipe, or go on with the run that its folder holds; save the models and return the summary.

    `workers` sample and score where others do that than this process.

    Raises InputError for what cannot be used, RunError where the run cannot go on, Interrupted for SIGTERM.
    """
    started, path = time.monotonic(), Path(config.run.directory)
    with begun(path, "ppo", config, resume, progress) as start:
        earlier = {} if start.snapshot is None else start.snapshot.state
        torch.manual_seed(config.run.seed)
        saved = read_saved(config) if start.snapshot is None else []
        stage = build(config, progress, earlier.get("offsets"), workers)
        gaps = check_start(stage, config)
        standing = take_up(stage, config, start.snapshot) if start.snapshot else None
        with RunFolder(path, config, start) as folder, Signals(config.run.grace_seconds / 2) as signals:
            rows = world().from_first(lambda: read_metrics(path))
            watch, since = watched(rows, config), started - earlier.get("seconds", 0.0)
            set_rate(stage.engines["policy"], watch, config)
            run = JointRun(stage, config, folder, signals, progress, watch, gaps, since)
            with reported_once(path, progress.warn), folder.keeper.safe("ppo"):
                standing = standing or begin(run, saved)
                folder.keeper.check_space(run.snapshot(standing))
                return finish(run, train(run, standing))


def begin(run: JointRun, saved: Sequence[SavedRollout]) -> Standing:
    """Before the first step: measure on held-out prompts, and learn from saved rollouts if there are any."""
    state = start_state(run.config)
    with run.signals.may_give_up():
        heldout = evaluate_heldout(run, "before", state)
        try:
            state, pretraining = pretrain_value(run, state, saved)
        except NotFinite as fault:
            raise RunError(f"learning from saved rollouts: {fault}. {fault.remedy}") from None
    return Standing(state, row={}, logged=True, begun={"heldout": heldout, "value_pretraining": pretraining})


def train(run: JointRun, standing: Standing) -> Standing:
    """Step after step, until all are done or an end is asked for."""
    config, keeper = run.config, run.folder.keeper
    prompts = InTurn(batches(run.stage.prompts, config, standing.state.step, standing.data))
    planned = config.steps + (config.value.warmup.steps if config.value.warmup else 0)
    with run.progress.stage("PPO", planned, done=standing.state.step) as shown:
        while True:
            if not standing.logged:
                standing = conclude(run, standing)
                shown.advance(headline(standing.row), note=note(run.watch))
            keeper.boundary(run.snapshot(standing), standing.row)
            if standing.state.finished or keeper.out_of_patience or run.unwell or run.signals.agreed():
                break
            own, data = prompts.next()
            state, row, ahead = step(run, standing, own, lambda: prompts.following()[0])
            standing = replace(standing, state=state, row=row, logged=False, ahead=ahead, data=data)
            keeper.mark(run.snapshot(standing))
    run.signals.end_if_terminating()
    keeper.save_marked()
    return standing


def back_to_best(run: JointRun) -> int:
    """Bring the models back to the best checkpoint, where more steps did not make them better; returns its step."""
    best = take_up(run.stage, run.config, run.folder.keeper.best_snapshot()).state.step
    run.progress.say(f"no better since step {best}: training ends, and the models of that step are saved.")
    return best


def step(
    run: JointRun, standing: Standing, prompts: Sequence[Prompt], following: Callable[[], Sequence[Prompt]]
) -> tuple[JointState, dict[str, float], Sampled | None]:
    """Sample, score, judge, learn: one joint step, the state after it, its metrics, and what was sampled ahead."""
    clock, done, workers = Clock(), standing.state.step, run.stage.workers
    if workers is not None:
        workers.begin_step(done + 1)
    sampled = standing.ahead or sample(run, done, prompts, clock)
    with sampled_ahead(run, standing.state, following, clock) as following_sampled:
        state, metrics = learn_from(run, standing, sampled.rollouts, clock)
        with clock("rollout"):
            ahead = following_sampled.result() if following_sampled else None
    metrics |= {"rollout/staleness": float(done - sampled.version)}
    metrics |= {} if workers is None else workers.metrics()
    metrics |= clock.read(tokens=sum(len(rollout.ids) for rollout in sampled.rollouts))
    return *world().from_first(lambda: (state, metrics)), ahead


def sample(run: JointRun, done: int, prompts: Sequence[Prompt], clock: Clock) -> Sampled:
    """Responses from the policy as it is now, after so many steps."""
    with run.signals.may_give_up():
        with clock("weight_sync"):
            send_weights(run.stage.models.policy, run.stage.generator, done)
        with clock("rollout"):
            return generate(run, prompts, done + 1)


def generate(run: JointRun, prompts: Sequence[Prompt], number: int) -> Sampled:
    """What the generator answers, for the step of this number."""
    generator = run.stage.generator
    with memory_limits("sampling", number, sampling_knobs(run.config)):
        return Sampled(generator.generate(prompts), generator.version)


@contextmanager
def sampled_ahead(
    run: JointRun, state: JointState, following: Callable[[], Sequence[Prompt]], clock: Clock
) -> Iterator[Future[Sampled] | None]:
    """Within it, with a staleness of 1, the next step's responses are sampled from the policy as it is at its start.

    They are whole at its end, so that between two steps nothing is on its way. The last step has none to follow.
    """
    if run.config.rollout.staleness == 0 or state.at_last_step:
        yield None
        return
    generator, prompts = run.stage.generator, following()
    with clock("weight_sync"):
        send_weights(run.stage.models.policy, generator, state.step)
    with meanwhile(lambda: generate(run, prompts, state.step + 2), give_up=generator.stop) as sampled:
        yield sampled


def learn_from(
    run: JointRun, standing: Standing, sampled: list[Rollout], clock: Clock
) -> tuple[JointState, dict[str, float]]:
    """Score, judge, learn: what a step does with its responses.

    A step that meets a number that is not finite is skipped. Raises RunError after too many of them.
    """
    stage, config, state = run.stage, run.config, standing.state
    number = state.step + 1
    judged: Judged | None = None
    try:
        with run.signals.may_give_up():
            with clock("score"):
                everything = stage.score(sampled)
                rollouts, scores, skipped = with_scores_only(sampled, everything)
                check_scores(scores, rollouts)
            if skipped and not standing.row.get("reward/skipped"):
                run.progress.warn(
                    f"step {number}: {skipped} of {len(sampled)} samples have no score; {everything.fault}."
                )
            with clock("evaluate"), memory_limits("the evaluation", number, training_knobs(config)):
                scored = state.with_scores(scores)
                judged = judge(stage, config, scored, rollouts, scores)
                if number == 1:
                    check_range(config, judged.batch)
            if number % config.save_rollouts_every == 0:
                kept = rollouts[: config.rollouts_to_save]
                run.folder.save_rollouts(f"step_{number:06d}", records(kept, judged, scores, stage.tokenizer))
        limits = memory_limits("the update", number, training_knobs(config))
        with clock("update"), limits, run.folder.keeper.updating():
            after, metrics = learn(stage, config, scored, judged)
            metrics |= skipped_metric(config.rewards, skipped)
    except NotFinite as fault:
        after, metrics = state.after_fault(), {} if judged is None else judged.metrics
        samples = unjudged(sampled) if judged is None else records(rollouts, judged, scores, stage.tokenizer)
        run.folder.keep_fault(number, fault, samples)
        run.progress.warn(f"step {number} is skipped: {fault}; what it worked on is kept in faults/.")
        if after.faults.in_a_row >= config.run.max_faults_in_a_row:
            raise diagnosis(fault, after.faults, number) from None
    return after, metrics | after.faults.metrics() | memory_in_use(stage.placement.device)


def conclude(run: JointRun, standing: Standing) -> Standing:
    """What is left of a step once the models have learnt: evaluation where it is due, and the row of metrics."""
    config, state, row = run.config, standing.state, dict(standing.row)
    if config.eval_every and state.step % config.eval_every == 0 and not state.finished:
        with run.signals.may_give_up():
            heldout = evaluate_heldout(run, f"{state.step:06d}", state)
        row |= {f"heldout/{name}": value for name, value in heldout.items()}
    change = run.watch.observe(state.step, row)
    row |= run.watch.flags()
    run.folder.log(state.step, row)
    tell(change, run.watch, config, run.progress)
    set_rate(run.stage.engines["policy"], run.watch, config)
    if row.get("value/warming_up") and not state.course.warming_up:
        say_end_of_warmup(config, state.step, row["value/explained_variance"], run.progress)
    return replace(standing, row=row, logged=True)


def finish(run: JointRun, standing: Standing) -> dict[str, Any]:
    """Measure what was reached, save the models, write the summary."""
    stage, state, config = run.stage, standing.state, run.config
    best_step = back_to_best(run) if run.folder.keeper.out_of_patience else None
    interrupted = not state.finished and best_step is None and not run.unwell
    if run.unwell:
        run.progress.say(f'health.act = "stop": the run ends after step {state.step}, its models saved as they are.')
    heldout_after: dict[str, float] = {}
    if interrupted:
        run.progress.warn(
            f"interrupted; the models are saved as they are after step {state.step}. Go on with: "
            f"{command_to_resume('ppo', run.folder.path)}"
        )
    else:
        with run.signals.may_give_up():
            heldout_after = evaluate_heldout(run, "after", state)
    for line in stage.prompts.notes(standing.data):
        run.progress.say(line)
    with run.progress.console.status("saving the models"), writing(run.folder.path):
        stage.save(run.folder)
    summary = {
        "stage": "ppo",
        "interrupted": interrupted,
        "seed": config.run.seed,
        "steps": state.step,
        "best_step": best_step,
        "start": asdict(run.start),
        "warmup_steps": state.course.warmup_done,
        "seconds": run.seconds,
        **machine_record(stage.placement.device),
        "cluster": None if stage.workers is None else stage.workers.summary(),
        "last_step": standing.row,
        "heldout": {"before": standing.begun["heldout"], "after": heldout_after},
        "value_pretraining": standing.begun["value_pretraining"],
        "health": [finding.as_record() for finding in run.watch.findings],
        "state": state.as_record(),
        **stage.prompts.facts(standing.data),
        "reward_models": {
            name: model.card and model.card.heldout_accuracy for name, model in stage.reward_models.items()
        },
    }
    run.folder.write_summary(summary)
    return summary


def check_range(config: PpoConfig, batch: Batch) -> None:
    """Raises InputError where a categorical value head cannot say a tenth of the first step's returns or more."""
    histogram, mask = histogram_of(config.value), batch.tokens.mask
    if histogram is None:
        return
    returns = batch.returns[mask]
    outside = float(histogram.outside(batch.returns, mask) / mask.sum())
    if outside >= 0.1:
        raise InputError(
            f"value.histogram goes from {histogram.low:g} to {histogram.high:g}, and {outside:.0%} of the first "
            f"step's returns lie outside (they go from {float(returns.min()):.3g} to {float(returns.max()):.3g}); "
            "widen it, and leave room for what the policy will earn later."
        )


def say_end_of_warmup(config: PpoConfig, steps: int, explained_variance: float, progress: Progress) -> None:
    """Why the policy learns from here on; a warning where a criterion was set and not met."""
    assert config.value.warmup is not None
    wanted = config.value.warmup.explained_variance
    said = f"value warm-up ends after {steps} steps, explained variance {explained_variance:.3f}"
    if wanted is None:
        progress.say(f"{said}.")
    elif explained_variance >= wanted:
        progress.say(f"{said} (wanted {wanted:g}).")
    else:
        progress.warn(
            f"{said}, which is less than the {wanted:g} wanted. The policy learns from here on all the same; more "
            "value.warmup.steps, another value.lr or value.epochs may help."
        )


def pretrain_value(
    run: JointRun, state: JointState, saved: Sequence[SavedRollout]
) -> tuple[JointState, dict[str, float]]:
    """Let the value model learn on rollouts that an earlier run saved; a tenth of their prompts measures the gain.

    Returns the state, with the moments of what those rollouts earned, and the explained variance on that tenth before
    and after.
    """
    stage, config, settings = run.stage, run.config, run.config.value.pretraining
    if settings is None:
        return state, {}
    check_saved(saved, stage.models.policy.trunk, config)
    training, heldout = split_by_prompt(saved, config.run.seed)
    size = config.rollout.prompts_per_step * config.rollout.responses_per_prompt
    state = state.with_scores(as_scored(saved)[1])
    before = explained_of_saved(stage, config, state, heldout)
    with run.progress.stage("value model, saved rollouts", settings.epochs) as shown:
        for _ in range(settings.epochs):
            for start in range(0, len(training), size):
                judged = judge(stage, config, state, *as_scored(training[start : start + size]))
                check_range(config, judged.batch)
                learnt, _ = learn(stage, config, state.rehearsing(), judged)
                state = replace(state, returns=learnt.returns)
            shown.advance({})
    after = explained_of_saved(stage, config, state, heldout)
    run.progress.say(f"value model: explained variance on {len(heldout)} saved rollouts {before:.3f} -> {after:.3f}.")
    return state, {
        "rollouts": len(training),
        "heldout_rollouts": len(heldout),
        "explained_variance/before": before,
        "explained_variance/after": after,
    }


def explained_of_saved(stage: JointStage, config: PpoConfig, state: JointState, saved: Sequence[SavedRollout]) -> float:
    return judge(stage, config, state, *as_scored(saved)).metrics["value/explained_variance"]


def evaluate_heldout(run: JointRun, name: str, state: JointState) -> dict[str, float]:
    """Measure the models on held-out prompts, without a trace in what training will sample."""
    stage, config = run.stage, run.config
    if not stage.heldout:
        return {}
    rollouts = stage.fresh_generator(config).generate(repeat(stage.heldout, config.eval_responses_per_prompt))
    rollouts, scores, skipped = with_scores_only(rollouts, stage.score(rollouts))
    try:
        check_scores(scores, rollouts)
        judged = judge(stage, config, state, rollouts, scores)
    except NotFinite as fault:
        run.progress.warn(f"the evaluation on held-out prompts ({name}) is left out: {fault}.")
        return {}
    run.folder.save_rollouts(f"heldout_{name}", records(rollouts, judged, scores, stage.tokenizer))
    return judged.metrics | skipped_metric(config.rewards, skipped)


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The few numbers that matter; a skipped step may not have them."""
    names = {
        "score": "objective/score",
        "KL": "objective/kl",
        "explained variance": "value/explained_variance",
        "length": "rollout/length",
    }
    return {short: metrics.get(name, float("nan")) for short, name in names.items()}
