"""Supervised fine-tuning: raise the likelihood of the given answers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem import algo
from tandem.config import SftConfig
from tandem.data.examples import Example, SplitRows, endless_order, read_examples
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.loading import check_length, load_causal, load_tokenizer, pick_device, pick_dtype
from tandem.models.saving import save_policy
from tandem.models.trunk import Trunk
from tandem.run import Progress, RunFolder
from tandem.run.disk import writing
from tandem.run.lock import claimed
from tandem.run.machine import machine_record
from tandem.run.signals import Signals
from tandem.run.start import start_of
from tandem.stages.finite import check_losses
from tandem.stages.from_data import Lesson, Training, take_up, train_from_data
from tandem.types import split_by_tokens, whole_texts


def run_sft(config: SftConfig, progress: Progress, *, resume: bool = False) -> dict[str, Any]:
    """Train by the recipe, or go on with the run that its folder holds; save the model and return the summary.

    Raises InputError for what cannot be used, RunError where the run cannot go on, Interrupted for SIGTERM.
    """
    started, path = time.monotonic(), Path(config.run.directory)
    with claimed(path):
        start = start_of(path, "sft", config, resume, progress)
        torch.manual_seed(config.run.seed)
        device = pick_device(config.compute.device)
        tokenizer = load_tokenizer(config.model, "model")
        rows = read_examples(config.data, tokenizer, config.run.seed)
        for line in rows.report():
            progress.say(line)
        with progress.console.status("loading the model"):
            trunk = Trunk(load_causal(config.model, "model", pick_dtype(config.compute.precision, device), device))
        check_length(trunk.model, max(len(example.ids) for example in [*rows.train, *rows.heldout]), "model")
        adapter = None if config.adapters is None else "policy"
        lesson = make_lesson(config, trunk, adapter, rows)
        standing = take_up(lesson, start.snapshot) if start.snapshot else None
        since = started - (start.snapshot.state["seconds"] if start.snapshot else 0.0)
        with RunFolder(path, config, start) as folder, Signals(config.run.grace_seconds / 2) as signals:
            training = Training("sft", lesson, folder, signals, progress, config.run.max_faults_in_a_row, since)
            with folder.keeper.safe("sft"):
                reached = train_from_data(training, standing)
                with progress.console.status("saving the model"), writing(folder.model):
                    save_policy(trunk, adapter, tokenizer, folder.model)
                summary = {
                    "stage": "sft",
                    "interrupted": reached.step < lesson.steps,
                    "seed": config.run.seed,
                    "steps": reached.step,
                    "train_rows": len(rows.train),
                    "seconds": training.seconds,
                    **machine_record(device),
                    "heldout": {"rows": len(rows.heldout), "before": reached.before, "after": reached.heldout},
                    "last_step": reached.row,
                }
                folder.write_summary(summary)
                return summary


def make_lesson(config: SftConfig, trunk: Trunk, adapter: str | None, rows: SplitRows[Example]) -> Lesson[Example]:
    """What trains and on what: all weights, or an adapter, on the rows in a new random order for each pass."""
    if config.adapters is not None and adapter is not None:
        parameters = trunk.add_adapter(adapter, config.adapters)
    else:
        parameters = list(trunk.model.requires_grad_(True).parameters())
    model, budget = CausalPolicy(trunk, FULL_DISTRIBUTION, adapter), config.compute.tokens_per_microbatch
    engine = LocalEngine([ParameterGroup(parameters, config.optimizer.lr)], config.optimizer)
    random = torch.Generator().manual_seed(config.run.seed)
    return Lesson(
        name="SFT",
        engine=engine,
        order=endless_order([[example] for example in rows.train], random),
        items_per_step=config.sequences_per_minibatch,
        steps=math.ceil(config.epochs * len(rows.train) / config.sequences_per_minibatch),
        eval_every=config.eval_every,
        learn=lambda examples: train_on(model, examples, engine, budget),
        measure=lambda: measure_heldout(model, rows.heldout, budget),
        write_down=asdict,
        headline=["loss"],
    )


def train_on(model: CausalPolicy, examples: Sequence[Example], engine: LocalEngine, budget: int) -> dict[str, float]:
    """One optimiser step on a minibatch."""
    sums = algo.Sums()
    count = sum(sum(example.taught[1:]) for example in examples)
    for loss, tokens in loss_parts(model, examples, budget):
        engine.backward(loss / count)
        sums.add("train/loss", loss.detach(), tokens)
    check_losses(sums, engine)
    return {**sums.means(), "train/tokens": count, "train/grad_norm": engine.step()}


@torch.no_grad()
def measure_heldout(model: CausalPolicy, examples: Sequence[Example], budget: int) -> dict[str, float]:
    """Loss a token in nats on rows that were not trained on; empty where there are none."""
    sums = algo.Sums()
    for loss, tokens in loss_parts(model, examples, budget):
        sums.add("heldout/loss", loss, tokens)
    return dict(sums.means())


def loss_parts(model: CausalPolicy, examples: Sequence[Example], budget: int) -> Iterator[tuple[Tensor, int]]:
    """-sum log pi over the taught tokens, and their number, a micro-batch at a time.

    A sequence's first token has nothing before it and is never counted.
    """
    if not examples:
        return
    for rows in split_by_tokens(torch.tensor([len(example.ids) for example in examples]), budget):
        part = [examples[row] for row in rows.tolist()]
        tokens = whole_texts([example.ids for example in part], [1] * len(part)).to(model.device)
        taught = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(example.taught[1:]) for example in part], batch_first=True
        ).to(model.device)
        yield -algo.masked_sum(model.logprobs(tokens), taught), int(taught.sum())
