"""Time joint steps in this process, by `tandem.bench.timed`: WORKLOAD REWARD_MODEL STEPS, JSON out.

The first step is left out: it allocates, and nobody waits for it twice.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tandem.bench.counting import counting
from tandem.bench.decoding import fixed_length_generator, random_prompts
from tandem.bench.workloads import Workload
from tandem.config import Gather, PpoConfig
from tandem.rollout import InStep
from tandem.run import Progress
from tandem.run.clock import Clock
from tandem.run.machine import machine_record
from tandem.stages.joint_setup import JointStage, build
from tandem.stages.state import JointState, start_state
from tandem.stages.step import judge, learn
from tandem.types import Prompt
from tandem.world import world


def recipe(workload: Workload, reward_model: str, prompts: Path) -> PpoConfig:
    """The joint stage's recipe for a workload: one minibatch a step, as the peer is timed."""
    adapters = {"upper_layers": workload.upper_layers} if workload.sharing == "adapters" else None
    learner = {"lr": 1e-6, "epochs": workload.epochs, "sequences_per_minibatch": workload.sequences}
    tree: dict[str, Any] = {
        "data": {"prompts": str(prompts)},
        "policy": {"model": workload.model, **learner},
        "value": learner | ({"start": "policy"} if workload.sharing == "head" else {}),
        "rewards": [{"model": reward_model}],
        "rollout": {
            "prompts_per_step": workload.sequences,
            "max_new_tokens": workload.response_tokens,
            "sequences_per_batch": workload.sequences,
        },
        "sharing": {"mode": workload.sharing},
        "compute": {
            "device": workload.device,
            "precision": workload.precision,
            "tokens_per_microbatch": workload.tokens_per_microbatch,
            "compiled": workload.compiled,
        },
    }
    return PpoConfig.model_validate(tree | ({"adapters": adapters} if adapters else {}))


def stage_of(workload: Workload, reward_model: str, gather: Gather = "model") -> tuple[JointStage, PpoConfig]:
    """A joint stage whose prompts and responses have exactly the workload's lengths.

    `gather` is for processes that train together: what they gather of the policy to sample.
    """
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text('{"prompt": "w5 w6 w7"}\n', encoding="utf-8")
        config = recipe(workload, reward_model, prompts)
        stage = build(config, Progress(Console(quiet=True)))
    policy = stage.models.policy
    sampler = policy if world().alone else InStep(policy, lambda: gather == "layer")
    return replace(stage, generator=fixed_length_generator(sampler, stage.tokenizer, workload)), config


def step(
    stage: JointStage,
    config: PpoConfig,
    state: JointState,
    prompts: Sequence[Prompt],
    timer: Callable[[], float] = time.monotonic,
) -> tuple[JointState, dict[str, float]]:
    """What the joint stage does in a step, by the clock."""
    clock, on_gpu = Clock(timer), stage.placement.device.type == "cuda"

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        with clock(name):
            yield
            if on_gpu:
                torch.cuda.synchronize()

    with phase("rollout"):
        rollouts = stage.generator.generate(prompts)
    with phase("score"):
        scores = stage.score(rollouts)
    with phase("evaluate"):
        judged = judge(stage, config, state.with_scores(scores), rollouts, scores)
    with phase("update"):
        after, _ = learn(stage, config, state.with_scores(scores), judged)
    return after, clock.read(tokens=sum(len(rollout.ids) for rollout in rollouts))


def measure(
    workload: Workload,
    reward_model: str,
    steps: int,
    timer: Callable[[], float] = time.monotonic,
    gather: Gather = "model",
) -> dict[str, Any]:
    """Seconds by phase of each step after the first, and what the process took."""
    if workload.threads:
        torch.set_num_threads(workload.threads)
    torch.manual_seed(workload.seed)
    stage, config = stage_of(workload, reward_model, gather)
    state, rows = start_state(config), []
    trunks = [model.trunk for model in (stage.models.policy, stage.models.reference, stage.models.value)]
    with counting(trunks) as counts:
        for number in range(steps + 1):
            prompts = random_prompts(stage.tokenizer, workload, number)
            state, row = step(stage, config, state, prompts, timer)
            rows.append(row)
    return {
        "steps": rows[1:],
        "first_step": rows[0],
        "peak_logits_bytes": counts.largest_logits_bytes,
        **machine_record(stage.placement.device),
    }


if __name__ == "__main__":
    print(json.dumps(measure(Workload.from_json(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
