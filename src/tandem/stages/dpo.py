"""Direct preference optimisation: the policy learns from preferences, with no reward model between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tandem import algo
from tandem.config import DpoConfig
from tandem.data.examples import Answered, Pair, as_written, read_pairs
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.loading import load_tokenizer, pick_device, pick_dtype
from tandem.models.saving import save_policy
from tandem.models.source import check_length, read_config
from tandem.models.trunk import Trunk
from tandem.models.unread import load_trunk
from tandem.run import Progress
from tandem.run.memory import training_knobs
from tandem.stages.finite import check_losses
from tandem.stages.from_data import Lesson, planned, run_from_data, trained_part
from tandem.stages.pairs import answer_tokens, own_parts
from tandem.stages.together import of_all
from tandem.types import Tokens
from tandem.world import world


def run_dpo(config: DpoConfig, progress: Progress, *, resume: bool = False) -> dict[str, Any]:
    """Train by the recipe, or go on with the run that its folder holds; save the policy and return the summary.

    Raises InputError for what cannot be used, RunError where the run cannot go on, Interrupted for SIGTERM.
    """
    return run_from_data("dpo", config, progress, resume, lambda: prepare(config, progress))


def prepare(config: DpoConfig, progress: Progress) -> Lesson[Pair]:
    """Load pairs and policy, and measure answers under the reference, which is the policy as it starts: all of them
    beforehand or, where pairs are streamed, those of each minibatch in its turn, by a policy that stays as it is."""
    device, trust = pick_device(config.compute.device), config.compute.trust_remote_code
    tokenizer = load_tokenizer(config.model, "model", trust)
    rows = read_pairs(config.data, tokenizer, config.run.seed, as_written)
    for line in rows.notes:
        progress.say(line)
    check_length(read_config(config.model, "model", trust), rows.longest, "model")
    dtype, budget = pick_dtype(config.compute.precision, device), config.compute.tokens_per_microbatch
    with progress.console.status("loading the model"):
        trunk = load_trunk(config.model, "model", dtype, device, trust, progress.say)
        still = frozen_reference(config, trunk, dtype, device, progress) if config.data.streaming else None
    adapter, parameters = trained_part(trunk, config.adapters)
    policy = CausalPolicy(trunk, FULL_DISTRIBUTION, adapter)
    known = rows.heldout if still else [*rows.train.sample, *rows.heldout]
    with progress.console.status("log-probabilities of the reference"):
        reference = reference_logprobs(still or policy, answers_of(known), budget)
    engine = LocalEngine([ParameterGroup(parameters, config.optimizer.lr)], config.optimizer, "policy")
    learner = DpoLearner(policy, reference, engine, config)

    def learn(pairs: Sequence[Pair]) -> dict[str, float]:
        if still is None:
            return train_on(learner, pairs)
        return train_on(replace(learner, reference=reference_logprobs(still, answers_of(pairs), budget)), pairs)

    steps, planned_by = planned(config, rows.train, config.pairs_per_minibatch)
    return Lesson(
        name="DPO",
        engine=engine,
        feed=rows.train,
        items_per_step=config.pairs_per_minibatch,
        steps=steps,
        planned_by=planned_by,
        eval_every=config.eval_every,
        learn=learn,
        measure=lambda: measure_heldout(learner, rows.heldout),
        write_down=asdict,
        save=lambda folder, _: save_policy(trunk, adapter, tokenizer, folder),
        facts=lambda reached: {
            "train_pairs": rows.train.count,
            "heldout_pairs": len(rows.heldout),
            "truncated_pairs": rows.counts["truncated"],
            "heldout": {"before": reached.before, "after": reached.heldout},
        },
        headline=["loss", "accuracy"],
        memory_knobs=training_knobs(config),
        device=device,
    )


def frozen_reference(
    config: DpoConfig, trunk: Trunk, dtype: torch.dtype, device: torch.device, progress: Progress
) -> CausalPolicy:
    """The policy as it starts, beside the one that learns: the trunk below its adapter, or a model of its own."""
    if config.adapters is not None:
        return CausalPolicy(trunk, FULL_DISTRIBUTION, None)
    own = load_trunk(config.model, "model", dtype, device, config.compute.trust_remote_code, progress.say)
    own.model.requires_grad_(False)
    return CausalPolicy(own, FULL_DISTRIBUTION, None)


def answers_of(pairs: Iterable[Pair]) -> list[Answered]:
    return [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]


class Policy(Protocol):
    def prepare(self, tokens: Tokens, tokens_per_microbatch: int) -> Tokens:
        """The tokens on the model's device."""
        ...

    def logprobs(self, tokens: Tokens) -> Tensor:
        """[B, T], zero where masked."""
        ...


