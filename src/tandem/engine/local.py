"""Training in one process: gradient accumulation, clipping, AdamW on float32 master weights, schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tandem.config import OptimizerSection
from tandem.errors import InputError, NotFinite


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    parameters: Sequence[nn.Parameter]
    lr: float


class LocalEngine:
    """Optimises parameters from losses whose gradients add up between steps.

    Parameters kept in less than float32 compute as they are, while a float32 master copy accumulates their
    gradients and is what the optimiser moves.
    """

    def __init__(self, groups: Sequence[ParameterGroup], settings: OptimizerSection, name: str = "model") -> None:
        """`name` is what messages call what is trained."""
        self._settings = settings
        self._name = name
        self._peaks = [group.lr for group in groups]
        self._share = 1.0
        self._pairs = [(p, _master_of(p)) for group in groups for p in group.parameters]
        masters = iter(master for _, master in self._pairs)
        options = [{"params": [next(masters) for _ in group.parameters], "lr": group.lr} for group in groups]
        self._optimizer = torch.optim.AdamW(
            options,
            betas=(settings.betas[0], settings.betas[1]),
            weight_decay=settings.weight_decay,
            fused=True,
        )

    @property
    def lr(self) -> float:
        """The learning rate of the first group."""
        return float(self._optimizer.param_groups[0]["lr"])

    def set_progress(self, done: float, total: float) -> None:
        """Set the learning rates to where the schedule stands after `done` of `total` updates."""
        self._set_factor(schedule_factor(done, total, self._settings))

    def set_peak(self) -> None:
        """Set the learning rates to their peaks, where no schedule runs."""
        self._set_factor(1.0)

    def set_share(self, share: float) -> None:
        """From the next update on, let the learning rates be this share of what the schedule says."""
        self._share = share

    def _set_factor(self, factor: float) -> None:
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor * self._share

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Add the gradient of the loss to what the next step will use."""
        loss.backward(retain_graph=retain_graph)
        for parameter, master in self._pairs:
            if master is not parameter and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def take(self) -> list[Tensor | None]:
        """What `backward` has added up, a tensor a parameter; the engine forgets it."""
        gradients = [master.grad for _, master in self._pairs]
        self.discard()
        return gradients

    def put(self, gradients: Sequence[Tensor | None]) -> None:
        """Add gradients, a tensor a parameter, to what the next step will use."""
        for (_, master), gradient in zip(self._pairs, gradients, strict=True):
            if gradient is not None:
                master.grad = gradient if master.grad is None else master.grad + gradient

    def discard(self) -> None:
        """Forget the gradients without a step."""
        self._optimizer.zero_grad(set_to_none=True)

    def step(self) -> float:
        """Clip, update, and forget the gradients. Returns the gradient's norm before clipping.

        Raises NotFinite where the gradient is not finite; it is forgotten, and the weights are as they were.
        """
        masters = [master for _, master in self._pairs]
        norm = float(nn.utils.clip_grad_norm_(masters, self._settings.max_grad_norm))
        if not math.isfinite(norm):
            self.discard()
            raise NotFinite(f"the {self._name}'s gradient", _REMEDY)
        self._optimizer.step()
        self.discard()
        with torch.no_grad():
            for parameter, master in self._pairs:
                if master is not parameter:
                    parameter.copy_(master)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Master weights and the optimiser's state by name: the tensors themselves, no copies."""
        found: dict[str, Tensor] = {}
        for number, (_, master) in enumerate(self._pairs):
            found[f"{number:05d}.weight"] = master.detach()
            of_optimizer = self._optimizer.state.get(master, {})
            found |= {f"{number:05d}.{name}": tensor for name, tensor in of_optimizer.items()}
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave. Raises InputError where it is of other parameters."""
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name.endswith(".weight")}
        own = {f"{number:05d}.weight": tuple(master.shape) for number, (_, master) in enumerate(self._pairs)}
        if shapes != own:
            raise InputError(
                f"the checkpoint's {self._name} has {len(shapes)} trained tensors that are not the {len(own)} of this "
                "recipe; go on with the recipe that it was made with."
            )
        for number, (parameter, master) in enumerate(self._pairs):
            of_master = {
                name.partition(".")[2]: tensor for name, tensor in state.items() if name.startswith(f"{number:05d}.")
            }
            master.copy_(of_master.pop("weight"))
            if master is not parameter:
                parameter.copy_(master)
            if of_master:
                own_copies = {name: tensor.to(master.device, copy=True) for name, tensor in of_master.items()}
                self._optimizer.state[master] = own_copies


_REMEDY = 'Lower its learning rate or max_grad_norm, or set compute.precision = "float32".'


def _master_of(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return nn.Parameter(parameter.detach().float().clone())


def schedule_factor(done: float, total: float, settings: OptimizerSection) -> float:
    """Share of the peak learning rate after `done` of `total` updates: a linear rise, then constant, linear or
    cosine to zero."""
    rise = settings.warmup_fraction * total
    if done < rise:
        return min(1.0, (done + 1) / rise)
    progress = min(1.0, (done - rise) / max(1e-9, total - rise))
    if settings.schedule == "linear":
        return 1.0 - progress
    if settings.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0
