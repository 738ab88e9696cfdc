"""What the operators of an ONNX graph read, make and cost (see `bnfold.recalibration.schedule`)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from bnfold.recalibration.moments import Pointwise
from bnfold.recalibration.schedule import Cut, NormCall, Operation

from ..graph.constants import Constants
from ..graph.sequences import parts_of
from ..graph.shapes import Shapes
from ..graph.walk import all_nodes, arg, is_standard, subgraphs, whole, wholes
from ..lowering.commuting import pads

TINY = {"Shape", "Size", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"}
SMALLER = {"MaxPool", "AveragePool", "LpPool", "ArgMax", "ArgMin", "TopK"}
SMALLER |= {f"Reduce{kind}" for kind in ("Mean", "Max", "Min", "Sum", "SumSquare", "L1", "L2", "LogSum", "LogSumExp", "Prod")}
PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
EXACT = (ir.DataType.FLOAT, ir.DataType.DOUBLE)  # types in which what one session computes is what another one would

OnnxCall = NormCall[ir.Node, ir.Value]
OnnxCut = Cut[ir.Node, ir.Value]
OnnxOperation = Operation[ir.Node, ir.Value]


def operations(graph: ir.Graph, constants: Constants, shapes: Shapes, provider: str) -> Iterator[OnnxOperation]:
    """All whose outcome depends on the data; what the caller may override has its stored value here."""

    def is_fixed(value: ir.Value) -> bool:
        return value.is_initializer() or constants.is_constant(value)

    for node in graph:
        if node.outputs and not all(map(is_fixed, node.outputs)):
            reads = tuple(v for v in dict.fromkeys(sources(node)) if not is_fixed(v))
            shrinks = 2 if node.op_type in TINY else 1 if node.op_type in SMALLER else 0
            short = provider == "cpu" and len(node.outputs[0].uses()) == 1 and _is_pointwise(node, constants, shapes)
            yield Operation(node, reads, tuple(node.outputs), shrinks, _work(node, shapes), short)


def sources(node: ir.Node) -> Iterator[ir.Value]:
    """All values that a node reads, those included that its subgraphs take from outside.

    What takes parts out of a sequence reads the tensors that they are cut from, so that these wait and not the sequence.
    """
    if parts := parts_of(node):
        yield from (part.source for part in parts)
        return
    yield from (value for value in node.inputs if value is not None)
    for _, graph in subgraphs(node):
        inner = list(all_nodes(graph))
        graphs = [graph, *(deeper for each in inner for _, deeper in subgraphs(each))]
        own = {value for each in graphs for value in (*each.inputs, *each.initializers.values())}
        own.update(value for each in inner for value in each.outputs)
        read = [value for each in inner for value in each.inputs if value is not None]
        yield from (value for value in (*read, *graph.outputs) if value not in own)


def nbytes(value: ir.Value, shapes: Shapes) -> int | None:
    """Of a value, at the first probe; nobody knows how long a text is."""
    count, dtype = _elements(value, shapes), shapes.dtype(value)
    return None if count is None or dtype in (None, ir.DataType.STRING) else int(count * dtype.itemsize)


def _elements(value: ir.Value, shapes: Shapes) -> int | None:
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
    source, weight = node.inputs[:2]
    spread = source if node.op_type == "ConvTranspose" else node.outputs[0]
    counted = None if spread is None else _elements(spread, shapes)
    dims = None if weight is None else shapes.probes(weight)
    if shapes.dtype(node.outputs[0]) not in EXACT or counted is None or dims is None or None in dims[0]:
        return None
    each = {"MatMul": dims[0][-2:-1] or dims[0], "Gemm": dims[0][whole(node, "transB", 0) :][:1]}
    return counted * math.prod(n for n in each.get(node.op_type, dims[0][1:]) if n is not None)


def _is_pointwise(node: ir.Node, constants: Constants, shapes: Shapes) -> bool:
    """Whether an operator is a pointwise convolution that is better not run for its moments.

    Not in half precision, where the rounding of an output tells in its moments, nor with a computed weight, which may be rounded too.
    """
    if node.op_type != "Conv" or not is_standard(node) or shapes.dtype(node.outputs[0]) not in EXACT:
        return False
    if not all(value is None or (constants.is_constant(value) and constants.stored(value) is not None) for value in node.inputs[1:]):
        return False
    source, weight = (shapes.probes(arg(node, i)) for i in (0, 1))
    if source is None or weight is None or None in weight[0] or None in source[0][2:] or len(source[0]) != len(weight[0]):
        return False
    out, into, *kernel = (int(n) for n in weight[0] if n is not None)
    plain = whole(node, "group", 1) == 1 and all(n == 1 for n in (*kernel, *wholes(node, "strides"))) and not pads(node, tuple(kernel))
    return plain and Pointwise.pays(into, out, math.prod(n for n in source[0][2:] if n is not None))


def pointwise(node: ir.Node, constants: Constants) -> Pointwise:
    weight, bias = (constants.get(node.inputs[i]) if i < len(node.inputs) else None for i in (1, 2))
    assert weight is not None
    return Pointwise(weight.astype(np.float64).reshape(weight.shape[:2]), None if bias is None else bias.astype(np.float64))
