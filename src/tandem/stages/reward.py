"""A reward model from preferences: what people chose scores higher than what they rejected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tandem import algo
from tandem.config import RewardConfig
from tandem.data.examples import Pair, as_read, read_pairs
from tandem.data.feed import SplitRows
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.models.cards import RewardCard, make_probes, write_card
from tandem.models.loading import load_tokenizer, pick_device, pick_dtype
from tandem.models.saving import save_scalar
from tandem.models.scalar import ScalarModel, load_body
from tandem.models.scoring import DecoderScorer
from tandem.models.source import check_length, read_config
from tandem.run import Progress
from tandem.run.memory import training_knobs
from tandem.stages.finite import check_losses
from tandem.stages.from_data import Lesson, planned, run_from_data
from tandem.stages.pairs import own_parts
from tandem.stages.together import of_all
from tandem.world import world


def run_reward(config: RewardConfig, progress: Progress, *, resume: bool = False) -> dict[str, Any]:
    """Train by the recipe, or go on with the run that its folder holds; save the model with its held-out accuracy and
    return the summary.

    Raises InputError for what cannot be used, RunError where the run cannot go on, Interrupted for SIGTERM.
    """
    return run_from_data("reward", config, progress, resume, lambda: prepare(config, progress))


def prepare(config: RewardConfig, progress: Progress) -> Lesson[Pair]:
    """Load pairs and model; the pairs come in a new random order for each pass, those of a prompt side by side."""
    device = pick_device(config.compute.device)
    trust = config.compute.trust_remote_code
    tokenizer = load_tokenizer(config.model, "model", trust)
    rows = read_pairs(config.data, tokenizer, config.run.seed, as_read)
    for line in rows.notes:
        progress.say(line)
    check_length(read_config(config.model, "model", trust), rows.longest, "model")
    with progress.console.status("loading the model"):
        learner = build(config, device, progress)
    engine, budget = learner.engine(config), config.compute.tokens_per_microbatch
    steps, planned_by = planned(config, rows.train, config.pairs_per_minibatch)
    return Lesson(
        name="reward model",
        engine=engine,
        feed=rows.train,
        items_per_step=config.pairs_per_minibatch,
        steps=steps,
        planned_by=planned_by,
        eval_every=config.eval_every,
        learn=lambda pairs: train_on(learner, pairs, engine, config),
        measure=lambda: measure_heldout(learner, rows.heldout, budget),
        write_down=asdict,
        save=lambda folder, reached: save(learner, config, tokenizer, rows, reached.heldout, folder, progress),
        facts=lambda reached: {
            "train_pairs": rows.train.count,
            "heldout_accuracy": reached.heldout.get("heldout/accuracy"),
            "heldout_pairs": len(rows.heldout),
            "heldout": {"before": reached.before, "after": reached.heldout},
        },
        headline=["loss", "accuracy"],
        memory_knobs=training_knobs(config),
        device=device,
    )


@dataclass(frozen=True)
class RewardLearner:
    """A scalar model and the parameters of its body that train; its head always trains."""

    model: ScalarModel
    body: Sequence[nn.Parameter]

    def engine(self, config: RewardConfig) -> LocalEngine:
        head = list(self.model.head.parameters())
        lr = config.optimizer.lr
        groups = [ParameterGroup(self.body, lr), ParameterGroup(head, config.head_lr or lr)]
        return LocalEngine(groups, config.optimizer)


def build(config: RewardConfig, device: torch.device, progress: Progress) -> RewardLearner:
    """The model to start from with a scalar head: its own if it has one, else one that answers 0."""
    dtype, trust = pick_dtype(config.compute.precision, device), config.compute.trust_remote_code
    start = load_body(config.model, "model", dtype, device, trust, progress.say)
    start.head.requires_grad_(True)
    if config.adapters is None:
        return RewardLearner(start, list(start.trunk.decoder.requires_grad_(True).parameters()))
    body = start.trunk.add_adapter("reward", config.adapters)
    return RewardLearner(ScalarModel(start.trunk, start.head, adapter="reward"), body)


@dataclass(frozen=True)
class PairScores:
    """Scores of pairs: at the answers' ends [n], and after each of their tokens [n, T].

    After an answer's end its last score stands; `mask` [n, T] is true up to the longer answer's end. `margins` [n] say
    by how much the chosen answers are better, `longer_by` [n] by how many tokens they are longer.
    """

    margins: Tensor
    longer_by: Tensor
    chosen: Tensor
    rejected: Tensor
    chosen_by_token: Tensor
    rejected_by_token: Tensor
    mask: Tensor


def train_on(
    learner: RewardLearner, pairs: Sequence[Pair], engine: LocalEngine, config: RewardConfig
) -> dict[str, float]:
    """One optimiser step on a minibatch of pairs."""
    sums = algo.Sums()
    for scores, weight in scored_parts(learner.model, pairs, config.compute.tokens_per_microbatch):
        loss = total = algo.preference_loss(scores.chosen, scores.rejected, scores.margins)
        if config.centring_weight > 0:
            total = total + config.centring_weight * algo.centring_loss(scores.chosen, scores.rejected)
        if config.every_token_weight > 0:
            by_token = algo.prefix_preference_loss(scores.chosen_by_token, scores.rejected_by_token, scores.mask)
            total = total + config.every_token_weight * by_token
            sums.add("train/every_token_loss", weight * by_token.detach(), weight * len(scores.chosen))
        engine.backward(weight * total / len(pairs))
        if weight:
            sums.add("train/loss", loss.detach(), len(scores.chosen))
            sums.add("train/accuracy", algo.right_order(scores.chosen, scores.rejected), len(scores.chosen))
            sums.add("train/margin", (scores.chosen - scores.rejected).detach().sum(), len(scores.chosen))
    sums = of_all(sums)
    check_losses(sums, engine)
    return {**sums.means(), "train/grad_norm": engine.step()}


@torch.no_grad()
def measure_heldout(learner: RewardLearner, pairs: Sequence[Pair], budget: int) -> dict[str, float]:
    """Loss, accuracy, margin and score on pairs that were not trained on; accuracy by which answer is the longer one,
    and how far the scores' sureness is from their accuracy. A tie counts as half right."""
    if not pairs:
        return {}
    own = [scores for scores, weight in scored_parts(learner.model, pairs, budget) if weight]
    sums, parts = algo.Sums(), [scores for part in world().gather(own) for scores in part]
    for scores in parts:
        loss = algo.preference_loss(scores.chosen, scores.rejected, scores.margins)
        sums.add("heldout/loss", loss, len(scores.chosen))
    chosen, rejected, longer_by = (
        torch.cat([getattr(scores, name) for scores in parts]) for name in ("chosen", "rejected", "longer_by")
    )
    by_length = algo.accuracy_by_length(chosen, rejected, longer_by)
    return {
        **sums.means(),
        "heldout/accuracy": float(algo.right_order(chosen, rejected)) / len(chosen),
        "heldout/margin": float((chosen - rejected).mean()),
        "heldout/score": float((chosen + rejected).mean() / 2),
        "heldout/accuracy_chosen_longer": by_length.longer,
        "heldout/pairs_chosen_longer": by_length.longer_pairs,
        "heldout/accuracy_chosen_shorter": by_length.shorter,
        "heldout/pairs_chosen_shorter": by_length.shorter_pairs,
        "heldout/calibration_error": algo.preference_calibration_error(chosen, rejected),
    }


