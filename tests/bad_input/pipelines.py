"""Pipelines that cannot be: sections that do not go together, and slips of later stages, told at the very start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bad_input.case import GOOD_ROWS, Case, World

# Name, what is set beside a pipeline of SFT, reward model and PPO that would run, and what must be said.
TABLE = [
    ("a model for sft", ["--sft.model=m"], "sft.model: a stage starts from", "leave it out"),
    ("a model for the policy", ["--ppo.policy.model=m"], "ppo.policy.model: a stage starts from", "leave it out"),
    ("a model for the reward model", ["--reward.model=m"], "reward.model: a stage starts from", "leave it out"),
    ("a folder for a stage", ["--ppo.run.directory=r"], "ppo.run.directory: a stage is kept in", "leave it out"),
    ("two that align", ["--dpo.data.train=p.jsonl"], "ppo and dpo are both there", "leave one out"),
    (
        "a reward model that nothing uses",
        ["--ppo.rewards.0.function=f.py:g", "--ppo.value.start=policy"],
        "reward has no effect here",
        "or leave reward out",
    ),
    ("adapters of no adapter", ["--ppo.sharing.mode=adapters"], "add a section [reward.adapters]"),
    ("nothing held out", ["--reward.data.eval_fraction=0.0"], "reward.data holds no pairs out", "reward.data.eval"),
    ("a floor above 1", ["--accuracy_floor=80"], "accuracy_floor = 80", "less than or equal to 1"),
    ("a floor in words", ["--accuracy_floor=high"], "accuracy_floor = 'high'", "valid number"),
    ("fewer than no samples", ["--samples=-1"], "samples = -1", "greater than or equal to 0"),
    ("a stage that is none", ["--rlhf.steps=3"], "rlhf = ", "not a known key"),
    ("a setting of a stage at the top", ["--policy.lr=1e-6"], "policy = ", "did you mean ppo.policy"),
    ("a slip in a stage", ["--ppo.polcy.lr=1e-6"], "ppo.polcy = ", "did you mean ppo.policy"),
    ("a stage that is a text", ["--sft=yes"], "sft = 'yes'", "must be a section", "[sft]"),
    ("no data for a stage", ["--sft.epochs=2", "--sft.data={}"], "sft.data.train is missing"),
    ("what a stage refuses", ["--ppo.kl.target=1", "--ppo.kl.coefficient=0"], "ppo: kl.target adapts kl.coefficient"),
    ("prompts that are not there", ["--ppo.data.prompts=none.jsonl"], "[ppo] data.prompts", "none.jsonl"),
    ("pairs that are not there", ["--reward.data.train=none.jsonl"], "[reward] data.train", "none.jsonl"),
    (
        "a reward that is not there",
        ["--ppo.rewards.0.weight=1.0", "--ppo.rewards.1.function=none.py:f"],
        "[ppo] reward function 'none.py:f'",
        "there is no file none.py",
    ),
    ("responses too long to read", ["--ppo.rollout.max_new_tokens=256"], "[ppo] prompts have up to", "lower"),
    (
        "more layers than there are",
        ["--ppo.sharing.mode=adapters", "--ppo.adapters.upper_layers=99", "--reward.adapters.rank=4"],
        "= 99",
        "3 layers",
    ),
    ("a base that is not there", ["--model=./none"], "model = './none'", "there is no such folder"),
    ("a folder below a file", ["--run.directory=good_sft.jsonl/run"], "run.directory = ", "Not a directory"),
]


def cases() -> Iterator[Case]:
    for name, words, *said in TABLE:
        yield Case(f"pipeline: {name}", _with(words), tuple(said))
    yield Case("pipeline: nothing to do", _bare, ("no stage aligns the model", "[ppo] or [dpo]"))
    yield Case("pipeline: no reward", _no_reward, ("ppo.rewards names no model", "no section [reward]"))
    yield Case("pipeline: rows of another kind", _other_rows, ("[reward] ", "'chosen'"))
    yield Case("pipeline: an earlier run", _earlier, ("already holds a run", "--resume", "--run.directory"))
    yield Case("pipeline: going on with nothing", _nothing, ("holds no run that can go on", "run.json"))
    yield Case("pipeline: going on with one stage", _one_stage, ("run of another stage", "tandem sft --resume"))


def words_of(world: World, *more: str) -> list[str]:
    """A pipeline that would run."""
    files = {stage: world.write(f"good_{stage}.jsonl", rows) for stage, rows in GOOD_ROWS.items()}
    return [
        "pipeline",
        f"--model={world.model}",
        f"--sft.data.train={files['sft']}",
        f"--reward.data.train={files['reward']}",
        f"--ppo.data.prompts={files['ppo']}",
        f"--run.directory={world.folder / 'run'}",
        *more,
    ]


def _with(words: Sequence[str]) -> Callable[[World], Sequence[str]]:
    return lambda world: words_of(world, *words)


def _bare(world: World) -> Sequence[str]:
    return ["pipeline", f"--model={world.model}"]


def _no_reward(world: World) -> Sequence[str]:
    return [word for word in words_of(world) if "--reward" not in word]


def _other_rows(world: World) -> Sequence[str]:
    return words_of(world, f"--reward.data.train={world.folder / 'good_sft.jsonl'}")


def _earlier(world: World) -> Sequence[str]:
    (world.folder / "run" / "sft").mkdir(parents=True)
    world.write("run/sft/metrics.jsonl", b'{"step": 1}\n')
    return words_of(world)


def _nothing(world: World) -> Sequence[str]:
    return ["pipeline", "--resume", str(world.folder)]


def _one_stage(world: World) -> Sequence[str]:
    world.write("run.json", b'{"stage": "sft", "inputs": {}, "made_with": {}}')
    return ["pipeline", "--resume", str(world.folder)]
