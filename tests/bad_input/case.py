"""A case of bad input, and what cases are made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

GOOD_ROWS = {
    "sft": b'{"prompt": "the sea", "completion": " was quiet"}\n{"prompt": "a film", "completion": " is slow"}\n',
    "reward": b'{"prompt": "the sea", "chosen": " was good", "rejected": " was bad"}\n'
    b'{"prompt": "a film", "chosen": " was good", "rejected": " was bad"}\n',
    "ppo": b'{"prompt": "the sea"}\n{"prompt": "a film"}\n',
    "eval": b'{"prompt": "the sea"}\n{"prompt": "a film"}\n',
}
SOURCE = {"sft": "data.train", "reward": "data.train", "ppo": "data.prompts", "eval": "data.prompts"}
MODEL = {"sft": "model", "reward": "model", "ppo": "policy.model", "eval": "model"}


@dataclass(frozen=True)
class World:
    """Where a case makes its files, and the good models beside it."""

    folder: Path
    model: Path
    reward_model: Path

    def write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def words(self, stage: str, **replaced: object) -> list[str]:
        """A command line that would run, but for what is replaced: `model`, `data`, `reward`, `baseline`,
        `directory`."""
        data = replaced.get("data") or self.write("good.jsonl", GOOD_ROWS[stage])
        given = {
            MODEL[stage]: replaced.get("model", self.model),
            SOURCE[stage]: data,
            "run.directory": replaced.get("directory", self.folder / "run"),
        }
        if stage == "ppo":
            given["rewards.0.model"] = replaced.get("reward", self.reward_model)
            given |= {"steps": 1, "rollout.max_new_tokens": 4, "rollout.prompts_per_step": 2}
        if stage == "eval":
            given |= {"baseline": replaced.get("baseline", self.model), "rollout.max_new_tokens": 4}
            given["rewards.0.model"] = replaced.get("reward", self.reward_model)
        return [stage, *(f"--{key}={value}" for key, value in given.items())]


@dataclass(frozen=True)
class Case:
    """`make` prepares the files and gives the command line; the message must hold all of `said`."""

    name: str
    make: Callable[[World], Sequence[str]]
    said: tuple[str, ...]
