"""Training in one process: gradient accumulation, clipping, AdamW on float32 master weights, schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tandem.config import OptimizerSection
from tandem.errors import RunError


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    parameters: Sequence[nn.Parameter]
    lr: float


class LocalEngine:
    """Optimises parameters from losses whose gradients add up between steps.

    Parameters kept in less than float32 compute as they are, while a float32 master copy accumulates their
    gradients and is what the optimiser moves. `updates` is how often `step` will be called, for the schedule.
    """

    def __init__(self, groups: Sequence[ParameterGroup], settings: OptimizerSection, updates: int) -> None:
        self._max_grad_norm = settings.max_grad_norm
        self._pairs = [(p, _master_of(p)) for group in groups for p in group.parameters]
        masters = iter(master for _, master in self._pairs)
        options = [{"params": [next(masters) for _ in group.parameters], "lr": group.lr} for group in groups]
        self._optimizer = torch.optim.AdamW(
            options,
            betas=(settings.betas[0], settings.betas[1]),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda update: schedule_factor(update, updates, settings)
        )

    @property
    def lr(self) -> float:
        """The learning rate of the first group at the next step."""
        return float(self._schedule.get_last_lr()[0])

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss to what the next step will use."""
        loss.backward()
        for parameter, master in self._pairs:
            if master is not parameter and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def step(self) -> float:
        """Clip, update, and forget the gradients. Returns the gradient's norm before clipping.

        Raises RunError where the gradient is not finite, before it reaches a weight.
        """
        masters = [master for _, master in self._pairs]
        norm = float(nn.utils.clip_grad_norm_(masters, self._max_grad_norm))
        if not math.isfinite(norm):
            raise RunError(f"a gradient is not finite (norm {norm}); the weights are as they were before it.")
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in self._pairs:
                if master is not parameter:
                    parameter.copy_(master)
        return norm


def _master_of(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return nn.Parameter(parameter.detach().float().clone())


def schedule_factor(update: int, updates: int, settings: OptimizerSection) -> float:
    """Share of the peak learning rate at an update: a linear rise, then constant, linear or cosine to zero."""
    rise = round(settings.warmup_fraction * updates)
    if update < rise:
        return (update + 1) / rise
    progress = min(1.0, (update - rise) / max(1, updates - rise))
    if settings.schedule == "linear":
        return 1.0 - progress
    if settings.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
