"""In compiled backward passes, the gradients of matrices by our own operator, those of the same rows together.

oneDNN finds the gradient of a narrow matrix at half to two thirds of the rate of its other products.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

from tandem.models import kernels


class MatrixGradients(CustomGraphPass):
    """Puts `weight_gradients` (kernels.cpp) in the place of every product upstream^T rows that it is there for."""

    def __call__(self, graph: Graph) -> None:
        place = {node: number for number, node in enumerate(graph.nodes)}
        of_rows: dict[Any, list[Node]] = {}
        for node in place:
            if _is_gradient(node):
                of_rows.setdefault(_factors(node)[1], []).append(node)
        for rows, products in of_rows.items():
            last = products[-1]
            together = [node for node in products if all(place[user] > place[last] for user in node.users)]
            for group in [together, *([node] for node in products if node not in together)]:
                _replace(graph, rows, group)

    def uuid(self) -> Any:
        return type(self).__name__, kernels.are_loaded()


def _is_gradient(node: Node) -> bool:
    """Whether it is the product of a transposed matrix with one as it lies."""
    if node.target is not torch.ops.aten.mm.default:
        return False
    upstream, rows = _factors(node)
    transposed = upstream.target is torch.ops.aten.permute.default and upstream.args[1] == [1, 0]
    return transposed and kernels.finds_gradient(_value(upstream.args[0]), _value(rows))


def _factors(product: Node) -> tuple[Any, Any]:
    upstream, rows = product.args
    return upstream, rows


def _value(node: Any) -> Tensor:
    found: Tensor = node.meta["val"]
    return found


def _replace(graph: Graph, rows: Node, products: list[Node]) -> None:
    """By one call of the operator, where the last of the products stands."""
    upstream = [_factors(product)[0].args[0] for product in products]
    with graph.inserting_before(products[-1]):
        found = graph.call_function(torch.ops.tandem_cpu.weight_gradients.default, (upstream, rows))
        found.meta["val"] = [_value(product) for product in products]
        for number, product in enumerate(products):
            one = graph.call_function(operator.getitem, (found, number))
            one.meta.update(product.meta)
            product.replace_all_uses_with(one)
    for product in products:
        graph.erase_node(product)
