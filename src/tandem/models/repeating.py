"""The next token by the code that computed the token before it, without looking it up again.

torch finds the code for a call among all that it has made, by some hundred conditions on the layer and its inputs. From
token to token of a batch they all hold: only the layer's inputs change, and how many tokens there are.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch._dynamo import lookup_backend

from tandem.models.cache import RoomyLayer
from tandem.models.gradients import MatrixGradients
from tandem.models.rewriting import rotate_by_operator

Forward = Callable[..., Any]
Inputs = tuple[Any, ...]
Graph = Callable[..., Sequence[Any]]
Reader = Callable[[Mapping[str, Any]], Inputs]
_PART_OF_AN_INPUT = re.compile(r"L\['\w+'\](\.\w+(\(\))?|\[\d+\]|\['\w+'\])*")
"""As torch names what a graph is given: a Python expression of the function's arguments L."""
_SETTINGS = {
    # Sizes are looked at when code is looked up; looking at them between its steps is an eighth of a token's overhead.
    "size_asserts": False,
    "alignment_asserts": False,
    "post_grad_custom_post_pass": MatrixGradients(),
}


@dataclass(frozen=True)
class Call:
    """A call of compiled code: what it was given under which names, and what it gave."""

    graph: Graph
    names: tuple[str, ...]
    given: Inputs
    found: Sequence[Any]

    @property
    def changing(self) -> dict[int, str]:
        """What may be another with the next call, by its place; the rest is the layer's own, or everyone's."""
        return {place: name for place, name in enumerate(self.names) if not name.startswith(("L['self']", "G["))}


_watched: ContextVar[list[Call] | None] = ContextVar("watched", default=None)


def compile_graph(graph: Any, inputs: Any) -> Graph:
    """torch's own compiler, as a backend of `torch.compile` whose calls can be watched."""
    rotate_by_operator(graph.graph)
    graph.recompile()
    names = tuple(node._dynamo_source.name for node in graph.graph.nodes if node.op == "placeholder")
    inductor: Any = lookup_backend("inductor")
    compiled: Graph = inductor(graph, inputs, config_patches=_SETTINGS)

    def called(*given: Any) -> Sequence[Any]:
        found = compiled(*given)
        if (calls := _watched.get()) is not None:
            calls.append(Call(compiled, names, given, found))
        return found

    return called


class NextTokens:
    """A kind of layer's forward for one more token, which is looked up once a batch and then repeated."""

    def __init__(self, kind: Forward) -> None:
        parameters = inspect.signature(kind).parameters.values()
        self._positional = [parameter.name for parameter in parameters][1:]
        self._others = [parameter.name for parameter in parameters if parameter.kind is parameter.VAR_KEYWORD]

    def __call__(self, looked_up: Forward, layer: Any, held: RoomyLayer, inputs: Inputs, named: dict[str, Any]) -> Any:
        """What the layer gives for hidden states [rows, 1, H], the first of its inputs; `held` grows by one.

        `looked_up` is the compiled forward of this kind. `held` stands for the cache among the inputs.
        """
        rows, length, by_name = len(inputs[0]), held.length, self._by_name(inputs, named)
        if held.repeat is not None and held.repeat.holds_for(rows, by_name):
            found = held.repeat(by_name)
        else:
            with _watching() as calls:
                found = looked_up(layer, *inputs, **named)
            held.repeat = self._repeat(calls, found, rows, by_name)
        held.show(length + 1)
        return found

    def _by_name(self, inputs: Inputs, named: dict[str, Any]) -> dict[str, Any]:
        by_name = dict(zip(self._positional, inputs, strict=False)) | named
        for name in self._others:
            by_name[name] = named
        return by_name

    def _repeat(self, calls: Sequence[Call], output: object, rows: int, by_name: dict[str, Any]) -> RepeatedCall | None:
        """The call that gave the output, if it was the only one and all that it was given is known by name."""
        if len(calls) != 1:
            return None
        places = [place for place, found in enumerate(calls[0].found) if found is output]
        changing = calls[0].changing.values()
        if not places or not all(_PART_OF_AN_INPUT.fullmatch(name) for name in changing):
            return None
        # Code that is told the number of rows was made for any number of them.
        any_rows = f"L['{self._positional[0]}'].size()[0]" in changing
        return RepeatedCall(calls[0], places[0], None if any_rows else rows, _told(by_name))


class RepeatedCall:
    """A call of compiled code whose output was at a place, to be made again with other inputs.

    `rows` if the code was made for that number only; `told` is what else of the inputs it was made for.
    """

    def __init__(self, call: Call, place: int, rows: int | None, told: Inputs) -> None:
        self._graph = call.graph
        self._place = place
        self._rows = rows
        self._told = told
        self._changing = tuple(call.changing)
        self._read = _reader(tuple(call.changing.values()))
        self._given = [None if number in self._changing else value for number, value in enumerate(call.given)]

    def holds_for(self, rows: int, inputs: Mapping[str, Any]) -> bool:
        """Whether the code computes so many rows of such inputs by their names."""
        return (self._rows is None or self._rows == rows) and self._told == _told(inputs)

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """The output for inputs by their names."""
        given = list(self._given)
        for number, value in zip(self._changing, self._read(inputs), strict=True):
            given[number] = value
        return self._graph(*given)[self._place]


@contextmanager
def _watching() -> Iterator[list[Call]]:
    calls: list[Call] = []
    before = _watched.set(calls)
    try:
        yield calls
    finally:
        _watched.reset(before)


def _told(inputs: Mapping[str, Any]) -> Inputs:
    """What code may be made for: numbers and words, and what is not given, such as a mask once no row is padded."""
    return tuple(value if value is None or isinstance(value, int | float | str) else ... for value in inputs.values())


@cache
def _reader(names: tuple[str, ...]) -> Reader:
    reader: Reader = eval(f"lambda L: ({''.join(f'{name},' for name in names)})")
    return reader
