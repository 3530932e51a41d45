"""Supervised fine-tuning: raise the likelihood of the given answers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem import algo
from tandem.config import SftConfig
from tandem.data.examples import Example, endless_order, read_examples
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.loading import load_causal, load_tokenizer, pick_device, pick_dtype
from tandem.models.saving import save_policy
from tandem.models.source import check_length, read_config
from tandem.models.trunk import Trunk
from tandem.run import Progress, RunFolder
from tandem.run.folder import check_free
from tandem.run.interrupt import Interrupt
from tandem.run.machine import machine_record
from tandem.types import split_by_tokens, whole_texts


def run_sft(config: SftConfig, progress: Progress) -> dict[str, Any]:
    """Train by the recipe, save the model and return the run's summary.

    Raises InputError for what cannot be used.
    """
    started = time.monotonic()
    check_free(Path(config.run.directory))
    torch.manual_seed(config.run.seed)
    device = pick_device(config.compute.device)
    trust = config.compute.trust_remote_code
    tokenizer = load_tokenizer(config.model, "model", trust)
    rows = read_examples(config.data, tokenizer, config.run.seed)
    for line in rows.report():
        progress.say(line)
    longest = max(len(example.ids) for example in [*rows.train, *rows.heldout])
    check_length(read_config(config.model, "model", trust), longest, "model")
    with progress.console.status("loading the model"):
        trunk = Trunk(load_causal(config.model, "model", pick_dtype(config.compute.precision, device), device, trust))
    adapter = None if config.adapters is None else "policy"
    if config.adapters is not None:
        parameters = trunk.add_adapter("policy", config.adapters)
    else:
        parameters = list(trunk.model.requires_grad_(True).parameters())
    model = CausalPolicy(trunk, FULL_DISTRIBUTION, adapter)
    folder = RunFolder(Path(config.run.directory), config, config.run.trackers)
    budget = config.compute.tokens_per_microbatch
    steps = math.ceil(config.epochs * len(rows.train) / config.sequences_per_minibatch)
    engine = LocalEngine([ParameterGroup(parameters, config.optimizer.lr)], config.optimizer)
    order = endless_order([[example] for example in rows.train], torch.Generator().manual_seed(config.run.seed))
    before = after = measure_heldout(model, rows.heldout, budget)
    with Interrupt() as interrupt, progress.stage("SFT", steps) as shown:
        for step in range(1, steps + 1):
            examples = [next(order) for _ in range(config.sequences_per_minibatch)]
            engine.set_progress(step - 1, steps)
            metrics = {"train/lr": engine.lr, **train_on(model, examples, engine, budget)}
            last = step == steps or interrupt.requested
            if step % config.eval_every == 0 or last:
                after = measure_heldout(model, rows.heldout, budget)
                metrics |= after
            folder.log(step, metrics)
            shown.advance({"loss": metrics["train/loss"]})
            if last and step < steps:
                progress.warn(f"interrupted; the model is saved as it is after step {step}.")
                break
    with progress.console.status("saving the model"):
        save_policy(trunk, adapter, tokenizer, folder.model)
    summary = {
        "stage": "sft",
        "interrupted": interrupt.requested,
        "seed": config.run.seed,
        "steps": step,
        "train_rows": len(rows.train),
        "seconds": time.monotonic() - started,
        **machine_record(device),
        "heldout": {"rows": len(rows.heldout), "before": before, "after": after},
        "last_step": metrics,
    }
    folder.write_summary(summary)
    folder.close()
    return summary


def train_on(model: CausalPolicy, examples: Sequence[Example], engine: LocalEngine, budget: int) -> dict[str, float]:
    """One optimiser step on a minibatch."""
    sums = algo.Sums()
    count = sum(sum(example.taught[1:]) for example in examples)
    for loss, tokens in loss_parts(model, examples, budget):
        engine.backward(loss / count)
        sums.add("train/loss", loss.detach(), tokens)
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
