"""What must hold of a joint stage's models as they were loaded, before anything has learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.config import PpoConfig
from tandem.errors import RunError
from tandem.models.cards import probe_scores
from tandem.models.causal import CausalPolicy
from tandem.models.scoring import DecoderScorer
from tandem.stages.joint import in_parts, tokens_of
from tandem.stages.joint_setup import JointStage
from tandem.stages.scoring import try_rewards
from tandem.types import Rollout


@dataclass(frozen=True)
class StartGaps:
    """How far apart are what should be one and the same before the first step.

    `generator` and `reference`: the largest difference of a token's log-probability from the policy's, in nats, of the
    generator that sampled it and of the reference under the policy's sampling rule. `value`: the largest difference of
    a score on the reward model's probe texts, between the value model and what the reward model gave when it was saved;
    None where the value model does not start from a reward model that carries probes, or has a head of its own.
    """

    generator: float
    reference: float
    value: float | None


def check_start(stage: JointStage, config: PpoConfig) -> StartGaps:
    """Generator and reference must give the log-probabilities of the policy, and the reward must answer as it should.

    Raises InputError where the reward does not, and RunError where log-probabilities differ by more than 1e-4 nats a
    token in float32, or 0.1 on average in bfloat16.
    """
    prompts = sorted(stage.prompts.sample, key=lambda prompt: len(prompt.ids))
    chosen = [prompts[0], prompts[len(prompts) // 2], prompts[-1]]
    rollouts = stage.fresh_generator(config).generate(chosen)
    try_rewards(stage.reward, rollouts)
    policy, reference = stage.models.policy, stage.models.reference
    # What lower layers made of these texts while they were sampled is not to stand: it is looked at.
    policy.trunk.forget()
    same_rule = CausalPolicy(reference.trunk, policy.rule, reference.adapter)
    trained, anchored = logprobs_of([policy, same_rule], rollouts, config.compute.tokens_per_microbatch)
    sampled = torch.cat([torch.tensor(rollout.logprobs) for rollout in rollouts])
    exact = stage.placement.dtype == torch.float32
    return StartGaps(
        generator=gap_of(
            sampled,
            trained,
            exact,
            "the generator's log-probabilities are {} from those of the training forward (allowed {}); this model's "
            "decoding with a cache is not what its forward computes.",
        ),
        reference=gap_of(
            anchored,
            trained,
            exact,
            "before the first step the reference's log-probabilities are {} from the policy's (allowed {}), and the "
            "two must be one model then; was a file of policy.model changed while it was loaded?",
        ),
        value=value_gap(stage, config),
    )


@torch.no_grad()
def logprobs_of(policies: Sequence[CausalPolicy], rollouts: Sequence[Rollout], budget: int) -> list[Tensor]:
    """The log-probabilities of all response tokens, one after the other, under each policy."""
    tokens = policies[0].prepare(tokens_of(rollouts), budget)
    found = [in_parts(policy.logprobs, tokens, budget).cpu() for policy in policies]
    return [torch.cat([rows[row, : len(one.ids)] for row, one in enumerate(rollouts)]) for rows in found]


def gap_of(one: Tensor, other: Tensor, exact: bool, said: str) -> float:
    """The largest difference. Raises RunError where it is more than rounding makes: there `said` names it."""
    gaps = (one - other).abs()
    gap, tolerance = (float(gaps.max()), 1e-4) if exact else (float(gaps.mean()), 0.1)
    if not gap <= tolerance:
        raise RunError(said.format(f"{gap:.2g} nats a token", f"{tolerance:g}"))
    return float(gaps.max())


def value_gap(stage: JointStage, config: PpoConfig) -> float | None:
    """How far the value model's answers are from the reward model's that it starts from, on the latter's probes."""
    sources = [source.model for source in config.rewards if source.model is not None]
    card = stage.reward_models[sources[0]].card if sources else None
    if config.value.start != "reward" or config.value.histogram is not None or card is None or not card.probes:
        return None
    scorer = DecoderScorer(stage.models.value, config.compute.tokens_per_microbatch)
    expected = torch.tensor([probe.score for probe in card.probes])
    return float((probe_scores(scorer, card).cpu() - expected).abs().max())
