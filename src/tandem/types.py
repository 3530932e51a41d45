"""The doors between the rooms: what data is called at each point of its way through a step.

    Prompt -> Rollout -> Tokens -> Trajectories -> Batch

Dimension names: B sequences, L tokens of prompt and response together, T response tokens, H hidden size.

One alignment holds everywhere. Per-token tensors are [B, T] over response tokens only: `logprobs[b, t]`
scores response token t, `values[b, t]` is the value of the state before that token is emitted, `rewards[b, t]`
is paid for emitting it, and `mask[b, t]` is true up to and including the last response token (EOS, if there is
one). Entries outside the mask are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor


def rows_tried(count: int) -> int:
    """How many of so many rows, the longest, are run again to see whether what sampling said of all can stand."""
    return -(-count // 8)


@dataclass(frozen=True)
class Prompt:
    """A prompt as the policy reads it.

    `text` is what was tokenized into `ids`; `messages` is the conversation it was rendered from, or None for
    plain text; `row` holds every column of the row that it came from, for reward functions (a reference
    answer, say).
    """

    ids: tuple[int, ...]
    text: str
    messages: tuple[Mapping[str, str], ...] | None
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    `ids` includes EOS where the response ended by itself (`ended`); otherwise the response was cut at the
    length limit. `logprobs` are those of the distribution that was sampled from, in nats, one a token.
    `text` is decoded without special tokens.
    """

    prompt: Prompt
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    ended: bool


