"""What goes to a reward server and what comes back, version 1 (docs/remote-rewards.md)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

from tandem.rewards.faults import shown
from tandem.types import Rollout

VERSION = 1
SHOWN_OF_BODY = 200
COME_AGAIN = frozenset({408, 425, 429})


class NoScoresError(Exception):
    """A response that holds no scores; `again` is whether another try may get some, and after how many seconds the
    server asked for it, where it did."""

    def __init__(self, found: str, again: bool, wait_seconds: float = 0.0) -> None:
        super().__init__(found)
        self.again = again
        self.wait_seconds = wait_seconds


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

    Raises NoScoresError where it holds none: to be asked again where the server was busy or broken or did not finish
    its answer, never where it says that the request is wrong or answers it with something else than scores.
    """
    text = shown(body.decode(errors="replace"), SHOWN_OF_BODY)
    if status in COME_AGAIN or status >= 500:
        raise NoScoresError(f"answered {status} with {text}", True, _wait_asked_for(headers.get("retry-after", "")))
    if 300 <= status < 400:
        raise NoScoresError(
            f"answered {status}, a redirect to {headers.get('location')!r}, which is not followed", False
        )
    if not 200 <= status < 300:
        raise NoScoresError(f"answered {status} with {text}", False)
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise NoScoresError(f"answered {status} with what is not JSON, {text}", True) from None
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise NoScoresError(f'answered without a list of "scores", {text}', False)
    if len(scores) != count:
        raise NoScoresError(f"returned {len(scores)} scores for {count} samples, {text}", False)
    return scores


def _wait_asked_for(retry_after: str) -> float:
    """Seconds of a Retry-After header, which holds those or a date; 0 where it holds neither."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    fits = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if fits else str(value)
