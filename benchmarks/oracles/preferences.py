"""DPO held against its closed form: from preferences drawn by Bradley and Terry's model of R it must reach pi*.

With beta the coefficient of the KL, the policy whose implied rewards beta log pi/pi_ref make the preferences likeliest
is pi_ref exp(R / beta) / Z. With n pairs the fit has the error of a maximum likelihood estimate, which falls as n
grows.
"""

from __future__ import annotations

import torch

from oracles.reward_then_policy import draw_pairs
from oracles.tabular import PROMPT, TablePolicy, Task, all_rollouts, divergence, optimum
from tandem.config import DpoConfig
from tandem.data.examples import Answered, Pair
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.stages.dpo import DpoLearner, reference_logprobs, train_on

PAIRS_PER_STEP = 2048


def responses_by_end(task: Task) -> dict[int, Answered]:
    """Every response by the final state that it leads to."""
    found = {}
    for rollout in all_rollouts(task):
        state = 0
        for token in rollout.ids:
            state = int(task.following[state, token])
        found[state] = Answered((*PROMPT.ids, *rollout.ids), len(PROMPT.ids))
    return found


def train_dpo(task: Task, pairs: int, seed: int, steps: int = 600, **settings) -> float:
    """KL(pi || pi*) in nats after DPO on so many pairs."""
    by_end = responses_by_end(task)
    chosen, rejected = draw_pairs(task, pairs, seed)
    ends = zip(chosen.tolist(), rejected.tolist(), strict=True)
    drawn = [Pair("", by_end[won], by_end[lost]) for won, lost in ends if won != lost]
    config = DpoConfig.model_validate(
        {
            "model": "table",
            "beta": task.beta,
            "data": {"train": "none"},
            "optimizer": {"lr": 0.05, "max_grad_norm": 1e9, "warmup_fraction": 0.0},
            "compute": {"tokens_per_microbatch": 10**9},
            **settings,
        }
    )
    policy = TablePolicy(task.reference, task)
    engine = LocalEngine([ParameterGroup(list(policy.parameters()), config.optimizer.lr)], config.optimizer)
    learner = DpoLearner(policy, reference_logprobs(policy, by_end.values(), 10**9), engine, config)
    random = torch.Generator().manual_seed(seed)
    for step in range(steps):
        engine.set_progress(step, steps)
        rows = torch.randint(0, len(drawn), (min(PAIRS_PER_STEP, len(drawn)),), generator=random)
        train_on(learner, [drawn[row] for row in rows.tolist()])
    return float(divergence(policy.table().detach(), optimum(task)[1], task))
