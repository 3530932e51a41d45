"""The default generator: in process, on the policy's own weights, with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tandem.algo import sample
from tandem.types import Prompt, Rollout


class NextToken(Protocol):
    """A policy as the generator sees it."""

    @property
    def device(self) -> torch.device: ...

    def new_cache(self) -> Any:
        """An empty KV cache with `batch_select_indices`."""
        ...

    def next_logits(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        """Logits [B, V] of the distribution to sample the token after `ids` [B, S] from; the cache grows."""
        ...


class TorchGenerator:
    """Samples from the policy's weights as they are at the moment, so it needs no weight transfer.

    Prompts of similar length decode together, padded on the left; a row that has ended leaves the batch.
    `decode` turns a prompt's and a response's ids into the response's text; `stop_ids` end a response.
    """

    def __init__(
        self,
        policy: NextToken,
        decode: Callable[[Sequence[int], Sequence[int]], str],
        stop_ids: Iterable[int],
        *,
        max_new_tokens: int,
        sequences_per_batch: int,
        random: torch.Generator,
    ) -> None:
        self._policy = policy
        self._decode = decode
        self._stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=policy.device)
        self._max_new_tokens = max_new_tokens
        self._sequences_per_batch = sequences_per_batch
        self._random = random

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """One response for each prompt, in their order."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
        answers: dict[int, Rollout] = {}
        for start in range(0, len(order), self._sequences_per_batch):
            indices = order[start : start + self._sequences_per_batch]
            rollouts = self._generate_together([prompts[index] for index in indices])
            answers |= dict(zip(indices, rollouts, strict=True))
        return [answers[index] for index in range(len(prompts))]

    def _generate_together(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        device, limit = self._policy.device, self._max_new_tokens
        ids, mask = _pad_left([prompt.ids for prompt in prompts], device)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        next_position = mask.long().sum(1)
        cache = self._policy.new_cache()
        responses = torch.zeros(len(prompts), limit, dtype=torch.int64, device=device)
        logprobs = torch.zeros(len(prompts), limit, device=device)
        lengths = torch.full((len(prompts),), limit, device=device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        active = torch.arange(len(prompts), device=device)
        for t in range(limit):
            logits = self._policy.next_logits(ids, mask, positions, cache)
            tokens, token_logprobs = sample(logits, self._random)
            responses[active, t], logprobs[active, t] = tokens, token_logprobs
            stopped = torch.isin(tokens, self._stop_ids)
            if bool(stopped.any()):
                lengths[active[stopped]] = t + 1
                ended[active[stopped]] = True
                staying = (~stopped).nonzero().squeeze(1)
                if len(staying) == 0:
                    break
                cache.batch_select_indices(staying)
                active, tokens, mask = active[staying], tokens[staying], mask[staying]
                next_position = next_position[staying]
            ids, positions = tokens[:, None], next_position[:, None]
            next_position = next_position + 1
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        return [
            self._rollout(prompt, responses[row, :length].tolist(), logprobs[row, :length].tolist(), bool(ended[row]))
            for row, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True))
        ]

    def _rollout(self, prompt: Prompt, ids: list[int], logprobs: list[float], ended: bool) -> Rollout:
        return Rollout(prompt, tuple(ids), tuple(logprobs), self._decode(prompt.ids, ids), ended)


def _pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, P] and mask [B, P] with every row's last token in the last column."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(width, device=device)[None, :] >= width - lengths[:, None]
    return ids, mask.long()
