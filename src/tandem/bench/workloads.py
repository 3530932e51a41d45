"""What is timed: a model, a batch, and how it is trained."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Self

Precision = Literal["float32", "bfloat16"]
Sharing = Literal["separate", "adapters", "head"]


@dataclass(frozen=True)
class Workload:
    """One joint step, or the decoding of one batch.

    `sequences` prompts of `prompt_tokens` each are answered with exactly `response_tokens`. `model` is a directory, a
    hub id or the name of a shape (tandem.bench.models). `upper_layers` are those that adapters stand on, all if None;
    `compiled` says whether Tandem compiles its layers before anything is timed, as it does in a long run on a CPU.
    """

    name: str
    model: str
    sequences: int
    prompt_tokens: int
    response_tokens: int
    precision: Precision
    epochs: int = 1
    sharing: Sharing = "separate"
    upper_layers: int | None = None
    tokens_per_microbatch: int = 4096
    device: str = "cpu"
    threads: int | None = None
    compiled: bool = False
    seed: int = 0

    @property
    def response_total(self) -> int:
        """Response tokens in one step."""
        return self.sequences * self.response_tokens

    def at(self, model: Path) -> Self:
        """The same on the model in this directory."""
        return replace(self, model=str(model))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))