@dataclass(frozen=True)
class Scores:
    """What the reward says of each rollout.

    `total` [B] is paid at the last response token; `process` [B, T], where there is such a thing, at the tokens
    that earned it; `parts` [B] each, what every term gave in all, are for people to read.

    Rows in `missing` have no score, and `fault` says why the first of them has none. Their totals are NaN, and so is
    the part of every term that did not answer.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    process: Tensor | None = None
    missing: frozenset[int] = frozenset()
    fault: str | None = None

    @property
    def whole(self) -> Tensor:
        """[B] all that a response earned."""
        return self.total if self.process is None else self.total + self.process.sum(1)

    def select(self, rows: Tensor) -> Self:
        """The given rows; `process` keeps its width."""
        kept = [int(row) in self.missing for row in rows]
        missing = frozenset(row for row, is_missing in enumerate(kept) if is_missing)
        return replace(
            self,
            total=self.total[rows],
            parts={name: part[rows] for name, part in self.parts.items()},
            process=None if self.process is None else self.process[rows],
            missing=missing,
            fault=self.fault if missing else None,
        )


@dataclass(frozen=True)
class Tokens:
    """Prompts and responses side by side, each row contiguous and padded on the right.

    Right padding cannot reach an earlier position of a causal model, so no attention mask is needed and
    padding is told apart by lengths alone, never by a token's id.

    ids [B, L] int64; prompt_lengths [B]; response_lengths [B], both at least 1; `activations` [B, L, H] are
    those below the first adapted layer where the models share a frozen lower trunk (else None).
    """

    ids: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    activations: Tensor | None

    def __len__(self) -> int:
        return self.ids.shape[0]

    @cached_property
    def lengths(self) -> Tensor:
        """[B] tokens of prompt and response together."""
        return self.prompt_lengths + self.response_lengths

    @cached_property
    def mask(self) -> Tensor:
        """[B, T] bool."""
        columns = torch.arange(int(self.response_lengths.max()), device=self.ids.device)
        return columns[None, :] < self.response_lengths[:, None]

    @cached_property
    def response_positions(self) -> Tensor:
        """[B, T] the column of `ids` where response token t stands (clamped to the row where masked)."""
        columns = torch.arange(self.mask.shape[1], device=self.ids.device)
        return (self.prompt_lengths[:, None] + columns).clamp(max=self.ids.shape[1] - 1)

    @cached_property
    def response_ids(self) -> Tensor:
        """[B, T] int64, zero where masked."""
        return self.ids.gather(1, self.response_positions).masked_fill(~self.mask, 0)

    def select(self, rows: Tensor) -> Self:
        """The given rows, with padding that none of them needs cut off."""
        prompt_lengths, response_lengths = self.prompt_lengths[rows], self.response_lengths[rows]
        width = int((prompt_lengths + response_lengths).max())
        activations = None if self.activations is None else self.activations[rows, :width]
        return replace(
            self,
            ids=self.ids[rows, :width],
            prompt_lengths=prompt_lengths,
            response_lengths=response_lengths,
            activations=activations,
        )

    def to(self, device: torch.device | str) -> Self:
        return replace(
            self,
            ids=self.ids.to(device),
            prompt_lengths=self.prompt_lengths.to(device),
            response_lengths=self.response_lengths.to(device),
            activations=None if self.activations is None else self.activations.to(device),
        )


def pad_tokens(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tokens:
    """Lay ragged prompts and responses into one rectangle.

    Raises ValueError where a prompt or response is empty or the two lists differ in length.
    """
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(f"need as many responses as prompts, and at least one: {len(prompts)}, {len(responses)}")
    if any(len(p) == 0 for p in prompts) or any(len(r) == 0 for r in responses):
        raise ValueError("every prompt and every response needs at least one token")
    return _rectangle([[*p, *r] for p, r in zip(prompts, responses, strict=True)], [len(p) for p in prompts])


def whole_texts(texts: Sequence[Sequence[int]], prompt_lengths: Sequence[int] | None = None) -> Tokens:
    """Texts that come as one piece, with how many tokens of each count as its prompt: all but the last if unset."""
    return _rectangle(texts, [len(text) - 1 for text in texts] if prompt_lengths is None else prompt_lengths)


def _rectangle(rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> Tokens:
    lengths = torch.tensor([len(row) for row in rows])
    return Tokens(
        ids=torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True),
        prompt_lengths=torch.tensor(prompt_lengths),
        response_lengths=lengths - torch.tensor(prompt_lengths),
        activations=None,
    )


@dataclass(frozen=True)
class Trajectories:
    """Rollouts scored and measured under the models of the moment; nothing here carries a gradient.

    tokens: see Tokens; [B, T] each, in nats: `behaviour_logprobs` of the sampler as it sampled, `logprobs` of
    the policy before this step's updates (the denominator of the ratio), `reference_logprobs`; `recomputed` [B] bool:
    the policy was run for this row, where else the sampler's log-probabilities stand for its own;
    values [B, T]: of the state before each token; final_values [B]: of the state after the last token;
    ended [B] bool: the response ended by itself; scores [B] paid at the last token; process_rewards [B, T] paid at
    their own.
    """

    tokens: Tokens
    behaviour_logprobs: Tensor
    logprobs: Tensor
    recomputed: Tensor
    reference_logprobs: Tensor
    values: Tensor
    final_values: Tensor
    ended: Tensor
    scores: Tensor
    process_rewards: Tensor

    @property
    def mask(self) -> Tensor:
        return self.tokens.mask


@dataclass(frozen=True)
class Batch:
    """What the updates learn from: a trajectory with its rewards, advantages and value targets, [B, T] each.

    `weights` are the policy loss's importance weights, 1 where nothing is corrected. `outcomes` are what was earned
    from each token on, free of any value; `known` is where that is known.
    """

    tokens: Tokens
    logprobs: Tensor
    reference_logprobs: Tensor
    weights: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    outcomes: Tensor
    known: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, rows: Tensor) -> Self:
        """The given rows, with padding that none of them needs cut off."""
        tokens = self.tokens.select(rows)
        width = tokens.mask.shape[1]
        others = {f.name: getattr(self, f.name)[rows, :width] for f in fields(self) if f.name != "tokens"}
        return replace(self, tokens=tokens, **others)


SMALLEST_GROUP = 512


def split_by_tokens(lengths: Tensor, budget: int) -> list[Tensor]:
    """Rows in groups whose padded size, rows times longest, stays within the budget; a long row stands alone.

    lengths [B] -> row indices, each once, longest first: the first group needs the most memory, so a run that
    does not fit fails at its start. A group of SMALLEST_GROUP tokens or more ends early, before a row that would be
    more than a tenth padding. The groups are as few as can be and of like size: each has costs that do not depend on
    its rows, and a rest of a row or two would have them too.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    ordered = lengths[order].tolist()
    sizes = _group_sizes(ordered, budget)
    too_small = 0
    while budget - too_small > 1:
        middle = (budget + too_small) // 2
        smaller = _group_sizes(ordered, middle)
        if len(smaller) > len(sizes):
            too_small = middle
        else:
            budget, sizes = middle, smaller
    return list(order.split(sizes))


def _group_sizes(lengths: list[int], budget: int) -> list[int]:
    """How many of the rows, the longest first, each group of `split_by_tokens` takes where it takes what it can."""
    sizes: list[int] = []
    start = 0
    while start < len(lengths):
        longest, end = max(1, lengths[start]), start + 1
        while (
            end < len(lengths)
            and (end + 1 - start) * longest <= budget
            and (lengths[end] >= 0.9 * longest or (end - start) * longest < SMALLEST_GROUP)
        ):
            end += 1
        sizes.append(end - start)
        start = end
    return sizes
