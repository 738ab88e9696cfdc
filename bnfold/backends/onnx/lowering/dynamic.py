"""Products of integers whose scales are worked out when the model runs, as ONNX Runtime quantises dynamically.

    y = x_integer . w_integer * (x_scale * w_scale) + b        of DynamicQuantizeLinear, ConvInteger or MatMulInteger, Cast, Mul, Mul, Add

In real arithmetic that is (x_integer . w_integer * x_scale) * w_scale, and w_scale is a constant factor, which takes a map's scale as any
other does; so no integer changes, and its sign may.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Param, Value
from bnfold.algebra.layouts import Layout

from ..graph.walk import arg, is_standard
from .lowering import OnnxLowering, OnnxNative, given
from .settings import fused


def scale_of(ctx: OnnxLowering, value: ir.Value) -> tuple[ir.Node, int] | None:
    """The Mul of one computed number by a constant that makes a scale, read by one Mul alone, and which of its inputs is the constant."""
    node, uses = value.producer(), list(value.uses())
    if node is None or node.op_type != "Mul" or not is_standard(node) or ctx.opset < 7 or len(uses) != 1 or value.is_graph_output():
        return None
    constant = [i for i in (0, 1) if ctx.is_constant(given(node, i))]
    reader, place = uses[0]
    if len(constant) != 1 or reader.op_type != "Mul" or not is_standard(reader) or ctx.is_constant(given(reader, 1 - place)):
        return None
    number = ctx.value(arg(node, 1 - constant[0]))
    other = ctx.value(arg(reader, 1 - place))
    if number.sizes is None or set(number.sizes) > {1} or number.producer is None or number.producer.label != "DynamicQuantizeLinear":
        return None
    return (node, constant[0]) if (other.rank or 0) >= max(number.rank or 0, len(ctx.shape(arg(node, constant[0])))) else None


def scaled(ctx: OnnxLowering, node: ir.Node, place: int, inner: ir.Node, key: int) -> None:
    """x * (number * constant), as the product of two activations, the constant's factor, and an Add that may grow behind it."""
    x, number, out = arg(node, 1 - place), arg(inner, 1 - key), ctx.value(node.outputs[0])
    rank = ctx.rank(x)
    for v in (x, node.outputs[0]):
        ctx.set_rank(v, rank)
    stored = ctx.shape(arg(inner, key))
    shape = (1,) * (rank - len(stored)) + stored
    factor = ctx.param(inner, key, shape, _trailing(shape, stored))
    product, wide = (Value(f"{out.name}:{what}", out.probes, rank) for what in ("product", "scaled"))
    native = ctx.native(node, [x], [1 - place], node.outputs[0])
    attrs = {"limit": native.limit, "cloneable": False, "settings": partial(fused, node, "Mul")}
    own = OnnxNative(inner, native.dtype, [1 - key], native.limit)
    ctx.add("Mul", node, [ctx.value(x), ctx.value(number)], [product], attrs, {}, native)
    ctx.add("Affine", inner, [product], [wide], {**attrs, "grows": True, "scales_integers": True}, {"gamma": factor}, own)
    grown = Param(None, (1,) * rank, slot="Add")
    ctx.add("Affine", node, [wide], [out], {**attrs, "grows": True, "grows_add": True}, {"beta": grown}, native)


def _trailing(shape: tuple[int, ...], stored: tuple[int, ...]) -> Layout:
    """A factor in the rank of what it multiplies; one that grew is stored without leading axes of one element."""

    def back(c: Array) -> Array:
        if c.shape == shape:
            return c.reshape(stored)
        return c.reshape(c.shape[int(np.argmax(np.array(c.shape) > 1)) :])

    return Layout(f"as {shape}", lambda c: c.reshape(shape), back)
