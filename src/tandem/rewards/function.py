"""A reward written in Python: any function from prompts and responses to numbers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.errors import InputError
from tandem.types import Rollout

RewardFunction = Callable[[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Sequence[float]]


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
        raise InputError(f"reward function {name!r}: {error}.") from error
    except FileNotFoundError:
        raise InputError(f"reward function {name!r}: there is no file {source}.") from None
    except Exception as error:
        raise InputError(f"reward function {name!r}: importing {source} raised {error!r}.") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise InputError(f"reward function {name!r}: {source} has no function {attribute!r}.")
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
    special tokens, and every column of the prompts' rows."""

    def __init__(self, function: RewardFunction, name: str) -> None:
        self._function = function
        self.name = name

    def __call__(self, rollouts: Sequence[Rollout]) -> Tensor:
        """[B] float32. Raises InputError where the function raises or does not return one number a rollout."""
        try:
            answer = self._function(
                [rollout.prompt.text for rollout in rollouts],
                [rollout.text for rollout in rollouts],
                [rollout.prompt.row for rollout in rollouts],
            )
        except Exception as error:
            raise InputError(f"reward function {self.name!r} raised {error!r}.") from error
        return self._checked(answer, rollouts)

    def _checked(self, answer: Any, rollouts: Sequence[Rollout]) -> Tensor:
        try:
            scores = torch.tensor([float(score) for score in answer])
        except (TypeError, ValueError) as error:
            raise InputError(f"reward function {self.name!r} must return numbers, one a response: {error}.") from error
        if len(scores) != len(rollouts):
            raise InputError(
                f"reward function {self.name!r} returned {len(scores)} scores for {len(rollouts)} responses."
            )
        if not torch.isfinite(scores).all():
            bad = int((~torch.isfinite(scores)).nonzero()[0])
            raise InputError(
                f"reward function {self.name!r} returned {float(scores[bad])} for the response "
                f"{rollouts[bad].text[:80]!r} to {rollouts[bad].prompt.text[-80:]!r}; every score must be finite."
            )
        return scores
