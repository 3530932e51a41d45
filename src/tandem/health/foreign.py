"""What other trainers call the metrics that rules read, and in which units.

Read from the trainers' own sources. A number of theirs that is not of the same kind is turned into it, or left out
where it cannot be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Row = Mapping[str, float]
Reading = str | Callable[[Row], float]


@dataclass(frozen=True)
class Trainer:
    """Metrics by our name: theirs, or how to make them of theirs (NaN where the row has not what it takes).

    `options` are its own names of the settings that remedies change.
    """

    name: str
    readings: Mapping[str, Reading]
    options: Mapping[str, str]

    def recognised(self, names: set[str]) -> int:
        """How many of these names are ones that it logs, and that are read."""
        return len(names & {reading for reading in self.readings.values() if isinstance(reading, str)})

    def translated(self, row: Row) -> dict[str, float]:
        """A row under our names."""
        found: dict[str, float] = {}
        for ours, reading in self.readings.items():
            value = row.get(reading, math.nan) if isinstance(reading, str) else reading(row)
            if not math.isnan(value) or (isinstance(reading, str) and reading in row):
                found[ours] = value
        return found


def of(row: Row, name: str) -> float:
    return row.get(name, math.nan)


def a_sequence(a_token: str, length: str) -> Callable[[Row], float]:
    """A mean a token as nats a sequence: times the mean length, near enough where lengths do not differ much."""
    return lambda row: of(row, a_token) * of(row, length)


def share_left(cut: str) -> Callable[[Row], float]:
    """The share that ended by itself, from the share that was cut."""
    return lambda row: 1.0 - of(row, cut)


def root(variance: str) -> Callable[[Row], float]:
    return lambda row: math.sqrt(max(0.0, of(row, variance)))


def size(signed: str) -> Callable[[Row], float]:
    """The size of a signed mean gap, which the mean of the gaps' sizes is never under."""
    return lambda row: abs(of(row, signed))


def first_there(*readings: Callable[[Row], float]) -> Callable[[Row], float]:
    return lambda row: next((value for read in readings if not math.isnan(value := read(row))), math.nan)


# trl/trainer/ppo_trainer.py: KL and entropy of the objective are nats a sequence, approxkl is half the squared
# log-ratio a token.
TRL_PPO = Trainer(
    "TRL (PPOTrainer)",
    {
        "objective/score": "objective/scores",
        "objective/kl": "objective/kl",
        "objective/rlhf_reward": "objective/rlhf_reward",
        "policy/entropy": "policy/entropy_avg",
        "policy/approx_kl": "policy/approxkl_avg",
        "policy/clipfrac": "policy/clipfrac_avg",
        "policy/ratio_mean": "val/ratio",
        "policy/loss": "loss/policy_avg",
        "policy/lr": "lr",
        "value/loss": "loss/value_avg",
        "value/clipfrac": "val/clipfrac_avg",
    },
    {
        "policy.lr": "learning_rate",
        "value.lr": "learning_rate (one for both)",
        "kl.coefficient": "kl_coef",
        "advantage.lambda_policy": "lam",
        "policy.max_approx_kl": "num_ppo_epochs",
        "score.missing_eos_penalty": "missing_eos_penalty",
        "rollout.max_new_tokens": "response_length",
    },
)

# The PPOTrainer of trl up to 0.11, which kept the names of lm-human-preferences.
TRL_CLASSIC = Trainer(
    "TRL up to 0.11 (PPOTrainer.step)",
    {
        "objective/score": "ppo/mean_scores",
        "objective/score_std": "ppo/std_scores",
        "objective/kl": "objective/kl",
        "objective/kl_coefficient": "objective/kl_coef",
        "policy/entropy": "ppo/policy/entropy",
        "policy/approx_kl": "ppo/policy/approxkl",
        "policy/clipfrac": "ppo/policy/clipfrac",
        "policy/loss": "ppo/loss/policy",
        "policy/lr": "ppo/learning_rate",
        "value/loss": "ppo/loss/value",
        "value/explained_variance": "ppo/val/var_explained",
        "value/mean": "ppo/val/mean",
        "value/std": root("ppo/val/var"),
        "value/return_mean": "ppo/returns/mean",
        "value/return_std": root("ppo/returns/var"),
        "value/clipfrac": "ppo/val/clipfrac",
        "rollout/length": "tokens/responses_len_mean",
    },
    {
        "policy.lr": "learning_rate",
        "value.lr": "learning_rate and vf_coef",
        "kl.coefficient": "init_kl_coef",
        "kl.target": "target",
        "advantage.lambda_policy": "lam",
        "policy.max_approx_kl": "target_kl with early_stopping",
    },
)

