"""The mathematics of the joint stage and of evaluation: pure functions on tensors, nothing but torch behind them.

Per-token arguments are [B, T] over response tokens with a bool mask of the same shape. A loss returns the *sum*
over tokens; divide by the count over the whole minibatch, so that gradients know nothing of micro-batches.
"""

from tandem.algo.advantages import gae, length_adaptive_lambda, token_rewards, whiten
from tandem.algo.comparison import (
    ClusteredMean,
    Interval,
    best_of_n_kl_bound,
    clustered_mean,
    effective_comparisons,
    fit_logistic,
    length_controlled_win_rate,
    win_rate,
)
from tandem.algo.critic import (
    CalibrationGroup,
    calibration,
    calibration_error,
    correlation,
    credit_by_position,
    explained_variance,
    explained_variance_by_position,
    optimality_certificate,
)
from tandem.algo.diversity import distance_between, distinct_ngrams
from tandem.algo.histogram import Histogram, histogram_value_loss
from tandem.algo.kl import AdaptiveKl, KlEstimator, kl_estimate
from tandem.algo.logits import Passes, Upstream, put_slope, sums_over_rows
from tandem.algo.losses import (
    ClippedLoss,
    a2c_policy_loss,
    book_policy_loss,
    centring_loss,
    clipped_value_loss,
    dpo_loss,
    importance_weights,
    ipo_loss,
    ppo_policy_loss,
    preference_loss,
    prefix_preference_loss,
    probability_ratio,
    value_loss,
)
from tandem.algo.masked import Sums, masked_mean, masked_std, masked_sum
from tandem.algo.moments import RunningMoments
from tandem.algo.projection import projected_logprobs
from tandem.algo.ranking import ByLength, accuracy_by_length, preference_calibration_error, right_order
from tandem.algo.repetition import repeated_ngrams
from tandem.algo.sampling import sample, token_logprobs, truncate
from tandem.algo.schedule import AdaptiveEpochs

__all__ = [
    "AdaptiveEpochs",
    "AdaptiveKl",
    "ByLength",
    "CalibrationGroup",
    "ClippedLoss",
    "ClusteredMean",
    "Histogram",
    "Interval",
    "KlEstimator",
    "Passes",
    "RunningMoments",
    "Sums",
    "Upstream",
    "a2c_policy_loss",
    "accuracy_by_length",
    "best_of_n_kl_bound",
    "book_policy_loss",
    "calibration",
    "calibration_error",
    "centring_loss",
    "clipped_value_loss",
    "clustered_mean",
    "correlation",
    "credit_by_position",
    "distance_between",
    "distinct_ngrams",
    "dpo_loss",
    "effective_comparisons",
    "explained_variance",
    "explained_variance_by_position",
    "fit_logistic",
    "gae",
    "histogram_value_loss",
    "importance_weights",
    "ipo_loss",
    "kl_estimate",
    "length_adaptive_lambda",
    "length_controlled_win_rate",
    "masked_mean",
    "masked_std",
    "masked_sum",
    "optimality_certificate",
    "ppo_policy_loss",
    "preference_calibration_error",
    "preference_loss",
    "prefix_preference_loss",
    "probability_ratio",
    "projected_logprobs",
    "put_slope",
    "repeated_ngrams",
    "right_order",
    "sample",
    "sums_over_rows",
    "token_logprobs",
    "token_rewards",
    "truncate",
    "value_loss",
    "whiten",
    "win_rate",
]
