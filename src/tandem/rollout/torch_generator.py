"""The default generator: in process, on the policy's own weights, with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tandem.rollout.stopping import Stopping
from tandem.types import Prompt, Rollout
from tandem.world import World, world


class NextToken(Protocol):
    """A policy as the generator sees it."""

    @property
    def device(self) -> torch.device: ...

    def gathered(self) -> AbstractContextManager[None]:
        """Within it tokens are asked for one by one, by each process as often as it likes."""
        ...

    def new_cache(self, capacity: int) -> Any:
        """An empty KV cache for rows of up to `capacity` tokens, with `batch_select_indices`."""
        ...

    def next_logits(self, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Any) -> Tensor:
        """Logits [B, V] of the distribution to sample the token after `ids` [B, S] from; the cache grows."""
        ...

    def draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """A token a row [B] from such logits, by numbers [B] from [0, 1), and their log-probabilities [B]."""
        ...


def draw_uniform(count: int, max_new_tokens: int, random: torch.Generator) -> Tensor:
    """The chance in so many responses: [count, max_new_tokens] float32, uniform in [0, 1), one number a token."""
    return torch.rand(count, max_new_tokens, generator=random, device=random.device)


def groups_by_length(prompts: Sequence[Prompt], size: int, first: int = 0, every: int = 1) -> list[list[int]]:
    """Rows of similar length together, the shortest first; of all in that order, one in `every` from the `first` on."""
    own = sorted(range(len(prompts)), key=lambda row: len(prompts[row].ids))[first::every]
    return [own[start : start + size] for start in range(0, len(own), size)]


class TorchGenerator:
    """Samples from a policy's weights as they are at the moment.

    Where that is the policy that trains, there is nothing to transfer. Where it is a copy, `load` is what brings the
    copy up to date.

    Prompts of similar length decode together, padded on the left; a prompt that is asked for several responses is
    read once; a row that has ended leaves the batch. `decode` turns a prompt's and a response's ids into the
    response's text; `stop_ids` end a response.

    Random numbers are drawn for all rows and their longest responses beforehand, so that what a row samples depends
    neither on which rows it decodes with nor on which process decodes it: each of `together`, which are those that
    train together unless others are given, takes its share of the rows.
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
        load: Callable[[Iterable[tuple[str, Tensor]]], None] | None = None,
        together: World | None = None,
    ) -> None:
        self._policy = policy
        self._decode = decode
        self._stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=policy.device)
        self._max_new_tokens = max_new_tokens
        self._sequences_per_batch = sequences_per_batch
        self._random = random
        self._load = load
        self._together = together or world()
        self._stopping = Stopping()
        self.version = 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Bring a copy of the policy up to date; the policy's own weights always are, and `weights` is not touched."""
        if self._load is not None:
            self._load(weights)
        self.version = version

    def stop(self) -> None:
        """Let a `generate` in another thread end before its next token, by raising GivenUp."""
        self._stopping.ask()

    def generate(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """One response for each prompt, in their order."""
        return self.answer(prompts, draw_uniform(len(prompts), self._max_new_tokens, self._random))

    @torch.no_grad()
    def answer(self, prompts: Sequence[Prompt], uniform: Tensor) -> list[Rollout]:
        """One response for each prompt, in their order, from their numbers as `draw_uniform` makes them."""
        uniform = uniform.to(self._policy.device)
        answers: dict[int, Rollout] = {}
        with self._policy.gathered():
            for indices in groups_by_length(
                prompts, self._sequences_per_batch, self._together.rank, self._together.size
            ):
                rollouts = self._generate_together([prompts[index] for index in indices], uniform[indices])
                answers |= dict(zip(indices, rollouts, strict=True))
        answers = {index: answer for part in self._together.gather(answers) for index, answer in part.items()}
        return [answers[index] for index in range(len(prompts))]

    def _generate_together(self, prompts: Sequence[Prompt], uniform: Tensor) -> list[Rollout]:
        """One response for each prompt, from numbers [B, max_new_tokens] drawn uniformly from [0, 1)."""
        device, limit = self._policy.device, self._max_new_tokens
        responses = torch.zeros(len(prompts), limit, dtype=torch.int64, device=device)
        logprobs = torch.zeros(len(prompts), limit, device=device)
        lengths = torch.full((len(prompts),), limit, device=device)
        rows = torch.arange(len(prompts), device=device)
        logits, decoding = self._read_prompts(prompts)
        for t in range(limit):
            self._stopping.check()
            tokens, token_logprobs = self._policy.draw(logits, uniform[rows, t])
            responses[rows, t], logprobs[rows, t] = tokens, token_logprobs
            stopped = torch.isin(tokens, self._stop_ids)
            if bool(stopped.any()):
                lengths[rows[stopped]] = t + 1
                staying = _staying(stopped)
                rows, tokens = rows[staying], tokens[staying]
                decoding.select(staying)
            if len(rows) == 0 or t + 1 == limit:
                break
            logits = decoding.next_logits(self._policy, tokens)
        ended = torch.ones(len(prompts), dtype=torch.bool).index_fill(0, rows.cpu(), False)
        return [
            self._rollout(prompt, responses[row, :length].tolist(), logprobs[row, :length].tolist(), bool(ended[row]))
            for row, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True))
        ]

    def _read_prompts(self, prompts: Sequence[Prompt]) -> tuple[Tensor, _Decoding]:
        """Each different prompt once; the logits of every row's first token, and where decoding goes on from."""
        different = list(dict.fromkeys(prompt.ids for prompt in prompts))
        numbers = {ids: number for number, ids in enumerate(different)}
        ids, mask = _pad_left(different, self._policy.device)
        width = ids.shape[1]
        cache = self._policy.new_cache(width + self._max_new_tokens)
        decoding = _Decoding(cache, width, mask.sum(1), _mask_ahead(mask, self._max_new_tokens))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self._policy.next_logits(ids, decoding.mask_so_far, positions, cache)
        if len(different) < len(prompts):
            of_row = torch.tensor([numbers[prompt.ids] for prompt in prompts], device=ids.device)
            decoding.select(of_row)
            logits = logits[of_row]
        return logits, decoding

    def _rollout(self, prompt: Prompt, ids: list[int], logprobs: list[float], ended: bool) -> Rollout:
        return Rollout(prompt, tuple(ids), tuple(logprobs), self._decode(prompt.ids, ids), ended)


