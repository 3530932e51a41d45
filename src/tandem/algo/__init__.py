"""The mathematics of the joint stage: pure functions on tensors, nothing but torch behind them.

Per-token arguments are [B, T] over response tokens with a bool mask of the same shape. A loss returns the *sum*
over tokens; divide by the count over the whole minibatch, so that gradients know nothing of micro-batches.
"""

from tandem.algo.advantages import explained_variance, gae, token_rewards, whiten
from tandem.algo.kl import AdaptiveKl, kl_estimate
from tandem.algo.losses import (
    a2c_policy_loss,
    ppo_policy_loss,
    preference_loss,
    prefix_preference_loss,
    value_loss,
)
from tandem.algo.masked import Sums, masked_mean, masked_sum
from tandem.algo.projection import projected_logprobs
from tandem.algo.sampling import sample, token_logprobs, truncate

__all__ = [
    "AdaptiveKl",
    "Sums",
    "a2c_policy_loss",
    "explained_variance",
    "gae",
    "kl_estimate",
    "masked_mean",
    "masked_sum",
    "ppo_policy_loss",
    "preference_loss",
    "prefix_preference_loss",
    "projected_logprobs",
    "sample",
    "token_logprobs",
    "token_rewards",
    "truncate",
    "value_loss",
    "whiten",
]
