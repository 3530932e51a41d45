"""A reward written in Python: any function from prompts and responses to numbers."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.config import RewardSource
from tandem.errors import InputError, RewardError
from tandem.rewards.answers import AnswerReader, Decode
from tandem.rewards.composition import Earned
from tandem.rewards.faults import Fault, sample, shown
from tandem.rewards.time_limit import OutOfTime, time_limit
from tandem.types import Rollout

ProcessRewards = Sequence[tuple[int, float]]
RewardFunction = Callable[
    [Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Sequence[float] | Sequence[ProcessRewards]
]
ONE_EACH = "it must return one answer for each response, in their order"
LATE_IN_A_ROW = 3


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


@dataclass(frozen=True)
class Late(Fault):
    """A call that was stopped for taking too long."""


class FunctionReward:
    """Calls `function(prompts, responses, rows)` with the prompts as the policy read them, the responses without
    special tokens, and every column of the prompts' rows; what it may answer stands in `answers.py`.
    """

    def __init__(self, function: RewardFunction, source: RewardSource, decode: Decode) -> None:
        self._function = function
        self._seconds = source.timeout_seconds
        self._reader = AnswerReader(f"reward function {source.function!r}", decode, source.on_error)

    def __call__(self, rollouts: Sequence[Rollout]) -> Earned:
        """Where a call for all responses goes wrong, each is tried by itself, so that those to blame are known.

        Raises RewardError where a response gets no score, unless those are to be skipped; and where the function
        answers for each response alone but not for all together.
        """
        answers = self._ask(rollouts)
        if not isinstance(answers, Fault):
            return self._reader.earned(answers, rollouts)
        alone = self._one_by_one(rollouts) if len(rollouts) > 1 else [answers]
        earned = self._reader.earned(alone, rollouts)
        if not self._reader.skips:
            raise RewardError(
                f"{self._reader.name} {answers.found}, though it answers for each of the {len(rollouts)} responses "
                f"alone, the first of them {sample(rollouts[0])}; {answers.allowed}."
            ) from answers.cause
        return earned

    def _ask(self, rollouts: Sequence[Rollout]) -> list[Any] | Fault:
        """An answer for each of the rollouts, or why the call gave none."""
        try:
            with time_limit(self._seconds):
                returned = self._function(
                    [rollout.prompt.text for rollout in rollouts],
                    [rollout.text for rollout in rollouts],
                    [rollout.prompt.row for rollout in rollouts],
                )
                if isinstance(returned, str | bytes | Mapping | set | frozenset):
                    return Fault(f"returned a {type(returned).__name__}, {shown(returned)},", ONE_EACH)
                if not hasattr(returned, "__iter__"):
                    return Fault(f"returned {shown(returned)}", ONE_EACH)
                answers = list(returned)
        except OutOfTime as late:
            found = f"did not answer within {self._seconds:g} s{self._place(late)}"
            return Late(found, "mend it or raise timeout_seconds")
        except (Exception, SystemExit) as error:
            return Fault(f"raised {shown(error, 300)}{self._place(error)}", "mend it", cause=error)
        if len(answers) != len(rollouts):
            return Fault(f"returned {len(answers)} scores for {len(rollouts)} responses", ONE_EACH)
        return answers

    def _one_by_one(self, rollouts: Sequence[Rollout]) -> Iterator[Any]:
        """The answer to each rollout alone, or its fault. After a few late ones in a row the rest counts as late:
        a function that hangs for all would take its limit for each."""
        late = 0
        for rollout in rollouts:
            if late < LATE_IN_A_ROW:
                answer = self._ask([rollout])
                late = late + 1 if isinstance(answer, Late) else 0
            yield answer if isinstance(answer, Fault) else answer[0]

    def _place(self, error: BaseException) -> str:
        """Where in the function's file an exception arose or, where it did not pass through that, where it did."""
        code = getattr(inspect.unwrap(self._function), "__code__", None)
        ours = str(Path(__file__).parent)
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
        own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
        return f" at {(own or frames)[-1].filename}:{(own or frames)[-1].lineno}" if frames else ""
