"""What surrounds a run and is not as it needs: folders, earlier runs, reward functions, saved rollouts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence

from bad_input.case import Case, World

GOOD = "def reward(prompts, responses, rows):\n    return [0.5] * len(responses)\n"

# Name, the module's text, the function's name, and what must be said beside the function.
FUNCTIONS = [
    ("no such function", GOOD, "score", "has no function 'score'", "it has reward"),
    ("not a function", "reward = 3\n", "reward", "has no function 'reward'"),
    ("a syntax error", "def reward(:\n", "reward", "SyntaxError"),
    (
        "an import that is not there",
        "import frobnicate\n" + GOOD,
        "reward",
        "No module named 'frobnicate'",
        "install it",
    ),
    ("an error at import", "1 / 0\n" + GOOD, "reward", "ZeroDivisionError"),
    ("an exit at import", "raise SystemExit(0)\n", "reward", "SystemExit"),
    ("too few scores", GOOD.replace("[0.5] * len(responses)", "[0.5]"), "reward", "returned 1 scores for"),
    (
        "one score",
        GOOD.replace("[0.5] * len(responses)", "0.5"),
        "reward",
        "returned 0.5",
        "one answer for each response",
    ),
    (
        "nothing",
        GOOD.replace("[0.5] * len(responses)", "None"),
        "reward",
        "returned None",
        "one answer for each response",
    ),
    ("words", GOOD.replace("0.5", "'good'"), "reward", "must return numbers", "'good'"),
    ("an exception", GOOD.replace("[0.5]", "[{}['score']]"), "reward", "KeyError('score')"),
    ("other arguments", "def reward(responses):\n    return [0.5] * len(responses)\n", "reward", "TypeError"),
    ("ends beyond the response", GOOD.replace("0.5", "[(999, 0.5)]"), "reward", "(999, 0.5)", "must be a pair"),
]

# Name, a line of a rollouts file, and what must be said.
ROLLOUT = {
    "prompt": "the",
    "prompt_ids": [5],
    "response": "sea",
    "ids": [6, 7],
    "behaviour_logprobs": [-1.0, -1.0],
    "ended": True,
    "score": 1.0,
}
ROLLOUTS = [
    ("prompts", {"prompt": "the sea"}, "step_000001.jsonl:1", "no rollout", "prompt_ids"),
    ("a list", [1], "step_000001.jsonl:1", "no rollout"),
    ("words for ids", ROLLOUT | {"ids": ["a", "b"]}, "step_000001.jsonl:1", "no rollout"),
    (
        "too few log-probabilities",
        ROLLOUT | {"behaviour_logprobs": [-1.0]},
        "step_000001.jsonl:1",
        "2 ids, and not as many",
    ),
    ("a score of null", ROLLOUT | {"score": None}, "step_000001.jsonl:1", "no rollout"),
    ("one prompt", ROLLOUT, "holds 1 training rollouts of 1 prompts", "at least 10"),
]


def cases() -> Iterator[Case]:
    for name, text, function, *said in FUNCTIONS:
        yield Case(f"reward function: {name}", _function(text, function), ("reward function", f":{function}'", *said))
    for number in ("nan", "inf"):
        text = GOOD.replace("0.5", f"float('{number}')")
        said = ("the reward 'reward'", f"returned {number}", "to 'the sea'", "must be finite")
        yield Case(f"reward function: {number}", _function(text, "reward"), said)
    for name, given, *said in (
        ("no colon", "rewards.py", "give module:function or path/to/file.py:function"),
        ("no name", "rewards.py:", "give module:function"),
        ("no such file", "none.py:reward", "there is no file none.py", "mend the path"),
        ("no such module", "no.such.module:reward", "No module named", "install it"),
    ):
        yield Case(f"reward function: {name}", _named(given), (f"reward function {given!r}", *said))
    for name, row, *said in ROLLOUTS:
        yield Case(f"saved rollouts: {name}", _rollouts(json.dumps(row)), tuple(said))
    yield Case("saved rollouts: cut off", _rollouts(json.dumps(ROLLOUT)[:40]), ("step_000001.jsonl:1", "no rollout"))
    yield Case("saved rollouts: none", _no_rollouts, ("value.pretraining.rollouts", "cannot be read", "joint run"))
    yield Case("saved rollouts: an empty folder", _empty_rollouts, ("holds 0 training rollouts", "at least 10"))
    for name, directory, said in (
        ("below a file", "good.jsonl/run", "Not a directory"),
        ("in a file system that takes no folders", "/proc/run", "No such file"),
    ):
        for stage in ("sft", "reward", "ppo"):
            yield Case(f"{stage} folder: {name}", _directory(stage, directory), ("run.directory = ", "cannot be", said))
    yield Case("folder: a file", _directory("sft", "good.jsonl"), ("run.directory = ", "cannot be", "exists"))
    yield Case("folder: a full disk", _full, ("run.directory = ", "No space left on device"))
    yield Case("folder: an earlier run", _earlier, ("already holds a run", "--run.directory"))
    yield Case("a tracker that is not installed", _tracker, ("run.trackers names 'trackio'", "pip install trackio"))
    yield Case("more adapters than memory", _adapters, ("memory ran out", "adapters.rank = 2000000000 (lower it)"))


def _function(text: str, function: str) -> Callable[[World], Sequence[str]]:
    def make(world: World) -> Sequence[str]:
        name = f"rewards_{abs(hash(text))}.py"
        return _with_function(world, f"{world.write(name, text.encode())}:{function}")

    return make


def _named(given: str) -> Callable[[World], Sequence[str]]:
    return lambda world: _with_function(world, given)


def _with_function(world: World, function: str) -> list[str]:
    words = [word for word in world.words("ppo") if not word.startswith("--rewards")]
    return [*words, f"--rewards.0.function={function}", "--value.start=policy"]


def _rollouts(line: str) -> Callable[[World], Sequence[str]]:
    def make(world: World) -> Sequence[str]:
        (world.folder / "rollouts").mkdir()
        world.write("rollouts/step_000001.jsonl", line.encode())
        return _pretrained(world)

    return make


def _pretrained(world: World) -> list[str]:
    return [*world.words("ppo"), f"--value.pretraining.rollouts={world.folder / 'rollouts'}"]


def _no_rollouts(world: World) -> Sequence[str]:
    return _pretrained(world)


def _empty_rollouts(world: World) -> Sequence[str]:
    (world.folder / "rollouts").mkdir()
    return _pretrained(world)


def _directory(stage: str, directory: str) -> Callable[[World], Sequence[str]]:
    return lambda world: world.words(stage, directory=world.folder / directory)


def _full(world: World) -> Sequence[str]:
    """A device that is always full stands where the configuration would be written."""
    (world.folder / "run").mkdir()
    os.symlink("/dev/full", world.folder / "run" / ".config.toml.partial")
    return world.words("sft")


def _earlier(world: World) -> Sequence[str]:
    (world.folder / "run").mkdir()
    world.write("run/metrics.jsonl", b'{"step": 1}\n')
    return world.words("sft")


def _tracker(world: World) -> Sequence[str]:
    return [*world.words("sft"), '--run.trackers=["trackio"]']


def _adapters(world: World) -> Sequence[str]:
    return [*world.words("sft"), "--adapters.rank=2000000000"]