@dataclass
class _Decoding:
    """The rows that decode together: the first `width` columns are their prompts, padded on the left.

    `mask` [B, width + longest response] is None where no prompt needs padding.
    """

    cache: Any
    width: int
    positions: Tensor
    mask: Tensor | None

    @property
    def mask_so_far(self) -> Tensor | None:
        return None if self.mask is None else self.mask[:, : self.width]

    def next_logits(self, policy: NextToken, tokens: Tensor) -> Tensor:
        """Add a token [B] to every row; the logits [B, V] of the next."""
        self.width += 1
        logits = policy.next_logits(tokens[:, None], self.mask_so_far, self.positions[:, None], self.cache)
        self.positions = self.positions + 1
        return logits

    def select(self, rows: Tensor) -> None:
        """Let row n be what row `rows[n]` was."""
        if len(rows):
            self.cache.batch_select_indices(rows)
        self.positions = self.positions[rows]
        self.mask = None if self.mask is None else self.mask[rows]


def _staying(stopped: Tensor) -> Tensor:
    """The rows that go on, those from the end in the places of those that stopped: few have to move."""
    staying = (~stopped).nonzero().squeeze(1)
    count = len(staying)
    places = torch.arange(count, device=stopped.device)
    places[stopped[:count]] = staying[staying >= count]
    return places


def _pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, P] and mask [B, P] with every row's last token in the last column."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(width, device=device)[None, :] >= width - lengths[:, None]
    return ids, mask.long()


def _mask_ahead(mask: Tensor, following: int) -> Tensor | None:
    """The prompts' mask with so many columns of response to come, or None where nothing is padded."""
    if bool(mask.all()):
        return None
    return torch.cat([mask, mask.new_ones(len(mask), following)], dim=1)
