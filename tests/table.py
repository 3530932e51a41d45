"""A policy and a value model as tables over all prefixes, and the exact solution that they are held against.

Tokens 0..V-1, horizon T, no EOS: every sequence has exactly T tokens. The reward is paid at the last one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tandem.types import Prompt, Rollout, Scores, Tokens

PROMPT = Prompt(ids=(0,), text="", messages=None, row={})


@dataclass(frozen=True)
class Task:
    """reference: log pi_ref, a [V^t, V] table for each t; reward [V^T]."""

    reference: list[Tensor]
    reward: Tensor
    beta: float

    @property
    def vocabulary(self) -> int:
        return self.reference[0].shape[1]

    @property
    def horizon(self) -> int:
        return len(self.reference)


def random_task(seed: int, vocabulary: int = 4, horizon: int = 5, beta: float = 0.5) -> Task:
    random = torch.Generator().manual_seed(seed)
    tables = [
        torch.randn(vocabulary**t, vocabulary, generator=random, dtype=torch.float64).log_softmax(-1)
        for t in range(horizon)
    ]
    reward = torch.randn(vocabulary**horizon, generator=random, dtype=torch.float64)
    return Task(tables, reward, beta)


def optimum(task: Task) -> tuple[list[Tensor], list[Tensor]]:
    """V*, a [V^t] table for each t = 0..T, and log pi*, a [V^t, V] table for each t < T, by dynamic programming."""
    values = [task.reward]
    policies: list[Tensor] = []
    for table in reversed(task.reference):
        following = values[0].view(-1, task.vocabulary)
        here = task.beta * torch.logsumexp(table + following / task.beta, dim=-1)
        policies.insert(0, table + (following - here[:, None]) / task.beta)
        values.insert(0, here)
    return values, policies


def sequence_logprobs(tables: list[Tensor]) -> Tensor:
    """log pi(y) of all V^T sequences."""
    total = tables[0].flatten()
    for table in tables[1:]:
        total = (total[:, None] + table).flatten()
    return total


def objective(tables: list[Tensor], task: Task) -> Tensor:
    """J = E[R] - beta * KL(pi || pi_ref), exactly."""
    logprobs, reference = sequence_logprobs(tables), sequence_logprobs(task.reference)
    return (logprobs.exp() * (task.reward - task.beta * (logprobs - reference))).sum()


def divergence(tables: list[Tensor], other: list[Tensor]) -> Tensor:
    """KL(pi || other) over whole sequences."""
    logprobs = sequence_logprobs(tables)
    return (logprobs.exp() * (logprobs - sequence_logprobs(other))).sum()


def all_sequences(task: Task) -> Tensor:
    """[V^T, T] in the order of the tables."""
    grids = torch.meshgrid(*[torch.arange(task.vocabulary)] * task.horizon, indexing="ij")
    return torch.stack([grid.flatten() for grid in grids], dim=1)


def prefixes(ids: Tensor, vocabulary: int) -> Tensor:
    """[B, T] tokens -> [B, T + 1] the row of each state in its table."""
    rows = [torch.zeros(len(ids), dtype=torch.int64)]
    for t in range(ids.shape[1]):
        rows.append(rows[-1] * vocabulary + ids[:, t])
    return torch.stack(rows, dim=1)


class TablePolicy(nn.Module):
    def __init__(self, tables: list[Tensor]) -> None:
        super().__init__()
        self.logits = nn.ParameterList([nn.Parameter(table.clone()) for table in tables])

    def tables(self) -> list[Tensor]:
        return [logits.log_softmax(-1) for logits in self.logits]

    def prepare(self, tokens: Tokens, tokens_per_microbatch: int) -> Tokens:
        del tokens_per_microbatch
        return tokens

    def logprobs(self, tokens: Tokens) -> Tensor:
        ids = tokens.response_ids
        rows = prefixes(ids, self.logits[0].shape[1])
        return torch.stack([table[rows[:, t], ids[:, t]] for t, table in enumerate(self.tables())], dim=1)


class TableValue(nn.Module):
    def __init__(self, task: Task, start: float = 0.0) -> None:
        super().__init__()
        sizes = [task.vocabulary**t for t in range(task.horizon + 1)]
        self.values_by_step = nn.ParameterList(
            [nn.Parameter(torch.full((size,), start, dtype=torch.float64)) for size in sizes]
        )
        self.vocabulary = task.vocabulary

    def values(self, tokens: Tokens) -> Tensor:
        rows = prefixes(tokens.response_ids, self.vocabulary)
        return torch.stack([table[rows[:, t]] for t, table in enumerate(self.values_by_step)], dim=1)


def sample_rollouts(policy: TablePolicy, task: Task, count: int, random: torch.Generator) -> list[Rollout]:
    with torch.no_grad():
        tables = policy.tables()
        rows = torch.zeros(count, dtype=torch.int64)
        ids, logprobs = [], []
        for table in tables:
            token = torch.multinomial(table[rows].exp(), 1, generator=random).squeeze(1)
            ids.append(token)
            logprobs.append(table[rows, token])
            rows = rows * task.vocabulary + token
    return [
        Rollout(PROMPT, tuple(row), tuple(scores), "", True)
        for row, scores in zip(torch.stack(ids, 1).tolist(), torch.stack(logprobs, 1).tolist(), strict=True)
    ]


def score_rollouts(rollouts: list[Rollout], task: Task) -> Scores:
    ids = torch.tensor([rollout.ids for rollout in rollouts])
    return Scores(task.reward[prefixes(ids, task.vocabulary)[:, -1]], {})
