"""What lower layers that several models share make of texts, kept so that each text goes through them once a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tandem.types import TRIED_SHARE, Tokens, split_by_tokens

Text = tuple[int, ...]


class Activations:
    """Activations [L, H] by text, and by text without its last token.

    What a causal model computes of a text does not depend on what follows. `lower` runs the layers over ids [B, L].
    """

    def __init__(self, lower: Callable[[Tensor], Tensor]) -> None:
        self._lower = lower
        self._held: dict[Text, Tensor] = {}
        self._sampled: dict[Text, Tensor] = {}

    def given(self, tokens: Tokens, tokens_per_microbatch: int) -> Tokens:
        """The tokens with their activations. Only texts that were neither run since `forget` nor sampled are run."""
        texts = [tuple(row[:length]) for row, length in zip(tokens.ids.tolist(), tokens.lengths.tolist(), strict=True)]
        self._take_sampled(tokens, texts, tokens_per_microbatch)
        new = [row for row, text in enumerate(texts) if text not in self._held]
        self._run(tokens, texts, new, tokens_per_microbatch)
        found = [self._held[text] for text in texts]
        return replace(tokens, activations=torch.nn.utils.rnn.pad_sequence(found, batch_first=True))

    def forget(self) -> None:
        """Hold nothing of what was run or taken: a step must not depend on what was read before it.

        What was sampled and not asked for since is still there.
        """
        self._held = {}

    def keep(self, texts: Sequence[Sequence[int]], lower: Sequence[Tensor]) -> None:
        """What the layers made of whole texts while they were sampled, [L, H] each, in place of all sampled before."""
        pairs = zip(texts, lower, strict=True)
        self._sampled = {key: made for text, of in pairs for key, made in _by_text(tuple(text), of)}

    def _take_sampled(self, tokens: Tokens, texts: Sequence[Text], tokens_per_microbatch: int) -> None:
        """Let what was kept from sampling stand, if any of these texts was sampled.

        An eighth of those, the longest, is run all the same. Where that differs by more than rounding, nothing stands.
        """
        rows = [row for row, text in enumerate(texts) if text in self._sampled and text not in self._held]
        if not rows:
            return
        longest_first = sorted(rows, key=lambda row: len(texts[row]), reverse=True)
        tried = longest_first[: -(-len(rows) // TRIED_SHARE)]
        self._run(tokens, texts, tried, tokens_per_microbatch)
        if all(_agree(self._sampled[texts[row]], self._held[texts[row]]) for row in tried):
            self._held = self._sampled | self._held
        self._sampled = {}

    def _run(self, tokens: Tokens, texts: Sequence[Text], rows: Sequence[int], tokens_per_microbatch: int) -> None:
        """Run the layers over some of the texts."""
        chosen = torch.tensor(rows, dtype=torch.int64)
        for group in split_by_tokens(tokens.lengths.cpu()[chosen], tokens_per_microbatch):
            together = chosen[group]
            for row, made in zip(together.tolist(), self._lower(tokens.select(together).ids), strict=True):
                self._held.update(_by_text(texts[row], made))


def _by_text(text: Text, lower: Tensor) -> list[tuple[Text, Tensor]]:
    """What was made of a text, perhaps with padding after it, and so of it without its last token."""
    return [(text, lower[: len(text)]), (text[:-1], lower[: len(text) - 1])]


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether activations [L, H] are the same at each token, but for as much as rounding does in many layers."""
    rounding = max(1e-3, 16 * torch.finfo(found.dtype).eps)
    off = (found.float() - expected.float()).norm(dim=1)
    return bool((off <= rounding * expected.float().norm(dim=1)).all())
