"""Prompts for the joint stage."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from tandem.config import PromptSourceSection, PromptsSection
from tandem.data.feed import Feed, InMemory, Maker, SplitRows, notes_on
from tandem.data.rows import Row, Source, missing_columns, read_rows
from tandem.data.stream import open_stream
from tandem.errors import InputError
from tandem.text import Text, prompt_ids, prompt_text
from tandem.types import Prompt


def read_prompts(data: PromptSourceSection, tokenizer: PreTrainedTokenizerBase, counts: Counter[str]) -> list[Prompt]:
    """Rows with a `prompt` (text or conversation) as prompts; those that are left out are counted."""
    source = Source(data.prompts, "data.prompts", data.split, data.columns)
    return prompt_maker(data, tokenizer).all_of(read_rows(source), source, counts)


def split_prompts(data: PromptsSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> SplitRows[Prompt]:
    """Prompts to train on and held-out ones."""
    counts, heldout_counts = Counter[str](), Counter[str]()
    maker = prompt_maker(data, tokenizer)
    feed: Feed[Prompt]
    heldout: list[Prompt]
    if data.streaming:
        source = Source(data.prompts, "data.prompts", data.split, data.columns)
        feed, heldout = open_stream(source, maker, data.buffer_rows, seed, 0.0, counts)
    else:
        prompts = read_prompts(data, tokenizer, counts)
        feed, heldout = InMemory(prompts, partial(shuffled_prompts, prompts, seed)), []
    if data.eval_prompts is not None:
        source = Source(data.eval_prompts, "data.eval_prompts", data.eval_split, data.columns)
        heldout = maker.all_of(read_rows(source, streaming=data.streaming), source, heldout_counts)
    longest = max(len(prompt.ids) for prompt in [*feed.sample, *heldout])
    return SplitRows(
        feed,
        heldout,
        data.max_prompt_tokens if data.streaming else longest,
        counts,
        notes_on(counts, maker.limit, "data.prompts: ") + notes_on(heldout_counts, maker.limit, "data.eval_prompts: "),
    )


def prompt_maker(data: PromptSourceSection, tokenizer: PreTrainedTokenizerBase) -> Maker[Prompt]:
    """How a row becomes a prompt that is not too long."""

    def make(row: Row, counts: Counter[str]) -> Prompt | None:
        if "prompt" not in row.columns:
            raise missing_columns(row, ["'prompt'"])
        prompt = make_prompt(row.text("prompt"), tokenizer, row)
        if len(prompt.ids) <= data.max_prompt_tokens:
            return prompt
        if data.too_long == "drop":
            counts["dropped"] += 1
            return None
        raise InputError(
            f"{row.place}: the prompt has {len(prompt.ids)} tokens and data.max_prompt_tokens is "
            f'{data.max_prompt_tokens}; raise it, or set data.too_long = "drop".'
        )

    return Maker(make, lambda row: row.place, data.bad_rows, f"data.max_prompt_tokens = {data.max_prompt_tokens}")


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


def shuffled_prompts(prompts: Sequence[Prompt], seed: int) -> Iterator[Prompt]:
    """Prompts for ever, each pass in a new random order."""
    order_of = random.Random(seed)
    while True:
        yield from order_of.sample(prompts, len(prompts))
