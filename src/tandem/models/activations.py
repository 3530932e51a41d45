"""What lower layers that several models share make of texts, kept so that each text goes through them once a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tandem.types import Tokens, rows_tried, split_by_tokens, whole_texts

Text = tuple[int, ...]


class Activations:
    """Activations [L, H] by text, and by text without its last token.

    What a causal model computes of a text does not depend on what follows. `lower` runs the layers over ids [B, L].
    """

    def __init__(self, lower: Callable[[Tensor], Tensor]) -> None:
        self._lower = lower
        self._held: dict[Text, Tensor] = {}
        self._sampled: dict[Text, Tensor] = {}
        self._expected: list[Text] = []

    def given(self, tokens: Tokens, tokens_per_microbatch: int) -> Tokens:
        """The tokens with their activations. Only texts that are not held, and were not sampled, are run."""
        texts = [tuple(row[:length]) for row, length in zip(tokens.ids.tolist(), tokens.lengths.tolist(), strict=True)]
        self._read([*self._expected, *texts], tokens_per_microbatch)
        found = [self._held[text] for text in texts]
        return replace(tokens, activations=torch.nn.utils.rnn.pad_sequence(found, batch_first=True))

    def expect(self, texts: Sequence[Text]) -> None:
        """What will be asked for, in place of all that was run: whoever asks next has it read with their own texts."""
        self._held, self._expected = {}, list(texts)

    def forget(self) -> None:
        """Hold nothing: a step must not depend on what was read before it."""
        self._held, self._sampled, self._expected = {}, {}, []

    def keep(self, texts: Sequence[Text], lower: Sequence[Tensor]) -> None:
        """What the layers made of whole texts while they were sampled, [L, H] each, in place of all sampled before."""
        pairs = zip(texts, lower, strict=True)
        self._sampled = {key: made for text, of in pairs for key, made in _by_text(text, of)}

    def _read(self, texts: Sequence[Text], tokens_per_microbatch: int) -> None:
        """Hold what the layers make of the texts, where what was kept from sampling may stand.

        Of texts that were sampled an eighth, the longest, is run all the same. Where that differs by more than
        rounding, nothing of what was kept stands.
        """
        new = dict.fromkeys(text for text in texts if text not in self._held)
        within = {text[:-1] for text in new}
        sampled = [text for text in new if text in self._sampled and text not in within]
        tried = sorted(sampled, key=len, reverse=True)[: rows_tried(len(sampled))]
        others = [text for text in new if text not in self._sampled and text not in within]
        self._run([*tried, *others], tokens_per_microbatch)
        if all(_agree(self._sampled[text], self._held[text]) for text in tried):
            self._held = self._sampled | self._held
        self._run([text for text in new if text not in self._held], tokens_per_microbatch)
        if sampled:
            self._sampled = {}
        self._expected = []

    def _run(self, texts: Sequence[Text], tokens_per_microbatch: int) -> None:
        if not texts:
            return
        tokens = whole_texts(texts)
        for rows in split_by_tokens(tokens.lengths, tokens_per_microbatch):
            for row, made in zip(rows.tolist(), self._lower(tokens.select(rows).ids), strict=True):
                self._held.update(_by_text(texts[row], made))


def _by_text(text: Text, lower: Tensor) -> list[tuple[Text, Tensor]]:
    """What was made of a text, perhaps with padding after it, and so of it without its last token."""
    return [(text, lower[: len(text)]), (text[:-1], lower[: len(text) - 1])]


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether activations [L, H] are the same at each token, but for as much as rounding does in many layers."""
    rounding = max(1e-3, 16 * torch.finfo(found.dtype).eps)
    off = (found.float() - expected.float()).norm(dim=1)
    return bool((off <= rounding * expected.float().norm(dim=1)).all())
