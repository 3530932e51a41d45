"""Worked examples for supervised fine-tuning and preference pairs for a reward model, as token ids."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tandem.config import RowsSection
from tandem.data.feed import Feed, InMemory, Item, Maker, SplitRows, notes_on
from tandem.data.rows import Row, Source, hold_out, missing_columns, read_rows
from tandem.data.stream import open_stream
from tandem.errors import BadRowError, InputError
from tandem.text import Text, answered_ids, conversation_ids, prompt_ids, taught_ids


@dataclass(frozen=True)
class Example:
    """A text and which of its tokens are to be learnt."""

    ids: tuple[int, ...]
    taught: tuple[bool, ...]


@dataclass(frozen=True)
class Answered:
    """A prompt and one answer to it as the reward model reads them; `prompt_length` tokens are the prompt's."""

    ids: tuple[int, ...]
    prompt_length: int

    @property
    def length(self) -> int:
        """Tokens of the answer alone."""
        return len(self.ids) - self.prompt_length


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; `prompt` tells which it is, `margin` by how much the chosen one is better."""

    prompt: str
    chosen: Answered
    rejected: Answered
    margin: float = 0.0


def read_examples(data: RowsSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> SplitRows[Example]:
    """`text`, or `prompt` and `completion`, or `messages`.

    Of a text every token is learnt, of the others the answer's tokens; EOS is learnt with them.
    """

    def make(row: Row, counts: Counter[str]) -> Example | None:
        with row.named():
            example = _example(row, tokenizer)
        return _fit_example(row, example, data, counts)

    maker = Maker(make, lambda row: row.place, data.bad_rows, f"data.max_tokens = {data.max_tokens}")
    split = _split(maker, data, seed, group=id, longest_in=lambda example: len(example.ids))
    if tokenizer.eos_token_id is None:
        split.notes.append(
            "The tokenizer has no EOS token, so no answer's end is learnt: answers will stop only at a length limit."
        )
    return split


def _split(
    maker: Maker[Item],
    data: RowsSection,
    seed: int,
    group: Callable[[Item], Any],
    longest_in: Callable[[Item], int],
) -> SplitRows[Item]:
    """What trains and what is held out, by the file or by the fraction that the recipe gives.

    Items of the same `group` go the same way and train side by side; `longest_in` tells an item's tokens.
    """
    counts: Counter[str] = Counter()
    source = Source(data.train, "data.train", data.split, data.columns)
    fraction = data.eval_fraction if data.eval is None else 0.0
    feed: Feed[Item]
    heldout: list[Item]
    if data.streaming:
        feed, heldout = open_stream(source, maker, data.buffer_rows, seed, fraction, counts)
    else:
        items, heldout = hold_out(maker.all_of(read_rows(source), source, counts), fraction, seed, group)
        feed = InMemory(items, partial(shuffled, grouped(items, group), seed))
    if data.eval is not None:
        source = Source(data.eval, "data.eval", data.eval_split, data.columns)
        heldout = maker.all_of(read_rows(source, streaming=data.streaming), source, counts)
    longest = data.max_tokens if data.streaming else max(longest_in(item) for item in [*feed.sample, *heldout])
    return SplitRows(feed, heldout, longest, counts, notes_on(counts, maker.limit))


def grouped(items: Sequence[Item], group: Callable[[Item], Any]) -> list[list[Item]]:
    """Items of the same group side by side."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(group(item), []).append(item)
    return list(groups.values())


def shuffled(groups: Sequence[Sequence[Item]], seed: int) -> Iterator[Item]:
    """Items for ever, each pass with its groups in a new random order; the items of a group stay together."""
    random = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(groups), generator=random).tolist():
            yield from groups[index]


def _example(row: Row, tokenizer: PreTrainedTokenizerBase) -> Example:
    columns = row.columns
    if "messages" in columns:
        messages = row.text("messages")
        if isinstance(messages, str) or not any(message["role"] == "assistant" for message in messages):
            raise row.refuse("'messages' must be a conversation in which the assistant speaks; add its turn.")
        ids, taught = conversation_ids(tokenizer, messages)
    elif "prompt" in columns and "completion" in columns:
        ids, taught = taught_ids(tokenizer, row.text("prompt"), _answer(row, "completion"))
    elif "text" in columns:
        text = row.text("text")
        if not isinstance(text, str):
            raise row.refuse("'text' is a conversation; name the column 'messages' (data.columns).")
        ids, taught = taught_ids(tokenizer, "", text)
    else:
        raise missing_columns(row, ["'text'", "'messages'", "'prompt' and 'completion'"])
    return Example(tuple(ids), tuple(taught))


