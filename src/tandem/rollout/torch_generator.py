"""The default generator: in process, on the policy's own weights, with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from tandem.rollout.decoding import Decoding
from tandem.rollout.next_token import NextToken
from tandem.rollout.stopping import Stopping
from tandem.types import Prompt, Rollout
from tandem.world import World, world


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
        below, lower = self._policy.below, list[Tensor]()
        with self._policy.gathered(), nullcontext() if below is None else below.watched():
            for indices in groups_by_length(
                prompts, self._sequences_per_batch, self._together.rank, self._together.size
            ):
                rollouts, kept = self._generate_together([prompts[index] for index in indices], uniform[indices])
                answers |= dict(zip(indices, rollouts, strict=True))
                lower += kept
        if below is not None:
            below.keep([rollout.prompt.ids + rollout.ids for rollout in answers.values()], lower)
        answers = {index: answer for part in self._together.gather(answers) for index, answer in part.items()}
        return [answers[index] for index in range(len(prompts))]

    def _generate_together(self, prompts: Sequence[Prompt], uniform: Tensor) -> tuple[list[Rollout], list[Tensor]]:
        """One response for each prompt, from numbers [B, max_new_tokens] drawn uniformly from [0, 1).

        With what lower layers that other models share made of each text [L, H], if there are such layers.
        """
        device, limit = self._policy.device, self._max_new_tokens
        responses = torch.zeros(len(prompts), limit, dtype=torch.int64, device=device)
        logprobs = torch.zeros(len(prompts), limit, device=device)
        lengths = torch.zeros(len(prompts), dtype=torch.int64, device=device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        decoding = Decoding(self._policy, [prompt.ids for prompt in prompts], limit)
        for t in range(limit):
            self._stopping.check()
            rows = decoding.rows
            tokens, token_logprobs = self._policy.draw(decoding.logits, uniform[rows, t])
            stopped = torch.isin(tokens, self._stop_ids)
            responses[rows, t], logprobs[rows, t] = tokens, token_logprobs
            lengths[rows], ended[rows] = t + 1, stopped
            if t + 1 == limit or bool(stopped.all()):
                decoding.end(tokens)
                break
            decoding.go_on(tokens, stopped)
        rollouts = [
            self._rollout(prompt, responses[row, :length].tolist(), logprobs[row, :length].tolist(), by_itself)
            for row, (prompt, length, by_itself) in enumerate(
                zip(prompts, lengths.tolist(), ended.tolist(), strict=True)
            )
        ]
        return rollouts, decoding.lower([(len(rollout.prompt.ids), len(rollout.ids)) for rollout in rollouts])

    def _rollout(self, prompt: Prompt, ids: list[int], logprobs: list[float], ended: bool) -> Rollout:
        return Rollout(prompt, tuple(ids), tuple(logprobs), self._decode(prompt.ids, ids), ended)
