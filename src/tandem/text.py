"""How prompts and answers become token ids: plain text as it is, conversations by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tandem.errors import ConversationError, InputError, reason_of

Message = Mapping[str, str]
Text = str | Sequence[Message]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], reply_follows: bool) -> str:
    """A conversation as text; `reply_follows` opens the assistant's next turn.

    Raises InputError where the tokenizer has no chat template, ConversationError where the template refuses the
    conversation.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so it cannot read conversations "
            "(lists of role and content); give plain text, or a model with a chat template."
        )
    try:
        turns = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=reply_follows))
    except Exception as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ConversationError(
            f"the chat template of {tokenizer.name_or_path!r} refuses this conversation ({roles}): {reason_of(error)}; "
            "change its turns, or take a model with another template."
        ) from error


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> str:
    """What the policy reads, as text."""
    return prompt if isinstance(prompt, str) else render(tokenizer, prompt, reply_follows=True)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """What the policy reads, as ids; an EOS that the tokenizer appends to plain text is taken off."""
    if not isinstance(prompt, str):
        return _ids(tokenizer, render(tokenizer, prompt, reply_follows=True), special=False)
    ids = _ids(tokenizer, prompt, special=True)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def answered_ids(tokenizer: PreTrainedTokenizerBase, prompt: Text, answer: str) -> list[int]:
    """Prompt and answer as one text for a reward model."""
    if isinstance(prompt, str):
        return _ids(tokenizer, prompt + answer, special=True)
    conversation = [*prompt, {"role": "assistant", "content": answer}]
    return _ids(tokenizer, render(tokenizer, conversation, reply_follows=False), special=False)


def taught_ids(tokenizer: PreTrainedTokenizerBase, prompt: Text, answer: str) -> tuple[list[int], list[bool]]:
    """Ids of prompt, answer and EOS, and which of them are the answer's (EOS included)."""
    if not isinstance(prompt, str):
        return conversation_ids(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
    if not prompt:
        before, after = bos_ids(tokenizer), _ids(tokenizer, answer, special=False)
    else:
        before = prompt_ids(tokenizer, prompt)
        after = _continued(tokenizer, prompt, before, answer, special=True)
    after += eos_ids(tokenizer)
    return before + after, [False] * len(before) + [True] * len(after)


def _continued(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], following: str, special: bool
) -> list[int]:
    """Ids of a text that follows another, as they are when both are read together.

    Some tokenizers put a space before every text, which belongs to the first alone. Where the two read together
    do not begin with the first's ids, the second is read by itself.
    """
    together = _ids(tokenizer, text + following, special)
    if together and together[-1] == tokenizer.eos_token_id and special and not following.endswith(tokenizer.eos_token):
        together = together[:-1]
    return together[len(ids) :] if together[: len(ids)] == ids else _ids(tokenizer, following, special=False)


def conversation_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which of them are the assistant's to say.

    Raises InputError where the template rewrites earlier turns, so that turns cannot be told apart.
    """
    ids: list[int] = []
    taught: list[bool] = []
    so_far = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened = render(tokenizer, messages[:index], reply_follows=True) if index else ""
        closed = render(tokenizer, messages[: index + 1], reply_follows=False)
        if not opened.startswith(so_far) or not closed.startswith(opened):
            raise InputError(
                f"the chat template of {tokenizer.name_or_path!r} rewrites earlier turns of a conversation, so "
                "what the assistant said cannot be told from the rest; give prompt and completion instead."
            )
        for text, is_taught in ((opened[len(so_far) :], False), (closed[len(opened) :], True)):
            part = _continued(tokenizer, so_far, ids, text, special=False)
            ids += part
            taught += [is_taught] * len(part)
            so_far += text
    return ids, taught


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The id that a text without a prompt begins with, if the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def eos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int], Sequence[int]], str]:
    """From a prompt's ids and a response's to the response's text, without special tokens.

    Decoded behind its prompt, so that a space between the two is the response's and is kept.
    """

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    def response_text(prompt: Sequence[int], response: Sequence[int]) -> str:
        before, whole = decode(prompt), decode([*prompt, *response])
        return whole[len(before) :] if whole.startswith(before) else decode(response)

    return response_text
