"""A sample that got no score: why, and how a person is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tandem.errors import RewardError
from tandem.types import Rollout

SHOWN = 80


@dataclass(frozen=True)
class Fault:
    """Why samples have no score: what came instead, what is allowed, how many samples it befell together, and the
    exception behind it, if there is one."""

    found: str
    allowed: str
    together: int = 1
    cause: BaseException | None = None


def described(fault: Fault, name: str, rollout: Rollout) -> str:
    """One sentence about a fault of the reward `name`, whose first sample is the rollout."""
    more = f" and {fault.together - 1} more" if fault.together > 1 else ""
    return f"{name} {fault.found} for {sample(rollout)}{more}; {fault.allowed}"


def failure(fault: Fault, name: str, rollout: Rollout) -> RewardError:
    """The same as an error that ends the run."""
    error = RewardError(f'{described(fault, name, rollout)}, or set on_error = "skip" to leave such samples out.')
    error.__cause__ = fault.cause
    return error


def sample(rollout: Rollout) -> str:
    """A sample by the beginning of its response and of its prompt; of a conversation, that of the last message."""
    prompt = rollout.prompt
    asked = str(prompt.messages[-1].get("content", "")) if prompt.messages else prompt.text
    return f"the response {rollout.text[:SHOWN]!r} to {asked[:SHOWN]!r}"


def not_finite(number: float) -> Fault:
    return Fault(f"returned {number}", "every score must be finite")


def shown(value: Any, longest: int = SHOWN) -> str:
    """A value on one line, its beginning where it is long."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= longest else text[: longest - 3] + "..."
