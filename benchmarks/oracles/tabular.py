"""Tasks small enough to solve exactly, and a policy and a value model that are tables over their states.

A task is a graph: `following[s, a]` is the state that token a leads to from state s, one token farther from the
start. The reward is paid on reaching a final state. For the objective J = E[R] - beta KL(pi || pi_ref) everything is
then known by dynamic programming.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tandem.types import Prompt, Rollout, Scores, Tokens, pad_tokens

PROMPT = Prompt(ids=(0,), text="", messages=None, row={})


@dataclass(frozen=True)
class Task:
    """following [S, V] int64; reference [S, V] log-probabilities; reward [S], paid on reaching a final state.

    final [S] bool; cut [S] bool: final by the length limit, not by the response's own end. State 0 is the start.
    """

    following: Tensor
    reference: Tensor
    reward: Tensor
    final: Tensor
    cut: Tensor
    beta: float

    @property
    def states(self) -> int:
        return len(self.following)

    @property
    def vocabulary(self) -> int:
        return self.following.shape[1]


def tree(seed: int, vocabulary: int = 4, horizon: int = 5, beta: float = 0.5) -> Task:
    """All sequences of exactly `horizon` tokens, each with a reward from N(0, 1); pi_ref = softmax of N(0, 1)."""
    random = torch.Generator().manual_seed(seed)
    sizes = [vocabulary**t for t in range(horizon + 1)]
    inner, leaves = sum(sizes[:-1]), sizes[-1]
    following = torch.zeros(inner + leaves, vocabulary, dtype=torch.int64)
    following[:inner] = 1 + torch.arange(inner * vocabulary).view(inner, vocabulary)
    following[inner:] = torch.arange(inner, inner + leaves)[:, None]
    reference = torch.randn(inner + leaves, vocabulary, generator=random, dtype=torch.float64).log_softmax(-1)
    reward = torch.zeros(inner + leaves, dtype=torch.float64)
    reward[inner:] = torch.randn(leaves, generator=random, dtype=torch.float64)
    final = torch.arange(inner + leaves) >= inner
    return Task(following, reference, reward, final, torch.zeros_like(final), beta)


def counter(horizon: int = 32, beta: float = 0.1) -> Task:
    """A counter c >= 0 that tokens raise, keep or lower, or EOS: 1 for an end at c mod 4 = 3, -1 for none in time."""
    width = horizon + 1
    end_good, end_bad, out_of_time = (horizon * width + n for n in range(3))
    following = torch.empty(horizon * width + 3, 4, dtype=torch.int64)
    for t in range(horizon):
        for c in range(width):
            moves = [min(max(c + change, 0), horizon) for change in (1, 0, -1)]
            onward = [(t + 1) * width + moved if t + 1 < horizon else out_of_time for moved in moves]
            following[t * width + c] = torch.tensor([*onward, end_good if c % 4 == 3 else end_bad])
    following[horizon * width :] = torch.arange(end_good, out_of_time + 1)[:, None]
    reference = torch.tensor([0.3, 0.35, 0.3, 0.05], dtype=torch.float64).log().expand(len(following), 4)
    reward = torch.zeros(len(following), dtype=torch.float64)
    reward[end_good], reward[out_of_time] = 1.0, -1.0
    numbers = torch.arange(len(following))
    return Task(following, reference, reward, numbers >= end_good, numbers == out_of_time, beta)


def optimum(task: Task) -> tuple[Tensor, Tensor]:
    """V* [S] and log pi* [S, V].

    V*(s) = beta log sum_a pi_ref(a|s) exp(V*(s, a) / beta), V*(final) = R;
    log pi*(a|s) = log pi_ref(a|s) + (V*(s, a) - V*(s)) / beta.
    """
    values = task.reward.clone()
    for states in layers(task):
        ahead = task.reference[states] + values[task.following[states]] / task.beta
        values[states] = task.beta * ahead.logsumexp(-1)
    policy = task.reference + (values[task.following] - values[:, None]) / task.beta
    return values, torch.where(task.final[:, None], task.reference, policy)


def value_of(policy: Tensor, task: Task) -> Tensor:
    """V [S] of a policy, log-probabilities [S, V], under the reward with the KL inside it; differentiable."""
    values = task.reward.clone()
    for states in layers(task):
        logprobs = policy[states]
        earned = values[task.following[states]] - task.beta * (logprobs - task.reference[states])
        values = values.index_put((states,), (logprobs.exp() * earned).sum(-1))
    return values


def objective(policy: Tensor, task: Task) -> Tensor:
    """J = E[R] - beta KL(pi || pi_ref), exactly."""
    return value_of(policy, task)[0]


def divergence(policy: Tensor, other: Tensor, task: Task) -> Tensor:
    """KL(pi || other) over whole responses, exactly."""
    reached = occupancy(policy, task)
    gap = (policy.exp() * (policy - other)).sum(-1)
    return (reached * gap)[~task.final].sum()


def occupancy(policy: Tensor, task: Task) -> Tensor:
    """[S] probability that a response passes through each state."""
    reached = torch.zeros(task.states, dtype=torch.float64)
    reached[0] = 1.0
    for states in reversed(layers(task)):
        onward = reached[states, None] * policy[states].exp()
        reached = reached.index_add(0, task.following[states].flatten(), onward.flatten())
    return reached


def layers(task: Task) -> list[Tensor]:
    """Inner states by their distance from the start, farthest first; each leads to later ones or to final ones."""
    here, found = torch.tensor([0]), []
    while len(here):
        found.append(here)
        onward = task.following[here].unique()
        here = onward[~task.final[onward]]
    return found[::-1]


def states_of(tokens: Tokens, task: Task) -> Tensor:
    """[B, T + 1] the state before each response token and after the last one; 0 beyond it.

    Prepared tokens carry them; the prompt is one token, so they are as wide as the ids.
    """
    if tokens.activations is not None:
        return tokens.activations[:, :, 0]
    states = [torch.zeros(len(tokens), dtype=torch.int64)]
    for t in range(tokens.mask.shape[1]):
        onward = task.following[states[-1], tokens.response_ids[:, t]]
        states.append(torch.where(tokens.mask[:, t], onward, 0))
    return torch.stack(states, dim=1)


class TablePolicy(nn.Module):
    """Logits [S, V] as parameters."""

    def __init__(self, logits: Tensor, task: Task) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self.task = task

    def table(self) -> Tensor:
        """Log-probabilities [S, V]."""
        return self.logits.log_softmax(-1)

    def prepare(self, tokens: Tokens, tokens_per_microbatch: int) -> Tokens:
        del tokens_per_microbatch
        return replace(tokens, activations=states_of(tokens, self.task)[:, :, None])

    def logprobs(self, tokens: Tokens) -> Tensor:
        states = states_of(tokens, self.task)[:, :-1]
        return self.table()[states, tokens.response_ids].masked_fill(~tokens.mask, 0.0)

    def logprobs_and_entropies(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        entropies = torch.special.entr(self.table().exp()).sum(-1)[states_of(tokens, self.task)[:, :-1]]
        return self.logprobs(tokens), entropies.masked_fill(~tokens.mask, 0.0)


class TableValue(nn.Module):
    """A number for each state, in units of `scale` around `shift`; or the logits of bins, with a histogram."""

    def __init__(self, task: Task, start: float = 0.0, histogram=None) -> None:
        super().__init__()
        shape = (task.states,) if histogram is None else (task.states, histogram.bins)
        self.answers = nn.Parameter(torch.full(shape, start, dtype=torch.float64))
        self.task, self.histogram = task, histogram
        self.scale, self.shift = 1.0, 0.0

    def table(self) -> Tensor:
        """[S]; zero at final states, whose value no one asks for."""
        answers = self.answers if self.histogram is None else self.histogram.mean(self.answers)
        return self.shift + self.scale * answers

    def values(self, tokens: Tokens) -> Tensor:
        return self.table()[states_of(tokens, self.task)]

    def bin_logits(self, tokens: Tokens) -> Tensor:
        return self.answers[states_of(tokens, self.task)]

    @torch.no_grad()
    def rescale(self, mean: float, std: float) -> None:
        self.answers.mul_(self.scale).add_(self.shift - mean).div_(std)
        self.scale, self.shift = std, mean


@torch.no_grad()
def sample_rollouts(policy: TablePolicy, count: int, random: torch.Generator) -> list[Rollout]:
    """Responses of the policy as it is."""
    task, table = policy.task, policy.table()
    states = torch.zeros(count, dtype=torch.int64)
    steps: list[tuple[Tensor, Tensor]] = []
    active = ~task.final[states]
    lengths = torch.zeros(count, dtype=torch.int64)
    while active.any():
        tokens = torch.multinomial(table[states].exp(), 1, generator=random).squeeze(1)
        steps.append((tokens, table[states, tokens]))
        lengths += active
        states = torch.where(active, task.following[states, tokens], states)
        active = ~task.final[states]
    ids, logprobs = (torch.stack([step[n] for step in steps], dim=1).tolist() for n in (0, 1))
    ended = (~task.cut[states]).tolist()
    return [
        Rollout(PROMPT, tuple(tokens[:length]), tuple(scores[:length]), "", end)
        for tokens, scores, length, end in zip(ids, logprobs, lengths.tolist(), ended, strict=True)
    ]


def score_rollouts(rollouts: list[Rollout], task: Task) -> Scores:
    """The reward of the state that each response ends in."""
    tokens = pad_tokens([rollout.prompt.ids for rollout in rollouts], [rollout.ids for rollout in rollouts])
    return Scores(task.reward[states_of(tokens, task).gather(1, tokens.response_lengths[:, None]).squeeze(1)], {})


def all_rollouts(task: Task) -> list[Rollout]:
    """Every response of a task that is a tree, each with log-probabilities of zero."""
    found: list[Rollout] = []

    def walk(state: int, ids: tuple[int, ...]) -> None:
        if bool(task.final[state]):
            found.append(Rollout(PROMPT, ids, (0.0,) * len(ids), "", not bool(task.cut[state])))
            return
        for token in range(task.vocabulary):
            walk(int(task.following[state, token]), (*ids, token))

    walk(0, ())
    return found
