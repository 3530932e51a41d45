"""Where a joint run stands between two steps, and how that is written down and taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tandem.config import PpoConfig
from tandem.data.feed import Place
from tandem.run.checkpoints import Snapshot
from tandem.run.random_state import random_numbers, random_tensors, restore_random
from tandem.run.start import check_planned
from tandem.stages.joint_setup import JointStage
from tandem.stages.sampling import Sampled, batches, restored
from tandem.stages.state import JointState, restored_state
from tandem.text import decoder


@dataclass(frozen=True)
class Standing:
    """How far a joint run has come, besides its weights, optimisers and random states.

    `row` holds the metrics of the latest step, `logged` whether they are written down already; `begun` is what was
    measured before the first step; `ahead` are the next step's responses, where they were sampled while the latest step
    trained; `data` is where the prompts stand.
    """

    state: JointState
    row: Mapping[str, float]
    logged: bool
    begun: Mapping[str, Any]
    ahead: Sampled | None = None
    data: Place = None


def snapshot_of(stage: JointStage, standing: Standing, metrics_bytes: int, seconds: float) -> Snapshot:
    """All that a run needs to go on exactly; the tensors are no copies. `seconds` is what the run took so far."""
    return Snapshot(
        step=standing.state.step,
        tensors=_flat(
            {name: engine.state() for name, engine in stage.engines.items()}
            | {"random": {name: random.get_state() for name, random in stage.randoms.items()}}
            | {"process": random_tensors()}
            | ({"ahead": standing.ahead.tensors()} if standing.ahead else {})
        ),
        state={
            "state": standing.state.as_record(),
            "row": standing.row,
            "logged": standing.logged,
            "begun": standing.begun,
            "ahead": standing.ahead.version if standing.ahead else None,
            "data": standing.data,
            "seconds": seconds,
            "value_units": stage.value_units,
            "offsets": stage.reward.offsets,
            "random": random_numbers(),
            "metrics_bytes": metrics_bytes,
        },
    )


def take_up(stage: JointStage, config: PpoConfig, snapshot: Snapshot) -> Standing:
    """Bring a run that was just put together to where the snapshot was taken.

    Raises InputError where the recipe is of other models or of prompts in another order, or plans fewer steps than are
    done.
    """
    state = snapshot.state
    stage.prompts.check(snapshot.step, state.get("data"))
    check_planned(state["state"]["course"]["done"], config.steps, "steps")
    for name, engine in stage.engines.items():
        engine.load_state(snapshot.under(name))
    for name, random in stage.randoms.items():
        random.set_state(snapshot.tensors[f"random/{name}"])
    stage.set_value_units(*state["value_units"])
    restore_random(snapshot.under("process"), state["random"])
    now, ahead, data = restored_state(config, state["state"]), None, state.get("data")
    if state.get("ahead") is not None:
        prompts, _ = next(batches(stage.prompts, config, now.step, data))
        ahead = restored(snapshot.under("ahead"), prompts, state["ahead"], decoder(stage.tokenizer))
    return Standing(now, state["row"], state["logged"], state["begun"], ahead, data)


def _flat(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
