"""The text that each token stands for, so that a reader sees words where a tokenizer sees bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_BROKEN = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """What one token wrote.

    `kind` says how: `text` as it stands in the response; `part` one token of several that make up the characters
    which the first of them shows; `special` something that is not in the response's text, such as an end.
    """

    text: str
    kind: Literal["text", "part", "special"]


def pieces_of(tokens: Sequence[str], response: str) -> list[Piece]:
    """Each token's piece of the response, one a token.

    A token decoded alone loses what only its neighbours tell: a character's other bytes, the space before a word. Both
    are found again by laying the tokens along the response. Where they do not fit it, tokens stay as they are.
    """
    found: list[Piece] = []
    at = 0
    while len(found) < len(tokens):
        here = len(found)
        token = tokens[here]
        if (end := _end_of(token, response, at)) is not None:
            found.append(Piece(response[at:end], "text"))
            at = end
        elif _BROKEN in token:
            width = _broken_width(tokens, here)
            joined = _joined(tokens, here, width, response, at)
            found.append(Piece(joined or _BROKEN, "text" if joined else "part"))
            found.extend([Piece("", "part")] * (width - 1))
            at += len(joined)
        else:
            found.append(Piece(token, "special"))
    return found


def _end_of(token: str, response: str, at: int) -> int | None:
    """Where the token ends in the response, white space before it counted in; None where it does not come next."""
    if not token:
        return None
    if response.startswith(token, at):
        return at + len(token)
    begins = at
    while begins < len(response) and response[begins].isspace():
        begins += 1
    return begins + len(token) if response.startswith(token, begins) else None


def _broken_width(tokens: Sequence[str], here: int) -> int:
    """How many tokens in a row, from this one on, are not whole characters."""
    width = 1
    while here + width < len(tokens) and _BROKEN in tokens[here + width]:
        width += 1
    return width


def _joined(tokens: Sequence[str], here: int, width: int, response: str, at: int) -> str:
    """The characters that some broken tokens write together: what lies before the next token that stands there.

    A piece of a character decodes to at least one replacement mark, so they write at most as many characters as they
    decode to apart.
    """
    most = sum(len(token) for token in tokens[here : here + width])
    following = tokens[here + width] if here + width < len(tokens) else ""
    end = response.find(following, at + 1, at + most + len(following)) if following else -1
    if end < 0 and len(response) - at <= most:
        end = len(response)
    return response[at:end] if end >= 0 else ""
