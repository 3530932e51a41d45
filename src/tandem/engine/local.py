"""From losses to weights: gradient accumulation, clipping, AdamW on float32 master weights, schedules.

In one process, and in several that share a model: there each one moves its own part of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tandem.config import OptimizerSection
from tandem.engine.parts import part_of
from tandem.errors import InputError, NotFinite
from tandem.world import World, world


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    parameters: Sequence[nn.Parameter]
    lr: float


class LocalEngine:
    """Optimises parameters from losses whose gradients add up between steps.

    Parameters kept in less than float32 compute as they are, while a float32 master copy accumulates their
    gradients and is what the optimiser moves. With several processes, gradients are sums over all of them, and what is
    accumulated, clipped and moved here is this process's part.
    """

    def __init__(self, groups: Sequence[ParameterGroup], settings: OptimizerSection, name: str = "model") -> None:
        """`name` is what messages call what is trained."""
        self._settings = settings
        self._name = name
        self._peaks = [group.lr for group in groups]
        self._share = 1.0
        self._world = world()
        self._pairs = [(p, _master_of(p, self._world)) for group in groups for p in group.parameters]
        self._parts = [part_of(p) for p, _ in self._pairs]
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
        for (parameter, master), part in zip(self._pairs, self._parts, strict=True):
            if master is not parameter and parameter.grad is not None:
                gradient = part.own(parameter.grad).float()
                if not part.cut:
                    gradient = self._world.sum(gradient)
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

    def product(self, one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> float:
        """The inner product of two gradients as `take` gives them, over the parameters that both reach."""
        cut, whole = 0.0, 0.0
        for part, a, b in zip(self._parts, one, other, strict=True):
            if a is not None and b is not None:
                product = float((a.double() * b.double()).sum())
                cut, whole = (cut + product, whole) if part.cut else (cut, whole + product)
        if self._world.alone:
            return cut + whole
        total = self._world.sum(torch.tensor(cut, dtype=torch.float64)) / self._world.replicate
        return float(total) + whole

    def discard(self) -> None:
        """Forget the gradients without a step."""
        self._optimizer.zero_grad(set_to_none=True)

    def _clip(self) -> float:
        """Scale the gradients down to the norm that is allowed; returns the norm before."""
        masters, allowed = [master for _, master in self._pairs], self._settings.max_grad_norm
        if self._world.alone:
            return float(nn.utils.clip_grad_norm_(masters, allowed))
        gradients = [master.grad for master in masters]
        norm = math.sqrt(self.product(gradients, gradients))
        if norm > allowed:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(allowed / (norm + 1e-6))
        return norm

    def step(self) -> float:
        """Clip, update, and forget the gradients. Returns the gradient's norm before clipping.

        Raises NotFinite where the gradient is not finite; it is forgotten, and the weights are as they were.
        """
        norm = self._clip()
        if not math.isfinite(norm):
            self.discard()
            raise NotFinite(f"the {self._name}'s gradient", _REMEDY)
        self._optimizer.step()
        self.discard()
        self._publish()
        return norm

    @torch.no_grad()
    def _publish(self) -> None:
        """Let the models compute with the master weights as they are."""
        for (parameter, master), part in zip(self._pairs, self._parts, strict=True):
            if master is not parameter:
                part.own(parameter.detach()).copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Master weights and the optimiser's state by name: the tensors themselves, no copies."""
        found: dict[str, Tensor] = {}
        for number, ((_, master), part) in enumerate(zip(self._pairs, self._parts, strict=True)):
            found[f"{number:05d}.weight"] = part.of_whole(master.detach())
            of_optimizer = self._optimizer.state.get(master, {})
            found |= {f"{number:05d}.{name}": part.of_whole(tensor) for name, tensor in of_optimizer.items()}
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave. Raises InputError where it is of other parameters."""
        shapes = {name: tuple(state[name].shape) for name in state if name.endswith(".weight")}
        own = {f"{number:05d}.weight": part.shape for number, part in enumerate(self._parts)}
        if shapes != own:
            raise InputError(
                f"the checkpoint's {self._name} has {len(shapes)} trained tensors that are not the {len(own)} of this "
                "recipe; go on with the recipe that it was made with."
            )
        of_parameter: dict[str, list[str]] = {}
        for name in sorted(state):
            of_parameter.setdefault(name.partition(".")[0], []).append(name)
        for (_, master), part, names in zip(self._pairs, self._parts, of_parameter.values(), strict=True):
            of_master = {name.partition(".")[2]: part.from_whole(state[name]) for name in names}
            master.copy_(of_master.pop("weight"))
            if of_master:
                own_copies = {name: tensor.to(master.device, copy=True) for name, tensor in of_master.items()}
                self._optimizer.state[master] = own_copies
        self._publish()


_REMEDY = 'Lower its learning rate or max_grad_norm, or set compute.precision = "float32".'


def _master_of(parameter: nn.Parameter, world: World) -> nn.Parameter:
    """What the optimiser moves: the parameter, or a float32 copy of it; with several processes, of this one's part."""
    exact = parameter.dtype in (torch.float32, torch.float64)
    if exact and world.alone:
        return parameter
    own = part_of(parameter).own(parameter.detach())
    return nn.Parameter(own if exact else own.float().clone())


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
