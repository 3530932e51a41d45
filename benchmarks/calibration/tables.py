"""Healthy and faulty joint runs of tables, through the project's own steps."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from calibration.cases import Table
from oracles.tabular import TablePolicy, Task, counter, sample_rollouts, score_rollouts, states_of, tree
from oracles.training import BUDGET, OracleModels, Setup, recipe, table_models
from tandem.config import PpoConfig, RewardSource
from tandem.run.clock import Clock
from tandem.stages.joint import in_parts
from tandem.stages.state import start_state
from tandem.stages.step import judge, learn
from tandem.types import Rollout, Scores, pad_tokens

STEPS = 300
STALE_STEPS = 8


def rows_of(table: Table, seed: int, steps: int, *, constant_rate: bool) -> tuple[list[dict[str, Any]], PpoConfig]:
    """The rows of metrics of the first `steps` of a run, and its recipe; a tree has rewards of its own a seed."""
    torch.set_num_threads(1)
    task = tree(seed=seed) if table.task == "tree" else counter()
    settings = {"policy.schedule": "constant", "value.schedule": "constant"} if constant_rate else {}
    setup = Setup(
        episodes=512,
        steps=STEPS,
        settings={**settings, **table.settings},
        value_start=table.value_start,
        anchor_moves=table.anchor_moves,
    )
    config = with_gold(recipe(task, setup)) if table.score == "hacked" else recipe(task, setup)
    models = table_models(task, setup, config, seed)
    state, rows, sampler = start_state(config), [], deepcopy(models.policy)
    for step in range(1, steps + 1):
        clock = Clock()
        if table.patch != "foreign" and (table.patch != "stale" or step % STALE_STEPS == 1):
            sampler.load_state_dict(models.policy.state_dict())
        with clock("rollout"):
            rollouts = sampled(table, models, sampler, setup.episodes)
        scores = SCORES[table.score](rollouts, task, step)
        with clock("update"):
            state, found = learn(models, config, state, judge(models, config, state, rollouts, scores))
        tokens = sum(len(rollout.ids) for rollout in rollouts)
        rows.append({"step": step} | found | clock.read(tokens))
    return rows, config


def sampled(table: Table, models: OracleModels, sampler: TablePolicy, episodes: int) -> list[Rollout]:
    """Responses with the log-probabilities that the generator says they had."""
    rollouts = sample_rollouts(sampler, episodes, models.random)
    if table.patch == "noisy":
        noise = torch.Generator().manual_seed(int(torch.randint(2**31, (1,), generator=models.random)))
        return [replace(one, logprobs=noised(one.logprobs, noise)) for one in rollouts]
    if table.patch == "foreign":
        tokens = pad_tokens([one.prompt.ids for one in rollouts], [one.ids for one in rollouts])
        with torch.no_grad():
            said = in_parts(models.policy.logprobs, models.policy.prepare(tokens, BUDGET), BUDGET)
        return [replace(one, logprobs=tuple(said[row, : len(one.ids)].tolist())) for row, one in enumerate(rollouts)]
    return rollouts


def noised(logprobs: tuple[float, ...], random: torch.Generator) -> tuple[float, ...]:
    """Log-probabilities of an arithmetic that is a tenth of a nat off."""
    return tuple((torch.tensor(logprobs) + 0.1 * torch.randn(len(logprobs), generator=random)).tolist())


def with_gold(config: PpoConfig) -> PpoConfig:
    """A recipe that measures a gold reward without paying it."""
    gold = RewardSource(function="none:gold", weight=0.0)
    return config.model_copy(update={"rewards": [*config.rewards, gold]})


def inflating(rollouts: list[Rollout], task: Task, step: int) -> Scores:
    worth = 1.05 ** (step - 1)
    return Scores(score_rollouts(rollouts, task).total * worth, {})


def hacked(rollouts: list[Rollout], task: Task, step: int) -> Scores:
    """A proxy that agrees with the gold reward on half of all states and pays for the opposite on the others."""
    del step
    tokens = pad_tokens([rollout.prompt.ids for rollout in rollouts], [rollout.ids for rollout in rollouts])
    ends = states_of(tokens, task).gather(1, tokens.response_lengths[:, None]).squeeze(1)
    gold = task.reward[ends]
    proxy = torch.where(gold > 0, 0.3 * gold, -gold)
    return Scores(proxy, {"gold": gold})


def by_length(sign: float) -> Callable[[list[Rollout], Task, int], Scores]:
    return lambda rollouts, _task, _step: Scores(
        torch.tensor([sign * len(one.ids) / 8 for one in rollouts]).double(), {}
    )


SCORES: dict[str, Callable[[list[Rollout], Task, int], Scores]] = {
    "task": lambda rollouts, task, _step: score_rollouts(rollouts, task),
    "constant": lambda rollouts, _task, _step: Scores(torch.ones(len(rollouts), dtype=torch.float64), {}),
    "inflating": inflating,
    "hacked": hacked,
    "short": by_length(-1.0),
    "long": by_length(1.0),
}
