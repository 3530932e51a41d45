"""Rewards that check instead of judge: mathematics by math-verify, and the form of an answer by rules.

Each is a reward function for a recipe: `function = "tandem.rewards.verifiable:math_answer"`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from tandem.errors import InputError

_FINAL = re.compile(r"####\s*(.+?)\s*$", re.DOTALL)
_FINAL_LINE = re.compile(r"(?:^|\n)####[ \t]*\S[^\n]*\s*$")
_BOXED = re.compile(r"\\boxed\s*\{")


def math_answer(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """1 where the response's answer is mathematically equal to the row's `answer`, else 0.

    Of an answer in the manner of GSM8K ("... #### 72"), what follows the last #### counts, in the row and in the
    response; else the last expression that math-verify finds, boxed ones first. Raises ValueError where a row has no
    `answer`, or none that can be read as mathematics.
    """
    del prompts
    return [_equal(_known(row), response) for response, row in zip(responses, rows, strict=True)]


def final_line(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """1 where the response ends in a line `#### answer`, and has no other such line, else 0."""
    del prompts, rows
    return [float(bool(_FINAL_LINE.search(text)) and text.count("####") == 1) for text in responses]


def one_box(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    r"""1 where the response has one \boxed{answer}, else 0."""
    del prompts, rows
    return [float(len(_BOXED.findall(text)) == 1) for text in responses]


def _known(row: Mapping[str, Any]) -> str:
    answer = row.get("answer")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise ValueError(f"the row has no 'answer' to check against: its columns are {', '.join(row)}")
    return _after_mark(str(answer))


def _after_mark(text: str) -> str:
    """What follows the last ####, or all of it where there is none."""
    found = _FINAL.search(text[max(text.rfind("####"), 0) :])
    return found[1] if found else text


def _equal(known: str, response: str) -> float:
    expected = _parsed(known)
    if not expected:
        raise ValueError(f"the row's answer {known[:80]!r} cannot be read as mathematics")
    return float(_library().verify(list(expected), list(_parsed(_after_mark(response)))))


@lru_cache(maxsize=4096)
def _parsed(text: str) -> tuple[Any, ...]:
    """What math-verify reads in a text; a number that stands alone is read as it is."""
    library = _library()
    found = library.parse(text) or library.parse(f"${text}$")
    return tuple(found)


@lru_cache(maxsize=1)
def _library() -> Any:
    try:
        import math_verify
    except ModuleNotFoundError:
        raise InputError("checking mathematics needs math-verify: pip install 'tandem-rlhf[math]'.") from None
    return math_verify
