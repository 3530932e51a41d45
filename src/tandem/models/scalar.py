"""A decoder with a scalar head: a reward model at a sequence's last token, a value model at every token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from tandem.algo import Histogram
from tandem.errors import InputError
from tandem.models.loading import check_classifier, load_scalar
from tandem.models.shards import whole_tensor
from tandem.models.source import check_labels, is_classifier
from tandem.models.trunk import Trunk
from tandem.models.unread import load_trunk, unread_model
from tandem.types import Tokens
from tandem.world import world


def zero_head(hidden_size: int, device: torch.device, *, outputs: int = 1, bias: bool = False) -> nn.Linear:
    """A head that answers 0 everywhere, so that a new value model starts the same every time."""
    head = nn.Linear(hidden_size, outputs, bias=bias, device=device, dtype=torch.float32)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


class ScalarModel:
    """One number a token, read off the decoder's hidden states by a head kept in float32.

    The number is shift + scale * head(h), or, with a `histogram`, the mean of the bins that the head's logits
    stand for.
    """

    def __init__(
        self, trunk: Trunk, head: nn.Linear, adapter: str | None = None, histogram: Histogram | None = None
    ) -> None:
        self.trunk = trunk
        self.head = head
        self.adapter = adapter
        self.histogram = histogram
        self.scale = 1.0
        self.shift = 0.0

    def values(self, tokens: Tokens) -> Tensor:
        """V of the states before each response token and after the last one: [B, T + 1] float32.

        Column t is V(s_t); column `response_lengths[b]` is the value after the last token; zero beyond it.
        """
        return self.trunk.run(lambda: self.read(self.trunk.hidden(tokens, self.adapter), tokens))

    def bin_logits(self, tokens: Tokens) -> Tensor:
        """The logits of a categorical head at the same places, [B, T + 1, K] float32."""
        return self.trunk.run(lambda: self.read_bins(self.trunk.hidden(tokens, self.adapter), tokens))

    def scores(self, tokens: Tokens) -> Tensor:
        """The number at the last token of each row, [B] float32."""
        hidden = self.trunk.run(lambda: self.trunk.hidden(tokens, self.adapter))
        rows = torch.arange(len(tokens), device=hidden.device)
        return self._number(self.head(hidden[rows, tokens.lengths - 1].float()))

    def read(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """`values` from the trunk's hidden states [B, L, H]."""
        exists, found = self._answers(hidden, tokens)
        return torch.zeros(exists.shape, device=hidden.device).masked_scatter(exists, self._number(found))

    def read_bins(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """`bin_logits` from the trunk's hidden states [B, L, H]."""
        exists, found = self._answers(hidden, tokens)
        out = torch.zeros(*exists.shape, found.shape[-1], device=hidden.device)
        return out.masked_scatter(exists[..., None].expand_as(out), found)

    @torch.no_grad()
    def rescale(self, mean: float, std: float) -> None:
        """Let the head speak in units of `std` around `mean`, with every value as it was.

        Source: van Hasselt et al. 2016 (PopArt), proposition 1.
        """
        if self.head.bias is None:
            raise ValueError("a head without a bias cannot take up a shift of its units")
        self.head.weight.mul_(self.scale / std)
        self.head.bias.mul_(self.scale).add_(self.shift - mean).div_(std)
        self.scale, self.shift = std, mean

    def _answers(self, hidden: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Where a state exists, [B, T + 1], and what the head says there, [N, K]."""
        columns = torch.arange(tokens.mask.shape[1] + 1, device=hidden.device)
        exists = columns[None, :] <= tokens.response_lengths[:, None]
        positions = tokens.prompt_lengths[:, None] - 1 + columns
        rows = torch.arange(len(tokens), device=hidden.device)[:, None].expand_as(exists)[exists]
        return exists, self.head(hidden[rows, positions[exists]].float())

    def _number(self, answers: Tensor) -> Tensor:
        """[N, K] -> [N]."""
        found = answers.squeeze(-1) if self.histogram is None else self.histogram.mean(answers)
        return self.shift + self.scale * found


def head_of(model: nn.Module) -> nn.Linear | None:
    """The scalar head of a one-label classifier that is a causal decoder, or None where it is built otherwise."""
    head = getattr(model, "score", None)
    return head if isinstance(head, nn.Linear) and head.out_features == 1 else None


def as_scalar(model: PreTrainedModel, read: Callable[[], None] | None = None) -> ScalarModel:
    """A one-label decoder classifier as a model that answers at every token, its head in float32.

    `read` is what gives a model on the meta device its weights.
    """
    trunk, head = Trunk(model, read), head_of(model)
    assert head is not None
    own = nn.Linear(head.in_features, 1, bias=head.bias is not None, device=trunk.device)
    own.load_state_dict({name: whole_tensor(tensor).float() for name, tensor in head.state_dict().items()})
    return ScalarModel(trunk, own.requires_grad_(False))


def load_classifier(
    source: str,
    key: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    say: Callable[[str], None],
) -> ScalarModel | PreTrainedModel:
    """A one-label classifier: as a scalar model where it is a causal decoder with a scalar head, else as it is.

    The weights of a scalar model are cut over the processes that train together, as `load_trunk` does it.
    """
    if not world().alone:
        check_labels(source, key, trust_remote_code)
        kind = AutoModelForSequenceClassification
        unread = unread_model(kind, source, key, dtype, device, trust_remote_code, say)
        if unread is not None and head_of(unread.model) is not None:
            return as_scalar(unread.model, unread.read)
    model = load_scalar(source, key, dtype, device, trust_remote_code)
    return model if head_of(model) is None else as_scalar(model)


def load_body(
    source: str,
    key: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    say: Callable[[str], None],
) -> ScalarModel:
    """A causal language model or a one-label decoder classifier, as a scalar model.

    A classifier keeps its head; a language model gets one that answers 0.
    """
    if is_classifier(source, key, trust_remote_code):
        model = load_classifier(source, key, dtype, device, trust_remote_code, say)
        if not isinstance(model, ScalarModel):
            raise InputError(
                f"{key} = {source!r} ({type(model).__name__}) is no causal decoder with a scalar head; start from a "
                "causal language model, or from a reward model that is built on one."
            )
        return model
    trunk = load_trunk(source, key, dtype, device, trust_remote_code, say)
    check_classifier(trunk.model)
    return ScalarModel(trunk, zero_head(trunk.model.config.hidden_size, device))
