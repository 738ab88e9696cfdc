"""An ONNX graph as the operations that are cut into stages (see `bnfold.stages`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from ...stages import Call, Cut, Operation
from ...stages import cut as cut_operations
from .walk import all_nodes, subgraphs

TINY = {"Shape", "Size", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"}
SMALLER = {"MaxPool", "AveragePool", "LpPool", "ArgMax", "ArgMin", "TopK"}
SMALLER |= {f"Reduce{kind}" for kind in ("Mean", "Max", "Min", "Sum", "SumSquare", "L1", "L2", "LogSum", "LogSumExp", "Prod")}

OnnxCall = Call[ir.Node, ir.Value]
OnnxCut = Cut[ir.Node, ir.Value]


def sources(node: ir.Node) -> Iterator[ir.Value]:
    """All values that a node reads, those included that its subgraphs take from outside."""
    yield from (value for value in node.inputs if value is not None)
    for _, graph in subgraphs(node):
        own = set(graph.inputs) | set(graph.initializers.values())
        inner = list(all_nodes(graph))
        for each in inner:
            own.update(each.outputs)
            for _, deeper in subgraphs(each):
                own.update(deeper.inputs)
                own.update(deeper.initializers.values())
        read = [value for each in inner for value in each.inputs if value is not None]
        yield from (value for value in (*read, *graph.outputs) if value not in own)


def cut(graph: ir.Graph, calls: list[OnnxCall], is_fixed: Callable[[ir.Value], bool]) -> tuple[list[OnnxCut], set[int]]:
    """The stages of a graph, and the layers of which one call depends on another. is_fixed: whether a value is the same for all data."""
    operations = []
    for node in graph:
        if node.outputs and not all(map(is_fixed, node.outputs)):
            reads = tuple(v for v in dict.fromkeys(sources(node)) if not is_fixed(v))
            shrinks = 2 if node.op_type in TINY else 1 if node.op_type in SMALLER else 0
            operations.append(Operation(node, reads, tuple(node.outputs), shrinks))
    return cut_operations(operations, calls)
