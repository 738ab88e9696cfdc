"""An ONNX graph as the operations that are cut into stages (see `bnfold.recalibration.schedule`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import onnx_ir as ir

from bnfold.recalibration.schedule import Call, Cut, Operation
from bnfold.recalibration.schedule import cut as cut_operations

from ..graph.sequences import parts_of
from ..graph.shapes import Shapes
from ..graph.walk import all_nodes, is_standard, subgraphs, whole

TINY = {"Shape", "Size", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"}
SMALLER = {"MaxPool", "AveragePool", "LpPool", "ArgMax", "ArgMin", "TopK"}
SMALLER |= {f"Reduce{kind}" for kind in ("Mean", "Max", "Min", "Sum", "SumSquare", "L1", "L2", "LogSum", "LogSumExp", "Prod")}

PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}

OnnxCall = Call[ir.Node, ir.Value]
OnnxCut = Cut[ir.Node, ir.Value]


def sources(node: ir.Node) -> Iterator[ir.Value]:
    """All values that a node reads, those included that its subgraphs take from outside.

    What takes parts out of a sequence reads the tensors that they are cut from, so that these wait and not the sequence.
    """
    if parts := parts_of(node):
        yield from (part.source for part in parts)
        return
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


def cut(
    graph: ir.Graph, calls: list[OnnxCall], is_fixed: Callable[[ir.Value], bool], shapes: Shapes, once: bool = False
) -> tuple[list[OnnxCut], set[int]]:
    """The stages of a graph, and the layers of which one call depends on another.

    is_fixed: whether a value is the same for all data. once: whether every operator runs once, however much then has to be held.
    """
    operations: list[Operation[ir.Node, ir.Value]] = []
    sizes: dict[ir.Value, int] = {}
    for node in graph:
        if node.outputs and not all(map(is_fixed, node.outputs)):
            reads = tuple(v for v in dict.fromkeys(sources(node)) if not is_fixed(v))
            shrinks = 2 if node.op_type in TINY else 1 if node.op_type in SMALLER else 0
            operations.append(Operation(node, reads, tuple(node.outputs), shrinks, None if once else _work(node, shapes)))
            for value in (*reads, *node.outputs):
                count, dtype = elements(value, shapes), shapes.dtype(value)
                if count is not None and dtype not in (None, ir.DataType.STRING):  # nobody knows how long a text is
                    sizes[value] = int(count * dtype.itemsize)
    return cut_operations(operations, calls, sizes)


def elements(value: ir.Value, shapes: Shapes) -> int | None:
    """How many elements a value has at the first probe."""
    dims = (shapes.probes(value) or ((None,),))[0]
    return None if None in dims else math.prod(n for n in dims if n is not None)


def _work(node: ir.Node, shapes: Shapes) -> int | None:
    """The multiply-adds of a convolution or a product with a stored weight, and of what only copies.

    In half precision a product runs once: what it gives to an operator of the same session may never be rounded, and what waits is.
    """
    if not is_standard(node):
        return None
    if node.op_type == "Concat":
        return 0
    if node.op_type not in PRODUCTS or not all(value is None or value.is_initializer() for value in node.inputs[1:]):
        return None
    if shapes.dtype(node.outputs[0]) not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return None
    source, weight = node.inputs[:2]
    spread = source if node.op_type == "ConvTranspose" else node.outputs[0]
    counted = None if spread is None else elements(spread, shapes)
    dims = None if weight is None else shapes.probes(weight)
    if counted is None or dims is None or None in dims[0]:
        return None
    each = {"MatMul": dims[0][-2:-1] or dims[0], "Gemm": dims[0][whole(node, "transB", 0) :][:1]}
    return counted * math.prod(n for n in each.get(node.op_type, dims[0][1:]) if n is not None)
