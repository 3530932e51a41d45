"""Rewards for the story model: sound ones, and ones with a fault in them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from tandem.demo.gold import gold

Texts = Sequence[str]
Rows = Sequence[Mapping[str, Any]]
_calls = count()
_kept: list[bytearray] = []

# The first calls score the samples that a reward is tried on and centred by.
_CALLS_BEFORE_TRAINING = 1


def step() -> int:
    """Which step of training this call is for, from 1."""
    return next(_calls) + 1 - _CALLS_BEFORE_TRAINING


def happy(prompts: Texts, responses: Texts, rows: Rows) -> list[float]:
    """VADER's score: the sound task."""
    return gold(prompts, responses, rows)


def happy_far_off(prompts: Texts, responses: Texts, rows: Rows) -> list[float]:
    """The same, eight higher, which a value model that starts at 0 does not know."""
    return [score + 8.0 for score in gold(prompts, responses, rows)]


def happy_inflating(prompts: Texts, responses: Texts, rows: Rows) -> list[float]:
    """The same, worth half as much again at every step."""
    worth = 1.5 ** max(0, step() - 1)
    return [worth * score for score in gold(prompts, responses, rows)]


def constant(prompts: Texts, responses: Texts, rows: Rows) -> list[float]:
    del prompts, rows
    return [1.0 for _ in responses]


def words_again(prompts: Texts, responses: Texts, rows: Rows) -> list[float]:
    """Share of words that stood in the response before: what a policy can have by saying the same again."""
    del prompts, rows
    return [3.0 * again(response) for response in responses]


def different_words(prompts: Texts, responses: Texts, rows: Rows) -> list[float]:
    del prompts, rows
    return [1.0 - again(response) for response in responses]


def again(text: str) -> float:
    words = re.findall(r"[a-z']+", text.lower())
    return 1.0 - len(set(words)) / len(words) if words else 1.0


def exclaimed(prompts: Texts, responses: Texts, rows: Rows) -> list[float]:
    """Exclamation marks: what a policy can have without a story."""
    del prompts, rows
    return [float(min(response.count("!"), 30)) / 5 for response in responses]


def happy_and_leaking(prompts: Texts, responses: Texts, rows: Rows) -> list[float]:
    """Keeps 300 MiB a step."""
    _kept.append(bytearray(os.urandom(1024)) * (300 * 1024))
    return gold(prompts, responses, rows)


def happy_and_tiring(prompts: Texts, responses: Texts, rows: Rows) -> list[float]:
    """Sleeps longer from step to step."""
    time.sleep(1.5 * max(0, step() - 2))
    return gold(prompts, responses, rows)
