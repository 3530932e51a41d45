"""A reward model: reads prompt and response as text, through its own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from tandem.errors import InputError
from tandem.models.scoring import Scorer
from tandem.rewards.composition import Earned
from tandem.text import answered_ids
from tandem.types import Rollout


class ModelReward:
    """The scores of a one-label sequence classifier."""

    def __init__(self, scorer: Scorer, tokenizer: PreTrainedTokenizerBase, name: str, context: int | None) -> None:
        self._scorer = scorer
        self._tokenizer = tokenizer
        self.name = name
        self._context = context

    @torch.no_grad()
    def __call__(self, rollouts: Sequence[Rollout]) -> Earned:
        """Raises InputError where a text is too long for the model or a score is not finite."""
        texts = [
            answered_ids(self._tokenizer, rollout.prompt.messages or rollout.prompt.text, rollout.text)
            for rollout in rollouts
        ]
        longest = max(len(text) for text in texts)
        if self._context is not None and longest > self._context:
            raise InputError(
                f"prompt and response are {longest} tokens to the reward model {self.name!r}, which reads "
                f"{self._context}; lower data.max_prompt_tokens or rollout.max_new_tokens."
            )
        scores = self._scorer.score(texts).cpu()
        if not torch.isfinite(scores).all():
            raise InputError(f"reward model {self.name!r} returned a score that is not finite.")
        return Earned(scores)
