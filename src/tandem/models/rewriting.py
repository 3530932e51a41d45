"""Rotary embeddings by our own operator, put in their place in the graph of a layer that is to be compiled.

torch's compiler makes of their gradient code that handles a number at a time.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from tandem.models import kernels

_TURNED = (torch.cat, [(operator.neg, (operator.getitem, "heads", "above")), (operator.getitem, "heads", "below")])
_ROTATED = (operator.add, (operator.mul, "heads", "cos"), (operator.mul, _TURNED, "sin"))
"""As transformers writes it: functions and what they are given, a name for what is the same wherever the name is."""


def rotate_by_operator(graph: Graph) -> None:
    """Let `kernels` rotate the heads in a layer's graph, where it is known how."""
    for node in list(graph.nodes):
        named: dict[str, Any] = {}
        if _matches(_ROTATED, node, named) and _rotates(node, **named):
            with graph.inserting_before(node):
                inputs = (named["heads"], named["cos"], named["sin"], False)
                rotated = graph.call_function(torch.ops.tandem_cpu.rotate.default, inputs)
            rotated.meta.update(node.meta)
            node.replace_all_uses_with(rotated)
    graph.eliminate_dead_code()


def _matches(pattern: Any, given: Any, named: dict[str, Any]) -> bool:
    if isinstance(pattern, str):
        return bool(named.setdefault(pattern, given) == given)
    if isinstance(pattern, list):
        return isinstance(given, Sequence) and _all_match(pattern, given, named)
    if not isinstance(given, Node):
        return False
    return given.target is pattern[0] and _all_match(pattern[1:], given.args, named)


def _all_match(patterns: Sequence[Any], given: Sequence[Any], named: dict[str, Any]) -> bool:
    return all(_matches(pattern, one, named) for pattern, one in zip_longest(patterns, given))


def _rotates(node: Node, heads: Any, cos: Any, sin: Any, above: Any, below: Any) -> bool:
    """Whether the two are the halves of each head, and the operator rotates such heads."""
    turned, *given = (_like(one) for one in (node, heads, cos, sin))
    if turned is None or not all(isinstance(one, Tensor) for one in given):
        return False
    half = turned.shape[-1] // 2
    halves = above == (Ellipsis, slice(half, None, None)) and below == (Ellipsis, slice(None, half, None))
    return halves and turned.shape == given[0].shape and kernels.rotates(*given)


def _like(node: Any) -> Any:
    """A tensor like the one that will be there, where it is one."""
    return node.meta.get("example_value") if isinstance(node, Node) else None
