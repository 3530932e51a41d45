"""A reward written in Python: any function from prompts and responses to numbers."""

from __future__ import annotations

import bisect
import importlib
import importlib.util
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tandem.errors import InputError
from tandem.rewards.composition import Earned
from tandem.types import Rollout

ProcessRewards = Sequence[tuple[int, float]]
RewardFunction = Callable[
    [Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Sequence[float] | Sequence[ProcessRewards]
]


def load_function(name: str) -> RewardFunction:
    """`module:function` or `path/to/file.py:function`.

    Raises InputError where there is no such module, file or function, or importing it fails.
    """
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        raise InputError(f"reward function {name!r}: give module:function or path/to/file.py:function.")
    try:
        module = _import_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except ModuleNotFoundError as error:
        raise InputError(f"reward function {name!r}: {error}; install it, or give path/to/file.py:function.") from error
    except FileNotFoundError:
        raise InputError(
            f"reward function {name!r}: there is no file {source}, seen from {Path.cwd()}; mend the path."
        ) from None
    except (Exception, SystemExit) as error:
        raise InputError(f"reward function {name!r}: importing {source} raised {error!r}; mend it.") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        has = ", ".join(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise InputError(f"reward function {name!r}: {source} has no function {attribute!r}; it has {has or 'none'}.")
    return function


def _import_file(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


class FunctionReward:
    """Calls `function(prompts, responses, rows)` with the prompts as the policy read them, the responses without
    special tokens, and every column of the prompts' rows.

    It answers with a number for each response, or with a list of (end, reward) pairs for each: process rewards,
    each paid at the token that completes the first `end` characters of the response.
    """

    def __init__(
        self, function: RewardFunction, name: str, decode: Callable[[Sequence[int], Sequence[int]], str]
    ) -> None:
        self._function = function
        self.name = name
        self._decode = decode

    def __call__(self, rollouts: Sequence[Rollout]) -> Earned:
        """Raises InputError where the function raises or does not return what it should, one a rollout."""
        try:
            answers = list(
                self._function(
                    [rollout.prompt.text for rollout in rollouts],
                    [rollout.text for rollout in rollouts],
                    [rollout.prompt.row for rollout in rollouts],
                )
            )
        except Exception as error:
            raise InputError(f"reward function {self.name!r} raised {error!r}.") from error
        if len(answers) != len(rollouts):
            raise InputError(
                f"reward function {self.name!r} returned {len(answers)} scores for {len(rollouts)} responses."
            )
        if any(isinstance(answer, list | tuple) for answer in answers):
            return self._process(answers, rollouts)
        return Earned(
            torch.tensor([self._number(answer, rollout) for answer, rollout in zip(answers, rollouts, strict=True)])
        )

    def _number(self, answer: Any, rollout: Rollout) -> float:
        try:
            number = float(answer)
        except (TypeError, ValueError) as error:
            raise InputError(f"reward function {self.name!r} must return numbers, one a response: {error}.") from error
        if not math.isfinite(number):
            raise InputError(
                f"reward function {self.name!r} returned {number} for the response {rollout.text[:80]!r} to "
                f"{rollout.prompt.text[-80:]!r}; every score must be finite."
            )
        return number

    def _process(self, answers: Sequence[Any], rollouts: Sequence[Rollout]) -> Earned:
        process = torch.zeros(len(rollouts), max(len(rollout.ids) for rollout in rollouts))
        for row, (pairs, rollout) in enumerate(zip(answers, rollouts, strict=True)):
            for pair in pairs if isinstance(pairs, list | tuple) else [pairs]:
                process[row, self._token_at(pair, rollout)] += self._number(pair[1], rollout)
        return Earned(torch.zeros(len(rollouts)), process)

    def _token_at(self, pair: Any, rollout: Rollout) -> int:
        """Which token completes the first `end` characters of the response."""
        try:
            end = operator.index(pair[0])
            fits = len(pair) == 2 and 0 <= end <= len(rollout.text)
        except (TypeError, IndexError):
            fits = False
        if not fits:
            raise InputError(
                f"reward function {self.name!r} returned {pair!r} among its process rewards; each must be a pair "
                f"(end, reward) with 0 <= end <= {len(rollout.text)}, the length of the response."
            )
        ids = rollout.ids

        def whole_characters(last: int) -> int:
            return len(self._decode(rollout.prompt.ids, ids[: last + 1]).rstrip("\ufffd"))

        return min(bisect.bisect_left(range(len(ids)), end, key=whole_characters), len(ids) - 1)