def length_of(heldout: Mapping[str, float]) -> algo.ByLength | None:
    """What held-out metrics say of length, or None where nothing was held out."""
    if not heldout:
        return None
    sides = ("longer", "shorter")
    found = [(heldout[f"heldout/accuracy_chosen_{s}"], int(heldout[f"heldout/pairs_chosen_{s}"])) for s in sides]
    return algo.ByLength(*found[0], *found[1])


def scored_parts(model: ScalarModel, pairs: Sequence[Pair], budget: int) -> Iterator[tuple[PairScores, float]]:
    """Scores of this process's share of the pairs, a micro-batch at a time, each with its weight."""
    for part, weight in own_parts(pairs, budget):
        tokens = part.tokens.to(model.trunk.device)
        after = model.values(tokens)[:, 1:]
        last = after.gather(1, tokens.response_lengths[:, None] - 1)
        after = torch.where(tokens.mask, after, last)
        chosen, rejected = part.chosen.to(after.device), part.rejected.to(after.device)
        scores = PairScores(
            margins=part.margins.to(after.device),
            longer_by=part.longer_by.to(after.device),
            chosen=last[chosen, 0],
            rejected=last[rejected, 0],
            chosen_by_token=after[chosen],
            rejected_by_token=after[rejected],
            mask=tokens.mask[chosen] | tokens.mask[rejected],
        )
        yield scores, weight


def save(
    learner: RewardLearner,
    config: RewardConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: SplitRows[Pair],
    heldout: Mapping[str, float],
    folder: Path,
    progress: Progress,
) -> None:
    """The model and its card, with what is known against it."""
    save_scalar(learner.model, tokenizer, folder)
    scorer = DecoderScorer(learner.model, config.compute.tokens_per_microbatch)
    probes = make_probes(scorer, [pair.chosen.ids for pair in (rows.heldout or rows.train.sample)[:4]])
    card = RewardCard(
        base=config.model,
        heldout_accuracy=heldout.get("heldout/accuracy"),
        heldout_pairs=len(rows.heldout),
        by_length=length_of(heldout),
        adapter=config.adapters,
        probes=probes,
    )
    if world().first:
        write_card(card, folder)
    for doubt in card.doubts():
        progress.warn(doubt)