# trl/trainer/grpo_trainer.py: no value model; kl is k3 a token.
TRL_GRPO = Trainer(
    "TRL (GRPOTrainer)",
    {
        "objective/score": "reward",
        "objective/score_std": "reward_std",
        "objective/score_std_within_prompts": "reward_std",
        "objective/kl": a_sequence("kl", "completions/mean_length"),
        "policy/entropy": "entropy",
        "policy/clipfrac": "clip_ratio/region_mean",
        "policy/grad_norm": "grad_norm",
        "policy/lr": "learning_rate",
        "policy/loss": "loss",
        "rollout/length": "completions/mean_length",
        "rollout/eos_rate": share_left("completions/clipped_ratio"),
        "rollout/logprob_mismatch": "sampling/sampling_logp_difference/mean",
        "time/step": "step_time",
    },
    {
        "policy.lr": "learning_rate",
        "kl.coefficient": "beta",
        "rollout.responses_per_prompt": "num_generations",
        "rollout.max_new_tokens": "max_completion_length",
        "policy.importance_cap": "vllm_importance_sampling_cap",
        "rollout.temperature": "temperature",
    },
)

# openrlhf/trainer/ray/ppo_actor.py, ppo_critic.py, ppo_utils: kl is a token's mean, ppo_kl is k1 of the update,
# vllm_kl the signed mean gap between generator and trainer.
OPENRLHF = Trainer(
    "OpenRLHF",
    {
        "objective/score": "reward",
        "objective/kl": a_sequence("kl", "response_length"),
        "policy/loss": "policy_loss",
        "policy/lr": "actor_lr",
        "policy/approx_kl": "ppo_kl",
        "policy/clipfrac": "ppo_clip_ratio",
        "policy/entropy": "entropy_loss",
        "value/loss": "critic_loss",
        "value/mean": "values",
        "value/lr": "critic_lr",
        "rollout/length": "response_length",
        "rollout/eos_rate": share_left("response_clip_ratio"),
        "rollout/logprob_mismatch": size("vllm_kl"),
    },
    {
        "policy.lr": "--actor_learning_rate",
        "value.lr": "--critic_learning_rate",
        "kl.coefficient": "--init_kl_coef",
        "kl.target": "--kl_target",
        "advantage.lambda_policy": "--lambd",
        "value.warmup.steps": "--freezing_actor_steps",
        "policy.entropy_coefficient": "--entropy_loss_coef",
        "rollout.responses_per_prompt": "--n_samples_per_prompt",
        "rollout.max_new_tokens": "--generate_max_len",
        "policy.importance_cap": "--enable_vllm_is_correction",
    },
)

# verl/trainer/ppo/metric_utils.py, ray_trainer.py, workers: reward_kl_penalty and kl_loss are means a token, ppo_kl is
# k1 of the update; the gap of probabilities is never over the gap of their logarithms. Its explained variance is held
# against lambda returns, which are outcomes where algorithm.lam is 1, the default.
VERL = Trainer(
    "verl",
    {
        "objective/score": "critic/score/mean",
        "objective/kl": first_there(
            a_sequence("actor/reward_kl_penalty", "response_length/mean"),
            a_sequence("actor/kl_loss", "response_length/mean"),
        ),
        "objective/kl_coefficient": first_there(
            lambda row: of(row, "actor/reward_kl_penalty_coeff"), lambda row: of(row, "actor/kl_coef")
        ),
        "policy/entropy": "actor/entropy",
        "policy/loss": "actor/pg_loss",
        "policy/approx_kl": "actor/ppo_kl",
        "policy/clipfrac": "actor/pg_clipfrac",
        "policy/grad_norm": "actor/grad_norm",
        "policy/lr": "actor/lr",
        "value/loss": "critic/vf_loss",
        "value/explained_variance": "critic/vf_explained_var",
        "value/mean": "critic/values/mean",
        "value/return_mean": "critic/returns/mean",
        "value/clipfrac": "critic/vf_clipfrac",
        "value/grad_norm": "critic/grad_norm",
        "value/lr": "critic/lr",
        "rollout/length": "response_length/mean",
        "rollout/eos_rate": share_left("response_length/clip_ratio"),
        "rollout/logprob_mismatch": "training/rollout_probs_diff_mean",
        "throughput/tokens_per_second": "perf/throughput",
        "memory/device_gib": "perf/max_memory_allocated_gb",
        "time/step": "timing_s/step",
        "time/rollout": "timing_s/gen",
        "time/update": "timing_s/update_actor",
    },
    {
        "policy.lr": "actor_rollout_ref.actor.optim.lr",
        "value.lr": "critic.optim.lr",
        "kl.coefficient": "algorithm.kl_ctrl.kl_coef",
        "kl.target": "algorithm.kl_ctrl.target_kl",
        "advantage.lambda_policy": "algorithm.lam",
        "value.warmup.steps": "trainer.critic_warmup",
        "value.adaptive.max_epochs": "critic.ppo_epochs",
        "policy.entropy_coefficient": "actor_rollout_ref.actor.entropy_coeff",
        "rollout.responses_per_prompt": "actor_rollout_ref.rollout.n",
        "rollout.max_new_tokens": "data.max_response_length",
        "rollout.temperature": "actor_rollout_ref.rollout.temperature",
        "policy.importance_cap": "algorithm.rollout_correction",
    },
)

TRAINERS = (TRL_PPO, TRL_CLASSIC, TRL_GRPO, OPENRLHF, VERL)
