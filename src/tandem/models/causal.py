"""A causal language model as a policy: log-probabilities of given tokens, and logits of the next one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from tandem.algo import Passes, projected_logprobs, sample, truncate
from tandem.errors import InputError
from tandem.models import kernels
from tandem.models.cache import roomy_cache
from tandem.models.head import head_logprobs
from tandem.models.packing import packed
from tandem.models.trunk import Trunk
from tandem.types import Tokens

_LOGITS_PER_CHUNK = 2**26


@dataclass(frozen=True)
class SamplingRule:
    """What turns logits into the distribution that is sampled from and trained."""

    temperature: float
    top_k: int | None
    top_p: float


FULL_DISTRIBUTION = SamplingRule(temperature=1.0, top_k=None, top_p=1.0)


class CausalPolicy:
    """A causal language model under a sampling rule.

    Temperature divides the logits in every log-probability. Top-k and top-p are part of the policy: its
    log-probabilities are those of the truncated distribution, in sampling and in training alike.
    """

    def __init__(self, trunk: Trunk, rule: SamplingRule, adapter: str | None = None) -> None:
        self.trunk = trunk
        self.rule = rule
        self.adapter = adapter
        self.passes = Passes()
        self.samples_by_kernels = False
        self.reads_by_kernels = False
        self._model: Any = trunk.model
        self._head: Any = trunk.model.get_output_embeddings()
        _check_logits(self)

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    @property
    def below(self) -> Trunk | None:
        """The trunk, where other models share what its lower layers make of a text."""
        return self.trunk if self.trunk.shares_below(self.adapter) else None

    def prepare(self, tokens: Tokens, tokens_per_microbatch: int) -> Tokens:
        """Move tokens to the model, with the activations that all its passes over them can share."""
        return self.trunk.prepare(tokens, tokens_per_microbatch)

    def logprobs(self, tokens: Tokens) -> Tensor:
        """log pi(y_t | x, y_<t) of each response token, [B, T] float32, zero where masked.

        Only response positions are projected on the vocabulary, in chunks: [B, T, V] never exists.
        """
        return self.trunk.run(lambda: self.read(self.trunk.hidden(tokens, self.adapter), tokens)[0])

    def logprobs_and_entropies(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """As `logprobs`, with the entropy of the whole distribution at each response token in nats, [B, T] each."""
        logprobs, entropies = self.trunk.run(
            lambda: self.read(self.trunk.hidden(tokens, self.adapter), tokens, entropies=True)
        )
        assert entropies is not None
        return logprobs, entropies

    def read(self, hidden: Tensor, tokens: Tokens, *, entropies: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities, and entropies if asked for, [B, T] each, from the trunk's hidden states [B, L, H]."""
        mask = tokens.mask
        rows = torch.arange(len(tokens), device=mask.device)[:, None].expand_as(mask)[mask]
        states = hidden[rows, tokens.response_positions[mask] - 1]
        targets = tokens.response_ids[mask]
        rows_per_chunk = max(1, _LOGITS_PER_CHUNK // self._head.weight.shape[0])

        def laid_out(found: Tensor) -> Tensor:
            return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_scatter(mask, found)

        if self.reads_by_kernels and not entropies and self._has_plain_logits() and kernels.reads_head(self._head):
            return laid_out(head_logprobs(states, targets, self._head.weight, rows_per_chunk)), None
        logprobs, in_nats = projected_logprobs(
            states,
            targets,
            self._scoring_logits,
            rows_per_chunk,
            with_entropy=entropies,
            head_trains=self._head.weight.requires_grad,
            passes=self.passes,
        )
        return laid_out(logprobs), None if in_nats is None else laid_out(in_nats)

    def _scoring_logits(self, states: Tensor, targets: Tensor) -> Tensor:
        """Logits of the policy's distribution, in which the targets always stay: [N, H], [N] -> [N, V]."""
        return truncate(self._scaled_logits(states), self.rule.top_k, self.rule.top_p, keep=targets)

    def _scaled_logits(self, states: Tensor) -> Tensor:
        logits = self.logits(states)
        return logits if self.rule.temperature == 1.0 else logits / self.rule.temperature

    def logits(self, states: Tensor) -> Tensor:
        """The model's own logits [N, V] for hidden states [N, H]."""
        logits = self._head(states.contiguous())
        scale, divisor, cap = self._after_head()
        if scale is not None:
            logits = logits * scale
        if divisor is not None:
            logits = logits / divisor
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _after_head(self) -> tuple[float | None, float | None, float | None]:
        """What the model multiplies the product with its head by, divides it by, and caps it at."""
        config = self._model.config.get_text_config()
        names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
        scale, divisor, cap = (getattr(config, name, None) for name in names)
        return scale, divisor, cap

    def _has_plain_logits(self) -> bool:
        """Whether the policy's logits are the product with its head, and nothing else."""
        return self.rule == FULL_DISTRIBUTION and self._after_head() == (None, None, None)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights, adapter folded in, one by one, under the names of a saved model."""
        return self.trunk.merged_weights(self.adapter)

    def own_copy(self) -> CausalPolicy:
        """The same policy on weights of its own, any adapter folded in; `load_weights` brings it up to date.

        Of several processes that train together each has the whole copy; all must ask for it then.
        """
        with torch.random.fork_rng(devices=[]):
            model = type(self._model)(self._model.config)
        model = model.to(device=self.device, dtype=self._model.dtype).eval().requires_grad_(False)
        # What is computed and not saved, such as rotary frequencies, is finer than the weights may be.
        for name, buffer in model.named_buffers():
            buffer.data = self._model.get_buffer(name).detach().clone()
        model.generation_config = self._model.generation_config
        copy = CausalPolicy(Trunk(model, whole=True), self.rule)
        copy.load_weights(self.weights())
        return copy

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over weights one by one, in place, under the names of a saved model."""
        own = self._model.state_dict()
        for name, tensor in weights:
            own[name].copy_(tensor)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it many tokens can be sampled one by one, by each process as many as it likes."""
        with self.trunk.gathered(), packed(self._model, self.samples_by_kernels):
            yield

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """The ids that end a response: the tokenizer's EOS and those that the model was saved with."""
        known = self._model.generation_config.eos_token_id
        listed = known if isinstance(known, list) else [known]
        return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}

    def new_cache(self, capacity: int) -> DynamicCache:
        """An empty cache for rows of up to `capacity` tokens."""
        return roomy_cache(self._model, capacity)

    @torch.no_grad()
    def next_logits(self, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Cache) -> Tensor:
        """Logits [B, V] of the token after `ids` [B, S], left-padded as the mask [B, past + S] says, if there is one.

        They are divided by the temperature and truncated. `cache` grows by S.
        """

        def read() -> Tensor:
            with self.trunk.using(self.adapter):
                hidden = self.trunk.decoder(
                    input_ids=ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state[:, -1]
            return truncate(self._scaled_logits(hidden), self.rule.top_k, self.rule.top_p)

        return self.trunk.run(read)

    def draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """A token a row [B] int64 from logits [B, V], by numbers [B] from [0, 1), and their log-probabilities [B]."""
        by_kernels = self.samples_by_kernels and kernels.draws(logits)
        return kernels.draw(logits, uniform) if by_kernels else sample(logits, uniform)


@torch.no_grad()
def _check_logits(policy: CausalPolicy) -> None:
    """Raises InputError where the model makes its logits in a way that `CausalPolicy.logits` does not know."""
    model: PreTrainedModel = policy._model
    ids = torch.arange(4, device=policy.device)[None]
    expected = policy.trunk.run(lambda: model(input_ids=ids, use_cache=False).logits[0])
    found = policy.trunk.run(
        lambda: policy.logits(policy.trunk.decoder(input_ids=ids, use_cache=False).last_hidden_state[0])
    )
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
        raise InputError(f"{type(model).__name__} makes its logits in a way that Tandem does not know.")
