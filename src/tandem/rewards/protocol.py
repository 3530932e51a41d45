"""What goes to a reward server and what comes back, version 1 (docs/remote-rewards.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.rewards.server import NoAnswerError, json_of, shown_body
from tandem.types import Rollout

VERSION = 1


def request_body(rollouts: Sequence[Rollout]) -> bytes:
    """The samples as JSON; what JSON has no type for goes as its str()."""
    samples = [
        {
            "prompt": rollout.prompt.text,
            "messages": None if rollout.prompt.messages is None else list(rollout.prompt.messages),
            "response": rollout.text,
            "row": rollout.prompt.row,
        }
        for rollout in rollouts
    ]
    return json.dumps(_plain({"version": VERSION, "samples": samples}), allow_nan=False).encode()


def scores_of(status: int, headers: Mapping[str, str], body: bytes, count: int) -> list[Any]:
    """The scores of a response to a request of `count` samples, as the server gave them.

    Raises NoAnswerError where it holds none; where it answers with something else than scores, it would do so again.
    """
    answer, text = json_of(status, headers, body), shown_body(body)
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise NoAnswerError(f'answered without a list of "scores", {text}', False)
    if len(scores) != count:
        raise NoAnswerError(f"returned {len(scores)} scores for {count} samples, {text}", False)
    return scores


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    fits = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if fits else str(value)
