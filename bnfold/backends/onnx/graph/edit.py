"""What a change of a graph leaves behind: nodes and weights that nobody reads."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from .constants import Constants
from .shapes import Shapes
from .walk import all_graphs


def drop_void_biases(model: ir.Model) -> None:
    """Take out biases of zeros that aren't vectors, which runtimes refuse: torch's exporter makes them for a Conv3d without bias."""
    constants = Constants(model, Shapes(model))
    for node in list(model.graph):
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) > 2 else None
        array = None if bias is None else constants.get(bias)
        if array is not None and array.ndim != 1 and not array.any():
            node.resize_inputs(2)
    for node in reversed(model.graph):
        if not is_read(node):
            model.graph.remove(node, safe=True)


def idle(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that no output of the model needs."""
    found: set[ir.Node] = set()
    for inner in inner_first(graph):
        for node in reversed(inner):
            if not any(v.is_graph_output() or any(user not in found for user, _ in v.uses()) for v in node.outputs):
                found.add(node)
    return found


def is_read(node: ir.Node) -> bool:
    return any(v.uses() or v.is_graph_output() for v in node.outputs)


def inner_first(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield from reversed(list(all_graphs(graph)))
