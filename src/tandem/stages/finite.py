"""What must be finite before anything learns from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from tandem.algo import Sums
from tandem.errors import NotFinite
from tandem.rewards.faults import sample
from tandem.types import Batch, Rollout, Scores, Trajectories


def check_scores(scores: Scores, rollouts: Sequence[Rollout]) -> None:
    """Raises NotFinite, naming the reward and the sample, where what is paid for a response is not finite."""
    bad = (~torch.isfinite(scores.whole)).nonzero().flatten().tolist()
    if not bad:
        return
    row = bad[0]
    names = [name for name, part in scores.parts.items() if not torch.isfinite(part[row])]
    which = f"the reward {names[0]!r}" if names else "the sum of rewards"
    raise NotFinite(
        f"{which} of {sample(rollouts[row])}",
        'Mend the reward, or set its on_error = "skip" to leave out such samples.',
    )


def check_trajectories(trajectories: Trajectories) -> None:
    """Raises NotFinite where a log-probability or a value is not finite."""
    policy = 'Lower policy.lr, or set compute.precision = "float32".'
    for name, tensor, remedy in (
        ("a log-probability of the generator", trajectories.behaviour_logprobs, policy),
        ("a log-probability of the policy", trajectories.logprobs, policy),
        ("a log-probability of the reference", trajectories.reference_logprobs, 'Set compute.precision = "float32".'),
        ("a value", trajectories.values, "Lower value.lr, or set value.max_grad_norm."),
        ("a value", trajectories.final_values, "Lower value.lr, or set value.max_grad_norm."),
    ):
        if not torch.isfinite(tensor).all():
            raise NotFinite(name, remedy)


def check_batch(batch: Batch) -> None:
    """Raises NotFinite where an advantage or a value target is not finite."""
    for name, tensor in (("a reward", batch.rewards), ("an advantage", batch.advantages), ("a return", batch.returns)):
        if not torch.isfinite(tensor).all():
            raise NotFinite(name, "Bound the rewards by score.clip, or lower value.lr.")


class Forgetful(Protocol):
    def discard(self) -> None:
        """Forget the gradients."""
        ...


def check_losses(sums: Sums, engine: Forgetful) -> None:
    """Raises NotFinite, with the gradients forgotten, where a minibatch's loss is not finite."""
    for name, value in sums.means().items():
        if name.endswith("loss") and not math.isfinite(value):
            engine.discard()
            raise NotFinite(f"the loss {name}", "Lower the learning rate; bound rewards by score.clip.")