@dataclass(frozen=True)
class DpoLearner:
    """A policy, what each answer's log-probability is under the reference, in nats, and how the policy learns."""

    policy: Policy
    reference: Mapping[Answered, float]
    engine: LocalEngine
    settings: DpoConfig


def answer_logprobs(policy: Policy, answers: Sequence[Answered], budget: int) -> Tensor:
    """log pi(y|x) of whole answers [n], in nats."""
    return policy.logprobs(policy.prepare(answer_tokens(answers), budget)).sum(1)


@torch.no_grad()
def reference_logprobs(policy: Policy, answers: Iterable[Answered], budget: int) -> dict[Answered, float]:
    """log pi_ref(y|x) of each distinct answer, before anything has learnt; they are constants from here on."""
    distinct = list(dict.fromkeys(answers))
    found: dict[Answered, float] = {}
    for rows, _ in world().deal(torch.tensor([len(answer.ids) for answer in distinct]), budget):
        part = [distinct[row] for row in rows.tolist()]
        found |= dict(zip(part, answer_logprobs(policy, part, budget).tolist(), strict=True))
    return {answer: logprob for part in world().gather(found) for answer, logprob in part.items()}


def train_on(learner: DpoLearner, pairs: Sequence[Pair]) -> dict[str, float]:
    """One optimiser step on a minibatch of pairs."""
    sums = algo.Sums()
    for chosen, rejected, weight in ratio_parts(learner, pairs):
        loss = loss_sum(chosen, rejected, learner.settings)
        learner.engine.backward(weight * loss / len(pairs))
        if weight:
            add_metrics(sums, "train", loss, chosen, rejected, learner.settings)
    sums = of_all(sums)
    check_losses(sums, learner.engine)
    return {**sums.means(), "train/grad_norm": learner.engine.step()}


@torch.no_grad()
def measure_heldout(learner: DpoLearner, pairs: Sequence[Pair]) -> dict[str, float]:
    """The same metrics on pairs that were not trained on; empty where there are none."""
    sums = algo.Sums()
    for chosen, rejected, weight in ratio_parts(learner, pairs):
        loss = loss_sum(chosen, rejected, learner.settings)
        if weight:
            add_metrics(sums, "heldout", loss, chosen, rejected, learner.settings)
    return dict(of_all(sums).means())


def ratio_parts(learner: DpoLearner, pairs: Sequence[Pair]) -> Iterator[tuple[Tensor, Tensor, float]]:
    """log pi/pi_ref of the chosen and the rejected answers [n] each, a micro-batch of this process's share at a time,
    with its weight."""
    budget = learner.settings.compute.tokens_per_microbatch
    for part, weight in own_parts(pairs, budget):
        logprobs = answer_logprobs(learner.policy, part.answers, budget)
        ratios = logprobs - logprobs.new_tensor([learner.reference[answer] for answer in part.answers])
        yield ratios[part.chosen.to(ratios.device)], ratios[part.rejected.to(ratios.device)], weight


def loss_sum(chosen: Tensor, rejected: Tensor, settings: DpoConfig) -> Tensor:
    """The loss summed over pairs, from log-ratios [n] each."""
    if settings.loss == "ipo":
        return algo.ipo_loss(chosen, rejected, beta=settings.beta)
    return algo.dpo_loss(chosen, rejected, beta=settings.beta, label_smoothing=settings.label_smoothing)


def add_metrics(
    sums: algo.Sums, where: str, loss: Tensor, chosen: Tensor, rejected: Tensor, settings: DpoConfig
) -> None:
    """Loss, accuracy, and the rewards that the policy stands for: beta log pi/pi_ref, in units of the reward."""
    pairs = len(chosen)
    chosen, rejected = (settings.beta * ratios.detach() for ratios in (chosen, rejected))
    sums.add(f"{where}/loss", loss.detach(), pairs)
    sums.add(f"{where}/accuracy", algo.right_order(chosen, rejected), pairs)
    sums.add(f"{where}/margin", (chosen - rejected).sum(), pairs)
    sums.add(f"{where}/reward_chosen", chosen.sum(), pairs)
    sums.add(f"{where}/reward_rejected", rejected.sum(), pairs)
