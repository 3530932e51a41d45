"""Supervised fine-tuning: raise the likelihood of the given answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from tandem import algo
from tandem.config import SftConfig
from tandem.data.examples import Example, read_examples
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.loading import load_tokenizer, pick_device, pick_dtype
from tandem.models.saving import save_policy
from tandem.models.source import check_length, read_config
from tandem.models.unread import load_trunk
from tandem.run import Progress
from tandem.run.memory import training_knobs
from tandem.stages.finite import check_losses
from tandem.stages.from_data import Lesson, planned, run_from_data, trained_part
from tandem.stages.together import of_all
from tandem.types import whole_texts
from tandem.world import world


def run_sft(config: SftConfig, progress: Progress, *, resume: bool = False) -> dict[str, Any]:
    """Train by the recipe, or go on with the run that its folder holds; save the model and return the summary.

    Raises InputError for what cannot be used, RunError where the run cannot go on, Interrupted for SIGTERM.
    """
    return run_from_data("sft", config, progress, resume, lambda: prepare(config, progress))


def prepare(config: SftConfig, progress: Progress) -> Lesson[Example]:
    """Load rows and model; all weights train, or an adapter."""
    device = pick_device(config.compute.device)
    trust = config.compute.trust_remote_code
    tokenizer = load_tokenizer(config.model, "model", trust)
    rows = read_examples(config.data, tokenizer, config.run.seed)
    for line in rows.notes:
        progress.say(line)
    check_length(read_config(config.model, "model", trust), rows.longest, "model")
    with progress.console.status("loading the model"):
        dtype = pick_dtype(config.compute.precision, device)
        trunk = load_trunk(config.model, "model", dtype, device, trust, progress.say)
    adapter, parameters = trained_part(trunk, config.adapters)
    model, budget = CausalPolicy(trunk, FULL_DISTRIBUTION, adapter), config.compute.tokens_per_microbatch
    engine = LocalEngine([ParameterGroup(parameters, config.optimizer.lr)], config.optimizer)
    steps, planned_by = planned(config, rows.train, config.sequences_per_minibatch)
    return Lesson(
        name="SFT",
        engine=engine,
        feed=rows.train,
        items_per_step=config.sequences_per_minibatch,
        steps=steps,
        planned_by=planned_by,
        eval_every=config.eval_every,
        learn=lambda examples: train_on(model, examples, engine, budget),
        measure=lambda: measure_heldout(model, rows.heldout, budget),
        write_down=asdict,
        save=lambda folder, _: save_policy(trunk, adapter, tokenizer, folder),
        facts=lambda reached: {
            "train_rows": rows.train.count,
            "heldout": {"rows": len(rows.heldout), "before": reached.before, "after": reached.heldout},
        },
        headline=["loss"],
        memory_knobs=training_knobs(config),
        device=device,
    )


def train_on(model: CausalPolicy, examples: Sequence[Example], engine: LocalEngine, budget: int) -> dict[str, float]:
    """One optimiser step on a minibatch."""
    sums = algo.Sums()
    count = sum(sum(example.taught[1:]) for example in examples)
    for loss, tokens in loss_parts(model, examples, budget):
        engine.backward(loss / count)
        sums.add("train/loss", loss.detach(), tokens)
    sums = of_all(sums)
    check_losses(sums, engine)
    return {**sums.means(), "train/tokens": count, "train/grad_norm": engine.step()}


@torch.no_grad()
def measure_heldout(model: CausalPolicy, examples: Sequence[Example], budget: int) -> dict[str, float]:
    """Loss a token in nats on rows that were not trained on; empty where there are none."""
    sums = algo.Sums()
    for loss, tokens in loss_parts(model, examples, budget):
        sums.add("heldout/loss", loss, tokens)
    return dict(of_all(sums).means())


def loss_parts(model: CausalPolicy, examples: Sequence[Example], budget: int) -> Iterator[tuple[Tensor, int]]:
    """-sum log pi over the taught tokens, and their number, a micro-batch of this process's share at a time.

    Both are 0 where the process only goes along with the others. A sequence's first token has nothing before it and is
    never counted.
    """
    if not examples:
        return
    for rows, weight in world().deal(torch.tensor([len(example.ids) for example in examples]), budget):
        part = [examples[row] for row in rows.tolist()]
        tokens = whole_texts([example.ids for example in part], [1] * len(part)).to(model.device)
        taught = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(example.taught[1:]) for example in part], batch_first=True
        ).to(model.device)
        yield -weight * algo.masked_sum(model.logprobs(tokens), taught), int(weight * taught.sum())
