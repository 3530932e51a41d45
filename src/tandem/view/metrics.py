"""What every metric is, what a healthy one looks like, and in what unit it is counted: one table for all pages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Description:
    """`healthy` is empty where no value is better than another; `unit` is empty for bare numbers."""

    what: str
    healthy: str
    unit: str


_D = Description
_QUARTER = re.compile(r"value/explained_variance_by_position/(\d+)")
_CREDIT = re.compile(r"advantage/credit_by_position/(\d+)")
_DECILE = re.compile(r"calibration/(predicted|earned)_(\d+)")
_TERM, _PHASE, _HELDOUT, _RULE = "objective/score/", "time/", "heldout/", "health/"

JOINT: Mapping[str, Description] = {
    "objective/score": _D(
        "Mean of what the rewards say of the step's responses, before any shaping.",
        "Rises and levels off. A jump while held-out or measured-only rewards stay behind is over-optimisation.",
        "reward",
    ),
    "objective/score_std": _D(
        "Spread of the scores over the step's responses.",
        "Stays well above 0: where all responses earn the same there is nothing to learn from.",
        "reward",
    ),
    "objective/score_std_within_prompts": _D(
        "Spread of the scores around their prompt's mean, where prompts have several responses.",
        "Stays well above 0: it is what tells one response to a prompt from another.",
        "reward",
    ),
    "objective/shaped_score": _D("The score after the score section: what trains.", "Rises with the score.", "reward"),
    "objective/rlhf_reward": _D(
        "Shaped score less the KL coefficient times the KL: the objective itself.",
        "Rises; where it falls while the score rises, the KL costs more than the score gains.",
        "reward",
    ),
    "objective/kl": _D(
        "Mean over responses of the summed log-ratio to the reference (k1).",
        "Starts at 0 and grows slowly. Negative values beyond noise mean that log-probabilities do not match.",
        "nats a sequence",
    ),
    "objective/kl_standard_error": _D("Standard error of that mean.", "Small beside the KL.", "nats a sequence"),
    "objective/kl_coefficient": _D(
        "Reward paid per nat of KL (beta).", "Constant, or moving slowly where kl.target adapts it.", ""
    ),
    "objective/certificate": _D(
        "Root mean square over tokens of r - beta log(pi/pi_ref) + V(s') - V(s).",
        "Falls: it is zero at the optimum, without that being known.",
        "reward",
    ),
    "policy/loss": _D("Surrogate loss a token.", "", "reward"),
    "policy/clipfrac": _D(
        "Share of tokens whose gradient the clip stopped.",
        "Below about 0.2; more means that the steps are too large or the epochs too many.",
        "share",
    ),
    "policy/approx_kl": _D(
        "k3 estimate of the KL between the policy before and after the step's updates.",
        "Around 0.0001 to 0.02. Growing without end means instability.",
        "nats a token",
    ),
    "policy/approx_kl_at_stop": _D("That KL where it ended the step's policy updates early.", "", "nats a token"),
    "policy/stopped_early": _D(
        "1 where policy.max_approx_kl left updates out.", "Seldom 1; often means too large steps.", ""
    ),
    "policy/ratio_mean": _D("Mean ratio of new to old probability.", "Close to 1.", ""),
    "policy/ratio_max": _D(
        "Largest ratio of new to old probability.",
        "Single digits; large ones with a negative advantage are what dual clip is for.",
        "",
    ),
    "policy/entropy": _D(
        "Mean of -log pi over the sampled tokens.",
        "Falls slowly. A fall towards 0 is collapse: all responses become one.",
        "nats a token",
    ),
    "policy/exact_entropy": _D("Entropy of the whole next-token distributions.", "As the entropy.", "nats a token"),
    "policy/kl_loss": _D("The KL estimate, where it is a term of the loss.", "As the KL.", "nats a token"),
    "policy/grad_norm": _D(
        "Norm of the policy's gradient before clipping.",
        "Steady. Spikes of ten times the usual come before trouble.",
        "",
    ),
    "policy/lr": _D("The policy's learning rate.", "", ""),
    "policy/updates": _D("Optimiser steps of the policy in the step.", "", ""),
    "policy/value_gradient_cosine": _D(
        "Cosine between the two losses' gradients on shared parameters.",
        "Above 0 or near it; clearly below, the two pull apart.",
        "",
    ),
    "policy/value_gradient_ratio": _D(
        "How many times the policy's gradient on shared parameters the value's is.", "Near 1 or below.", ""
    ),
    "value/loss": _D(
        "Half the squared error a token (cross-entropy for a categorical head).", "Falls, then levels off.", ""
    ),
    "value/clipfrac": _D("Share of tokens whose value the value clip held.", "Small.", "share"),
    "value/explained_variance": _D(
        "1 - Var(outcome - value) / Var(outcome) over all tokens, outcomes by Monte Carlo.",
        "Above 0.3 and rising. At 0 or below, a constant would be the better baseline.",
        "",
    ),
    "value/mean": _D("Mean value over tokens.", "Follows the score.", "reward"),
    "value/std": _D("Spread of the values over tokens.", "Not above that of the outcomes.", "reward"),
    "value/return_mean": _D("Mean outcome over tokens.", "Near the mean value.", "reward"),
    "value/return_std": _D("Spread of the outcomes over tokens.", "Above 0.", "reward"),
    "value/calibration_error": _D(
        "Mean gap between value and outcome over deciles of the value.",
        "Small beside the spread of the scores.",
        "reward",
    ),
    "value/outside_range": _D("Share of targets that a categorical head cannot say.", "0.", "share"),
    "value/grad_norm": _D("Norm of the value model's gradient before clipping.", "Steady.", ""),
    "value/lr": _D("The value model's learning rate.", "", ""),
    "value/updates": _D("Optimiser steps of the value model in the step.", "", ""),
    "value/epochs": _D("Passes of the value model over the step's rollouts.", "", ""),
    "value/warming_up": _D("1 while only the value model learns.", "", ""),
    "advantage/std": _D(
        "Spread of the advantages as the policy gets them.", "Steady; near 0 there is nothing to learn.", "reward"
    ),
    "advantage/from_value": _D("1 where the value model is the advantages' baseline.", "", ""),
    "rollout/length": _D(
        "Mean tokens a response.",
        "Changes slowly. Growing to the limit is often the reward model's love of length.",
        "tokens",
    ),
    "rollout/eos_rate": _D("Share of responses that ended by themselves.", "Does not fall to 0.", "share"),
    "rollout/repetition": _D(
        "Share of four-token runs that stood earlier in the same response.",
        "Low and steady; rising, the policy has found that repeating itself pays.",
        "share",
    ),
    "rollout/reference_logprob": _D(
        "Mean log-probability of the sampled tokens under the reference: how fluent it finds them.",
        "Falls slowly at most.",
        "nats a token",
    ),
    "rollout/logprob_mismatch": _D(
        "Mean gap between the generator's log-probabilities and the training forward's.",
        "Below 0.01; 0.00001 in float32.",
        "nats a token",
    ),
    "rollout/logprob_mismatch_max": _D(
        "Largest gap between the generator's log-probabilities and the training forward's.", "Small.", "nats a token"
    ),
    "rollout/staleness": _D(
        "Steps between the weights that sampled and those that train.", "At most rollout.staleness.", "steps"
    ),
    "rollout/importance_weight": _D("Mean weight that corrects for that gap.", "Close to 1.", ""),
    "reward/skipped": _D("Samples left out of the step for having no score.", "0.", "samples"),
    "fault/skipped": _D("1 where the step was skipped for a number that is not finite.", "0.", ""),
    "fault/skipped_total": _D("Steps skipped so far for numbers that are not finite.", "0, or no longer rising.", ""),
    "memory/process_gib": _D("Main memory in use after the step.", "Steady; rising without end is a leak.", "GiB"),
    "memory/device_gib": _D("What tensors hold on the GPU after the step.", "Steady.", "GiB"),
    "throughput/tokens_per_second": _D("Response tokens a second of the whole step.", "Steady.", "tokens a second"),
}

FROM_DATA: Mapping[str, Description] = {
    "loss": _D("The loss of the stage.", "Falls, then levels off.", ""),
    "every_token_loss": _D("The pair loss at every token of the answers.", "Falls with the loss.", ""),
    "accuracy": _D("Share of pairs in the order of the preference.", "Rises above 0.5.", "share"),
    "margin": _D("Mean difference between the chosen and the rejected answer.", "Rises, then levels off.", "reward"),
    "score": _D("Mean score of both answers.", "Stays in bounds.", "reward"),
    "reward_chosen": _D(
        "beta log pi/pi_ref of the chosen answers.",
        "Above the rejected ones'. Both far below 0: probability leaks to answers that nobody chose.",
        "reward",
    ),
    "reward_rejected": _D("beta log pi/pi_ref of the rejected answers.", "Below the chosen ones'.", "reward"),
    "accuracy_chosen_longer": _D("Accuracy on pairs whose longer answer is chosen.", "Like the other.", "share"),
    "accuracy_chosen_shorter": _D(
        "Accuracy on pairs whose shorter answer is chosen.",
        "Like the other: a model that is right on one side only has learnt length.",
        "share",
    ),
    "pairs_chosen_longer": _D("How many such pairs there are.", "", "pairs"),
    "pairs_chosen_shorter": _D("How many such pairs there are.", "", "pairs"),
    "calibration_error": _D(
        "Mean gap between how sure the scores are of their order and how often it is right.", "Small.", "share"
    ),
    "grad_norm": _D("Norm of the gradient before clipping.", "Steady.", ""),
    "lr": _D("The learning rate.", "", ""),
    "tokens": _D("Tokens that the step learnt from.", "", "tokens"),
}


def describe(name: str) -> Description | None:
    """What the metric of that name is; None for one that no stage writes."""
    if name in JOINT:
        return JOINT[name]
    if name.startswith(_TERM):
        term = name.removeprefix(_TERM)
        return _D(f"Mean of what the reward {term} alone says, before any weight.", "", "reward")
    if match := _QUARTER.fullmatch(name):
        quarter = f"Explained variance in quarter {match[1]} of the responses."
        return _D(quarter, "Higher in later quarters, where more of the response is known.", "")
    if match := _CREDIT.fullmatch(name):
        what = (
            f"Correlation of advantages with what was earned beyond the value, in quarter {match[1]} of the responses."
        )
        return _D(what, "Clearly above 0.", "")
    if match := _DECILE.fullmatch(name):
        what = "value" if match[1] == "predicted" else "outcome"
        return _D(f"Mean {what} in decile {int(match[2])} of the value.", "", "reward")
    if name.startswith(_RULE):
        return _D(f"1 while the rule {name.removeprefix(_RULE)} finds something wrong.", "Not there.", "")
    if name.startswith(_PHASE):
        return _D(f"Time of the {name.removeprefix(_PHASE)}.", "", "seconds")
    if name.startswith("train/"):
        return FROM_DATA.get(name.removeprefix("train/"))
    if name.startswith(_HELDOUT):
        inner = name.removeprefix(_HELDOUT)
        found = FROM_DATA.get(inner) or describe(inner)
        return found and _D(f"{found.what} On held-out data.", found.healthy, found.unit)
    return None
