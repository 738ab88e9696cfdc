"""Pointwise convolutions, whose moments are known without running them (see `bnfold.recalibration.moments.Pointwise`)."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from bnfold.recalibration.moments import Pointwise

from ..graph.constants import Constants
from ..graph.shapes import Shapes
from ..graph.walk import arg, is_standard, whole, wholes
from ..lowering.commuting import pads


def passes(node: ir.Node, constants: Constants, shapes: Shapes) -> bool:
    """Whether an operator is a pointwise convolution that is better not run for its moments.

    Not in half precision, where the rounding of an output tells in its moments.
    """
    if node.op_type != "Conv" or not is_standard(node):
        return False
    if not all(value is None or (constants.is_constant(value) and constants.stored(value) is not None) for value in node.inputs[1:]):
        return False  # what is computed may be rounded on the way
    source, weight = (shapes.probes(arg(node, i)) for i in (0, 1))
    if source is None or weight is None or None in weight[0] or None in source[0][2:] or len(source[0]) != len(weight[0]):
        return False
    out, into, *kernel = (int(n) for n in weight[0] if n is not None)
    plain = whole(node, "group", 1) == 1 and all(n == 1 for n in (*kernel, *wholes(node, "strides"))) and not pads(node, tuple(kernel))
    kind = shapes.dtype(node.outputs[0])
    size = math.prod(n for n in source[0][2:] if n is not None)
    return plain and kind in (ir.DataType.FLOAT, ir.DataType.DOUBLE) and Pointwise.pays(into, out, size)


def read(node: ir.Node, constants: Constants) -> Pointwise:
    weight, bias = (None if i >= len(node.inputs) or node.inputs[i] is None else constants.get(node.inputs[i]) for i in (1, 2))
    assert weight is not None
    return Pointwise(weight.astype(np.float64).reshape(weight.shape[:2]), None if bias is None else bias.astype(np.float64))
