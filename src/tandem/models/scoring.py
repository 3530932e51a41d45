"""Scores of whole texts under a one-label classifier, whichever way its body is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tandem.models.scalar import ScalarModel
from tandem.types import whole_texts
from tandem.world import world


class Scorer(Protocol):
    def score(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Token ids of B texts -> [B] float32."""
        ...


class DecoderScorer:
    """A decoder with a scalar head, read at each text's last token."""

    def __init__(self, model: ScalarModel, tokens_per_microbatch: int) -> None:
        self.model = model
        self._budget = tokens_per_microbatch

    @torch.no_grad()
    def score(self, texts: Sequence[Sequence[int]]) -> Tensor:
        tokens, trunk = whole_texts(texts), self.model.trunk
        if trunk.shares_below(self.model.adapter):
            tokens = trunk.prepare(tokens, self._budget)
        scores = torch.zeros(len(texts))
        for rows, weight in world().deal(tokens.lengths, self._budget):
            scores[rows.cpu()] += weight * self.model.scores(tokens.select(rows).to(trunk.device)).cpu()
        return world().sum(scores)


class ClassifierScorer:
    """Any other one-label sequence classifier (an encoder, say), by its own forward."""

    def __init__(self, model: PreTrainedModel, pad_id: int, tokens_per_microbatch: int) -> None:
        self._model = model
        self._model.config.pad_token_id = pad_id
        self._pad_id = pad_id
        self._budget = tokens_per_microbatch

    @torch.no_grad()
    def score(self, texts: Sequence[Sequence[int]]) -> Tensor:
        tokens = whole_texts(texts)
        scores = torch.zeros(len(texts))
        for rows, weight in world().deal(tokens.lengths, self._budget):
            part = tokens.select(rows).to(self._model.device)
            exists = torch.arange(part.ids.shape[1], device=part.ids.device)[None] < part.lengths[:, None]
            ids = part.ids.masked_fill(~exists, self._pad_id)
            found = self._model(input_ids=ids, attention_mask=exists.long()).logits[:, 0].float().cpu()
            scores[rows] += weight * found
        return world().sum(scores)