def _answer(row: Row, column: str) -> str:
    """An answer as text; a conversation must be the assistant's one turn."""
    value = row.text(column)
    if isinstance(value, str):
        return value
    if len(value) != 1 or value[0]["role"] != "assistant":
        roles = ", ".join(turn["role"] for turn in value)
        raise row.refuse(f"{column!r} must be text or one turn of the assistant, and its turns are {roles}.")
    return _said(row, value[0])


def _fit_example(row: Row, example: Example, data: RowsSection, counts: Counter[str]) -> Example | None:
    length = len(example.ids)
    if not any(example.taught[1:]):
        raise row.refuse("has nothing to learn: the tokenizer reads no token in it that follows another.")
    if length <= data.max_tokens:
        return example
    if data.too_long == "truncate":
        cut = Example(example.ids[: data.max_tokens], example.taught[: data.max_tokens])
        if not any(cut.taught[1:]):
            raise row.refuse(f"cut to data.max_tokens = {data.max_tokens} it has nothing left to learn; raise it.")
        counts["truncated"] += 1
        return cut
    _drop_or_refuse(row, length, data, counts)
    return None


def _drop_or_refuse(row: Row, length: int, data: RowsSection, counts: Counter[str]) -> None:
    if data.too_long == "drop":
        counts["dropped"] += 1
        return
    raise InputError(
        f"{row.place}: has {length} tokens and data.max_tokens is {data.max_tokens}; raise it, or set data.too_long to "
        '"truncate" or "drop".'
    )


View = Callable[[PreTrainedTokenizerBase, Text, str], Answered]


def read_pairs(data: RowsSection, tokenizer: PreTrainedTokenizerBase, seed: int, view: View) -> SplitRows[Pair]:
    """`prompt`, `chosen` and `rejected`; where the two answers are conversations the prompt may be left out.

    A column `margin` says by how much the chosen answer is better.
    `view` says how a model meets an answer: `as_read` by a reward model, `as_written` by a policy. A pair that is too
    long and truncated loses tokens from the left of its prompt, so that the answers' ends stay.
    """

    def make(row: Row, counts: Counter[str]) -> Pair | None:
        with row.named():
            pair = _pair(row, tokenizer, view)
        return _fit_pair(row, pair, data, counts)

    maker = Maker(make, _prompt_of, data.bad_rows, f"data.max_tokens = {data.max_tokens}")
    return _split(
        maker,
        data,
        seed,
        group=lambda pair: pair.prompt,
        longest_in=lambda pair: max(len(pair.chosen.ids), len(pair.rejected.ids)),
    )


def _pair(row: Row, tokenizer: PreTrainedTokenizerBase, view: View) -> Pair:
    prompt, first, second = _compared(row)
    better, worse = (view(tokenizer, prompt, answer) for answer in (first, second))
    return _apart(row, Pair(repr(prompt), better, worse, _margin(row)))


def _prompt_of(row: Row) -> str:
    """Which prompt a pair answers, as `Pair.prompt` tells it; a row that cannot be used stands for itself."""
    try:
        return repr(_compared(row)[0])
    except BadRowError:
        return row.place


def _compared(row: Row) -> tuple[Text, str, str]:
    """The prompt, the chosen and the rejected answer."""
    for column in ("chosen", "rejected"):
        if column not in row.columns:
            raise missing_columns(row, ["'chosen' and 'rejected' (and, for plain text, 'prompt')"])
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if chosen == rejected:
        raise row.refuse(
            "'chosen' and 'rejected' are the same, so the row prefers nothing; mend it, or set data.bad_rows = "
            '"drop".'
        )
    if row.columns.get("prompt") is None:
        return _implicit_prompt(row, chosen, rejected)
    prompt = row.text("prompt")
    first, second = (_after_prompt(row, prompt, answer) for answer in (chosen, rejected))
    return prompt, first, second


