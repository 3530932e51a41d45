"""A reward model: reads prompt and response as text, through its own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from tandem.models.scoring import Scorer
from tandem.rewards.answers import Answer, OnError, side_by_side
from tandem.rewards.composition import Earned
from tandem.rewards.faults import Fault, failure
from tandem.text import answered_ids
from tandem.types import Rollout


class ModelReward:
    """The scores of a one-label sequence classifier."""

    def __init__(
        self, scorer: Scorer, tokenizer: PreTrainedTokenizerBase, name: str, context: int | None, on_error: OnError
    ) -> None:
        self._scorer = scorer
        self._tokenizer = tokenizer
        self.name = f"reward model {name!r}"
        self._context = context
        self._skips = on_error == "skip"

    @torch.no_grad()
    def __call__(self, rollouts: Sequence[Rollout]) -> Earned:
        """Raises RewardError where a text is too long for the model, unless such samples are to be skipped."""
        texts = [
            answered_ids(self._tokenizer, rollout.prompt.messages or rollout.prompt.text, rollout.text)
            for rollout in rollouts
        ]
        faults = [self._too_long(text) for text in texts]
        for fault, rollout in zip(faults, rollouts, strict=True):
            if fault is not None and not self._skips:
                raise failure(fault, self.name, rollout)
        fitting = [text for text, fault in zip(texts, faults, strict=True) if fault is None]
        scores = iter(self._scorer.score(fitting).tolist() if fitting else [])
        answers = [Answer(next(scores)) if fault is None else fault for fault in faults]
        return side_by_side(answers, rollouts, self.name, self._skips)

    def _too_long(self, text: Sequence[int]) -> Fault | None:
        if self._context is None or len(text) <= self._context:
            return None
        return Fault(
            f"reads {self._context} tokens and was given {len(text)}",
            "lower data.max_prompt_tokens or rollout.max_new_tokens",
        )
