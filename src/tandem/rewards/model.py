"""A reward model: reads prompt and response as text, through its own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tandem.errors import InputError
from tandem.models.scoring import Scorer
from tandem.text import answered_ids
from tandem.types import Rollout


class ModelReward:
    """The scores of a one-label sequence classifier."""

    def __init__(self, scorer: Scorer, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self._scorer = scorer
        self._tokenizer = tokenizer
        self.name = name

    @torch.no_grad()
    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        """[B] float32. Raises InputError where a score is not finite."""
        texts = [
            answered_ids(self._tokenizer, rollout.prompt.messages or rollout.prompt.text, rollout.text)
            for rollout in rollouts
        ]
        scores = self._scorer.score(texts).cpu()
        if not torch.isfinite(scores).all():
            raise InputError(f"reward model {self.name!r} returned a score that is not finite.")
        return scores