def _margin(row: Row) -> float:
    """How much better the chosen answer is said to be; 0 where nothing is said. Raises BadRowError for no number."""
    given = row.columns.get("margin")
    if given is None or given == "":
        return 0.0
    try:
        margin = float(given)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if isinstance(given, bool) or not 0 <= margin < math.inf:
        raise row.refuse(f"'margin' is {given!r:.60}; allowed is a number from 0: by how much 'chosen' is better.")
    return margin


def _apart(row: Row, pair: Pair) -> Pair:
    """The pair, whose answers a model can tell apart. Raises BadRowError where they are the same tokens to it."""
    if pair.chosen.ids == pair.rejected.ids:
        raise row.refuse(
            "'chosen' and 'rejected' are the same tokens to the model, so the row prefers nothing; mend it, or set "
            'data.bad_rows = "drop".'
        )
    if min(len(pair.chosen.ids), len(pair.rejected.ids)) < 2:
        raise row.refuse("prompt and answer together are one token, so there is no answer to score; lengthen them.")
    return pair


def as_read(tokenizer: PreTrainedTokenizerBase, prompt: Text, answer: str) -> Answered:
    """As one text; tokens that it shares with its prompt alone are the prompt's, at least one."""
    ids, before = answered_ids(tokenizer, prompt, answer), prompt_ids(tokenizer, prompt)
    shared = 0
    while shared < min(len(before), len(ids) - 1) and before[shared] == ids[shared]:
        shared += 1
    return Answered(tuple(ids), max(1, shared))


def as_written(tokenizer: PreTrainedTokenizerBase, prompt: Text, answer: str) -> Answered:
    """As a policy writes it after the prompt, to its EOS; what comes before is the prompt's, at least one token."""
    ids, taught = taught_ids(tokenizer, prompt, answer)
    before = len(taught) - next((n for n, own in enumerate(reversed(taught)) if not own), len(taught))
    return Answered(tuple(ids), max(1, before))


def _after_prompt(row: Row, prompt: Text, answer: Text) -> str:
    """An answer given alone, as one turn, or as the whole conversation that begins with the prompt."""
    if isinstance(answer, str):
        return answer
    if not isinstance(prompt, str) and list(answer[: len(prompt)]) == list(prompt):
        answer = answer[len(prompt) :]
    if isinstance(prompt, str) and len(answer) == 2 and answer[0] == {"role": "user", "content": prompt}:
        answer = answer[1:]
    return _one_turn(row, answer)


def _one_turn(row: Row, turns: Sequence[Mapping[str, str]]) -> str:
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise row.refuse(
            "after the prompt, an answer must be one turn of the assistant, and is "
            f"{', '.join(turn['role'] for turn in turns) or 'nothing'}."
        )
    return _said(row, turns[0])


def _said(row: Row, turn: Mapping[str, str]) -> str:
    if not turn["content"].strip():
        raise row.refuse("an answer is empty: its assistant's turn has no content; write it, or drop the row.")
    return turn["content"]


def _implicit_prompt(row: Row, chosen: Text, rejected: Text) -> tuple[Text, str, str]:
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise row.refuse(
            "'prompt' is missing or null; only conversations may leave it to what both answers begin with."
        )
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise row.refuse("'chosen' and 'rejected' do not begin with the same turns, so they have no common prompt.")
    return chosen[:shared], _one_turn(row, chosen[shared:]), _one_turn(row, rejected[shared:])


def _fit_pair(row: Row, pair: Pair, data: RowsSection, counts: Counter[str]) -> Pair | None:
    longest = max(len(pair.chosen.ids), len(pair.rejected.ids))
    if longest <= data.max_tokens:
        return pair
    if data.too_long == "truncate":
        chosen, rejected = (_cut(answered, data.max_tokens) for answered in (pair.chosen, pair.rejected))
        cut = _apart(row, Pair(pair.prompt, chosen, rejected, pair.margin))
        counts["truncated"] += 1
        return cut
    _drop_or_refuse(row, longest, data, counts)
    return None


def _cut(answered: Answered, limit: int) -> Answered:
    """Without what is too much at the left, of the answer too where it alone is longer than the limit."""
    excess = max(0, len(answered.ids) - limit)
    return Answered(answered.ids[excess:], max(1, answered.prompt_length - excess))
