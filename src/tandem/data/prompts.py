"""Prompts for the joint stage."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tandem.data.rows import Row, missing_columns, read_rows
from tandem.errors import InputError
from tandem.text import Text, prompt_ids, prompt_text
from tandem.types import Prompt


@dataclass(frozen=True)
class PromptLimits:
    """Longest prompt, and what to do with a longer one: refuse or drop."""

    max_prompt_tokens: int
    too_long: str


def read_prompts(
    source: str,
    key: str,
    split: str,
    columns: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    limits: PromptLimits,
) -> tuple[list[Prompt], int]:
    """Rows with a `prompt` (text or conversation) as prompts, and how many were dropped for their length."""
    prompts, dropped = [], 0
    for row in read_rows(source, key, split, columns):
        if "prompt" not in row.columns:
            raise missing_columns(row, ["'prompt'"])
        prompt = make_prompt(row.text("prompt"), tokenizer, row)
        if len(prompt.ids) <= limits.max_prompt_tokens:
            prompts.append(prompt)
        elif limits.too_long == "drop":
            dropped += 1
        else:
            raise row.refuse(
                f"the prompt has {len(prompt.ids)} tokens and data.max_prompt_tokens is {limits.max_prompt_tokens}; "
                'raise it, or set data.too_long = "drop".'
            )
    if not prompts:
        raise InputError(
            f"{key} = {source!r}: every prompt is longer than data.max_prompt_tokens = {limits.max_prompt_tokens}; "
            "raise it."
        )
    return prompts, dropped


def make_prompt(text: Text, tokenizer: PreTrainedTokenizerBase, row: Row) -> Prompt:
    """A prompt as the policy reads it. Raises InputError where it has no tokens or ends as an answer."""
    if not isinstance(text, str) and text[-1]["role"] == "assistant":
        raise row.refuse("'prompt' ends with the assistant's turn, so there is nothing to answer; end it before.")
    with row.named():
        ids, read = prompt_ids(tokenizer, text), prompt_text(tokenizer, text)
    if not ids:
        raise row.refuse("'prompt' has no tokens; the tokenizer reads nothing in it.")
    messages = None if isinstance(text, str) else tuple(text)
    return Prompt(tuple(ids), read, messages, row.columns)


def prompt_batches(prompts: Sequence[Prompt], size: int, seed: int) -> Iterator[list[Prompt]]:
    """`size` prompts at a time for ever, each pass in a new random order; a batch may span two passes."""
    order_of = random.Random(seed)
    queue: list[Prompt] = []
    while True:
        while len(queue) < size:
            queue += order_of.sample(prompts, len(prompts))
        yield queue[:size]
        queue = queue[size:]
