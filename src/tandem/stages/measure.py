"""What a step's rollouts say about the run, in the field's names."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from tandem import algo
from tandem.config import AdvantageSection, KlSection
from tandem.stages.joint import bootstrapped_values, rewards_at_tokens, value_is_baseline
from tandem.types import Batch, Scores, Tokens, Trajectories

POSITIONS = 4
REPEATED_TOKENS = 4


def measure(
    trajectories: Trajectories, batch: Batch, scores: Scores, settings: AdvantageSection, kl: KlSection
) -> dict[str, float]:
    """Means over all sequences or tokens of the step. `scores` are the reward's own, before any shaping."""
    mask = trajectories.mask
    log_ratios = algo.kl_estimate(trajectories.logprobs, trajectories.reference_logprobs)
    of_sequences = log_ratios.masked_fill(~mask, 0.0).sum(1)
    kl_a_sequence = of_sequences.mean().item()
    repeated, runs = algo.repeated_ngrams(trajectories.tokens.response_ids, mask, REPEATED_TOKENS)
    paid = rewards_at_tokens(trajectories, settings, kl=None).sum(1).mean().item()
    mismatch = (trajectories.behaviour_logprobs - trajectories.logprobs).abs()
    compared = mask & trajectories.recomputed[:, None]
    return {
        "objective/kl": kl_a_sequence,
        "objective/kl_standard_error": of_sequences.std(correction=0).item() / len(of_sequences) ** 0.5,
        "objective/kl_coefficient": kl.coefficient,
        "objective/score": scores.whole.mean().item(),
        "objective/score_std": scores.whole.std(correction=0).item(),
        **spread_within_prompts(scores.whole, trajectories.tokens),
        "objective/shaped_score": paid,
        "objective/rlhf_reward": paid - kl.coefficient * kl_a_sequence,
        **{f"objective/score/{name}": mean for name, mean in means_of_parts(scores).items()},
        "policy/entropy": -algo.masked_mean(trajectories.logprobs, mask).item(),
        **measure_critic(trajectories, batch, settings, kl),
        "advantage/std": (batch.advantages[mask]).std(unbiased=False).item(),
        "rollout/length": mask.sum(1).float().mean().item(),
        "rollout/repetition": repeated / runs if runs else 0.0,
        "rollout/reference_logprob": algo.masked_mean(trajectories.reference_logprobs, mask).item(),
        "rollout/eos_rate": trajectories.ended.float().mean().item(),
        "rollout/logprob_mismatch": algo.masked_mean(mismatch, compared).item(),
        "rollout/logprob_mismatch_max": mismatch[compared].max().item(),
        "rollout/importance_weight": algo.masked_mean(batch.weights, mask).item(),
    }


def means_of_parts(scores: Scores) -> dict[str, float]:
    """The mean of each term over the samples that it scored; a term that scored none has no mean."""
    scored = {name: part[~part.isnan()] for name, part in scores.parts.items()}
    return {name: part.mean().item() for name, part in scored.items() if part.numel()}


def spread_within_prompts(scores: Tensor, tokens: Tokens) -> dict[str, float]:
    """The standard deviation of scores [B] around the mean of their prompt, over all prompts with several responses.

    Nothing where every prompt has one response only.
    """
    lengths = tokens.prompt_lengths.tolist()
    prompts = tokens.ids[:, : max(lengths)].tolist()
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, (ids, length) in enumerate(zip(prompts, lengths, strict=True)):
        groups[tuple(ids[:length])].append(row)
    gaps = [scores[rows] - scores[rows].mean() for rows in groups.values() if len(rows) > 1]
    return {"objective/score_std_within_prompts": torch.cat(gaps).square().mean().sqrt().item()} if gaps else {}


def measure_critic(
    trajectories: Trajectories, batch: Batch, settings: AdvantageSection, kl: KlSection
) -> dict[str, float]:
    """How good the value model is on these rollouts, held against what was earned."""
    values, outcomes, known = batch.values, batch.outcomes, batch.known
    by_position = algo.explained_variance_by_position(values, outcomes, known, POSITIONS)
    credit = algo.credit_by_position(batch.advantages, values, outcomes, known, POSITIONS)
    groups = algo.calibration(values, outcomes, known)
    certificate = algo.optimality_certificate(
        rewards_at_tokens(trajectories, settings, kl=None),
        trajectories.logprobs - trajectories.reference_logprobs,
        values,
        bootstrapped_values(trajectories, settings),
        trajectories.mask,
        kl_coefficient=kl.coefficient,
        gamma=settings.gamma,
    )
    return {
        "objective/certificate": certificate,
        "value/explained_variance": algo.explained_variance(values, outcomes, known),
        **{f"value/explained_variance_by_position/{n}": ev for n, ev in enumerate(by_position, start=1)},
        "value/mean": algo.masked_mean(values, trajectories.mask).item(),
        "value/std": algo.masked_std(values, trajectories.mask).item(),
        "value/return_mean": algo.masked_mean(outcomes, known).item(),
        "value/return_std": algo.masked_std(outcomes, known).item(),
        **{f"advantage/credit_by_position/{n}": share for n, share in enumerate(credit, start=1)},
        "value/calibration_error": algo.calibration_error(groups),
        **{f"calibration/predicted_{n:02d}": group.predicted for n, group in enumerate(groups, start=1)},
        **{f"calibration/earned_{n:02d}": group.earned for n, group in enumerate(groups, start=1)},
        "advantage/from_value": float(value_is_baseline(values, outcomes, known, settings)),
    }
