"""A reward model fitted to preferences, then a policy trained under it: how far its errors are climbed.

Gold rewards are those of the tree. `n` pairs of responses are drawn and ordered by the Bradley-Terry model of the
gold reward; a table of rewards is fitted to them by the project's own preference loss. For every beta the optimum
under the fitted reward is known, pi_beta(y) proportional to pi_ref(y) exp(r_hat(y) / beta), and with it the exact
curve of gold reward against KL that any trainer can reach at best.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oracles.tabular import Task, divergence, occupancy, optimum, tree
from oracles.training import Setup, train
from tandem.algo import preference_loss

BETAS = [2.0 * 0.8**k for k in range(24)]


def final_states(task: Task) -> Tensor:
    return task.final.nonzero().squeeze(1)


def draw_pairs(task: Task, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Final states of chosen and rejected responses [n] each, drawn evenly among all responses."""
    random = torch.Generator().manual_seed(seed)
    ends = final_states(task)
    pairs = ends[torch.randint(0, len(ends), (count, 2), generator=random)]
    first_wins = torch.sigmoid(task.reward[pairs[:, 0]] - task.reward[pairs[:, 1]])
    won = torch.rand(count, generator=random, dtype=torch.float64) < first_wins
    chosen, rejected = torch.where(won, pairs[:, 0], pairs[:, 1]), torch.where(won, pairs[:, 1], pairs[:, 0])
    return chosen, rejected


def fit_reward(task: Task, chosen: Tensor, rejected: Tensor, ridge: float = 0.05) -> Tensor:
    """Rewards [S] of final states that make the preferences likeliest, centred on their mean.

    The ridge keeps a response that has only ever won from an infinite reward.
    """
    fitted = torch.zeros(task.states, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([fitted], lr=1.0, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = preference_loss(fitted[chosen], fitted[rejected]) + ridge / 2 * fitted.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = fitted.detach()
    return torch.where(task.final, found - found[task.final].mean(), 0.0)


def fit_error(task: Task, fitted: Tensor) -> float:
    """RMSE of the fitted rewards over all responses, both centred."""
    ends = final_states(task)
    gold = task.reward[ends] - task.reward[ends].mean()
    return float((fitted[ends] - gold).square().mean().sqrt())


@dataclass(frozen=True)
class Point:
    """A policy under the fitted reward: KL to the reference in nats, gold and fitted reward on average."""

    beta: float
    kl: float
    gold: float
    fitted: float


def point(task: Task, fitted: Tensor, policy: Tensor, beta: float) -> Point:
    reached = occupancy(policy, task)
    gold, climbed = (float((reached * rewards)[task.final].sum()) for rewards in (task.reward, fitted))
    return Point(beta, float(divergence(policy, task.reference, task)), gold, climbed)


def exact_curve(task: Task, fitted: Tensor) -> list[Point]:
    """The optimum under the fitted reward at every beta, from a strong hold to a weak one."""
    found = []
    for beta in BETAS:
        _, policy = optimum(replace(task, reward=fitted, beta=beta))
        found.append(point(task, fitted, policy, beta))
    return found


def gold_on_curve(curve: list[Point], kl: float) -> float:
    """Gold reward of the exact curve at a KL, linear in sqrt(KL) between its points, and flat beyond its ends."""
    for left, right in itertools.pairwise(curve):
        if left.kl <= kl <= right.kl:
            share = (kl**0.5 - left.kl**0.5) / (right.kl**0.5 - left.kl**0.5)
            return left.gold + share * (right.gold - left.gold)
    return curve[0].gold if kl < curve[0].kl else curve[-1].gold


def trained_point(task: Task, fitted: Tensor, beta: float, seed: int, steps: int = 300) -> Point:
    """Where joint training under the fitted reward ends."""
    found = train(replace(task, reward=fitted, beta=beta), Setup(episodes=1024, steps=steps), seed)
    return point(task, fitted, found.policy, beta)


@dataclass(frozen=True)
class Study:
    """For one number of pairs: the error of the fit, the exact curve, and trained points with their distance to it."""

    pairs: int
    error: float
    curve: list[Point]
    trained: list[Point]
    distances: list[float]

    @property
    def turns_over_by(self) -> float:
        """How much gold reward is lost from the curve's peak to its end."""
        return max(point.gold for point in self.curve) - self.curve[-1].gold


def study(pairs: int, seed: int, betas: list[float]) -> Study:
    task = tree(seed=0)
    fitted = fit_reward(task, *draw_pairs(task, pairs, seed))
    curve = exact_curve(task, fitted)
    trained = [trained_point(task, fitted, beta, seed) for beta in betas]
    distances = [abs(found.gold - gold_on_curve(curve, found.kl)) for found in trained]
    return Study(pairs, fit_error(task, fitted), curve, trained, distances)
