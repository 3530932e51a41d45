"""What lies between products computed by code that torch's compiler makes: one pass over memory in place of many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import get_hash_for_files
from transformers import Cache

from tandem.algo import Passes, put_slope, sums_over_rows
from tandem.models import kernels
from tandem.models.cache import RoomyLayer
from tandem.models.causal import CausalPolicy
from tandem.models.repeating import NextTokens, compile_graph
from tandem.world import world

Forward = Callable[..., Any]
_SOURCES = tuple(sorted(str(path) for path in Path(__file__).parent.iterdir() if path.suffix in {".py", ".cpp", ".h"}))
_VARIANTS = 64
"""How many ways a layer may be called, each with code of its own: with a gradient or without, by adapter, a token."""


class CompiledLayers:
    """A decoder's layers, computed by compiled code from here on.

    Code is made at the first call of each kind, for all layers that are alike and for batches of any size, until
    `settle`. A batch of a single row stays as it is. The code calls `tandem.models.kernels` where they are loaded.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        # Gradients of one pass are asked for more than once where those of two losses are compared.
        # Code that torch's cache on disk holds from a process that allowed itself to overwrite what a backward pass was
        # left would give wrong gradients the second time, and code is made for our operators as these files describe
        # them. So ours is kept apart.
        torch._functorch.config.donated_buffer = False
        torch.compiler.config.cache_key_tag = f"tandem {get_hash_for_files(_SOURCES).hex()}"
        self._layers: Any = layers
        self._compiled: dict[Forward, Forward] = {}
        self._next_tokens: dict[Forward, NextTokens] = {}
        for place, layer in enumerate(self._layers):
            kind = type(layer).forward
            if kind not in self._compiled:
                self._compiled[kind] = torch.compile(
                    kind, dynamic=True, backend=compile_graph, recompile_limit=_VARIANTS
                )  # type: ignore[call-overload]
                self._next_tokens[kind] = NextTokens(kind)
            layer.forward = self._forward(layer, place, kind)

    def settle(self) -> None:
        """Make no more code: calls of other kinds than those so far are computed as they are written."""
        self._compiled = {kind: torch._dynamo.run(kind) for kind in self._compiled}

    def undo(self) -> None:
        """Let all be computed as it is written."""
        for layer in self._layers:
            del layer.forward

    def _forward(self, layer: Any, place: int, kind: Forward) -> Forward:
        plain: Forward = layer.forward

        def forward(hidden_states: Tensor, *inputs: Any, **named: Any) -> Any:
            if hidden_states.shape[0] == 1:
                return plain(hidden_states, *inputs, **named)
            cache = next((given for given in (*inputs, *named.values()) if isinstance(given, Cache)), None)
            if cache is None:
                return self._compiled[kind](layer, hidden_states, *inputs, **named)
            held = cache.layers[place]
            if type(held) is not RoomyLayer or not _is_compiled(held, hidden_states.shape[1]):
                return plain(hidden_states, *inputs, **named)

            # Code that is to do for every layer must not look for its own part of the cache.
            def own(given: Any) -> Any:
                return held if given is cache else given

            given = (hidden_states, *map(own, inputs))
            named = {name: own(value) for name, value in named.items()}
            if held.is_empty:
                return self._compiled[kind](layer, *given, **named)
            return self._next_tokens[kind](self._compiled[kind], layer, held, given, named)

        return forward


def _is_compiled(held: RoomyLayer, length: int) -> bool:
    """A whole prompt, or one more token for which there is room."""
    return held.is_empty or (length == 1 and held.make_room())


class CompiledPasses:
    """The passes over logits by which policies read log-probabilities, by compiled code from here on.

    Code is made at the first call of each kind, for any number of rows and any vocabulary, until `settle`. Where
    `tandem.models.kernels` are loaded and multiply a policy's head, they read its logits too (`tandem.models.head`).
    """

    def __init__(self, policies: Iterable[CausalPolicy]) -> None:
        self._policies = tuple(policies)
        self._passes = Passes(
            sums_over_rows=torch.compile(sums_over_rows, dynamic=True),
            put_slope=torch.compile(put_slope, dynamic=True),
            whole=True,
        )
        self._hand_over(self._passes)

    def settle(self) -> None:
        """Make no more code: calls of other kinds than those so far are computed as they are written."""
        run = torch._dynamo.run
        passes = self._passes
        self._hand_over(replace(passes, sums_over_rows=run(passes.sums_over_rows), put_slope=run(passes.put_slope)))

    def undo(self) -> None:
        """Let all be computed as it is written."""
        self._hand_over(Passes(), by_kernels=False)

    def _hand_over(self, passes: Passes, *, by_kernels: bool = True) -> None:
        for policy in self._policies:
            policy.passes, policy.reads_by_kernels = passes, by_kernels and world().alone


class KernelSampling:
    """Policies on a CPU that multiply and draw by `tandem.models.kernels` in sampling, from here on.

    Raises RuntimeError where the kernels cannot be built.
    """

    def __init__(self, samplers: Iterable[CausalPolicy]) -> None:
        self._samplers = [policy for policy in samplers if policy.device.type == "cpu"]
        if self._samplers:
            kernels.load_kernels()
        self._set(True)

    def settle(self) -> None:
        """Nothing is compiled later."""

    def undo(self) -> None:
        """Let all be computed as it is written."""
        self._set(False)

    def _set(self, by_kernels: bool) -> None:
        for policy in self._samplers:
            policy.samples_by_kernels = by_kernels
