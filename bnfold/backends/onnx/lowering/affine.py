"""ONNX operators that are affine maps: BatchNormalization, and Add, Sub, Mul, Div by a constant. These are the sites."""

from __future__ import annotations

import math

import onnx_ir as ir

from bnfold.algebra import weights
from bnfold.algebra.affine import Blocked
from bnfold.algebra.geometry import pointwise

from ..graph.constants import FLOATS
from ..graph.walk import arg, attribute, in_training, number, whole
from .absorbing import scale_of, scaled
from .commuting import used
from .lowering import OnnxLowering


def batchnorm(ctx: OnnxLowering, node: ir.Node) -> None:
    """`spatial=0` (opset < 9) has parameters [C, H, W]."""
    x, y = arg(node), node.outputs[0]
    constants = [ctx.const(v) for v in node.inputs[1:5]]
    missing = [role for role, c in zip(weights.BN_ROLES, constants, strict=True) if c is None]
    shape = next((c.shape for c in constants if c is not None), ())
    rank = ctx.value(x).rank or (ctx.value(y).rank if shape else None)
    if rank is not None:
        ctx.set_rank(x, rank)
        ctx.set_rank(y, rank)
    refusal = None
    if in_training(node, ctx.opset):
        stated = f", which its {len(node.outputs)} outputs say, read or not" if 7 <= ctx.opset < 14 else ""
        refusal = f"it is in training mode{stated}: it normalises each batch by itself"
    elif any(used(node, i) for i in range(1, len(node.outputs))):
        refusal = "its further outputs are read, which only training mode gives"
    elif missing:
        refusal = f"its {missing[0]} is not a constant, or callers may override it"
    elif rank is None:
        refusal = "the rank of its input isn't known"
    elif None in (ctx.tensor(arg(node, 1)), ctx.tensor(arg(node, 2))):
        refusal = "its parameters are quantised"
    odd = ctx.opset < 9 and not attribute(node, "spatial", 1) and len(shape) == 1 and (rank or 0) > 2
    weights.batchnorm(
        ctx,
        node,
        x,
        (1, 2),
        constants,
        number(node, "epsilon", 1e-5),
        layer=node if refusal else tuple(node.inputs[3:5]),
        channels=_inferred(ctx, node) if not shape else math.prod(shape) if refusal else shape[0],
        note="its file says spatial=0, but its parameters are one per channel: read as spatial=1" if odd else "",
        refusal=refusal,
    )
    wide, own = ctx.constants.dtype(arg(node, 1)), ctx.shapes.dtype(x)
    ctx.nodes[-1].attrs["mixed"] = wide if own in FLOATS and wide != own else None  # coefficients of a wider type than the data


def _inferred(ctx: OnnxLowering, node: ir.Node) -> int:
    """The channels of a BatchNorm without a constant parameter, as its input or its gamma tells them; 0 where neither does."""
    sizes = [shape[axis] for v, axis in ((arg(node), 1), (arg(node, 1), 0)) if (shape := ctx.value(v).sizes) and len(shape) > axis]
    return next((size for size in sizes if size is not None), 0)


def arithmetic(ctx: OnnxLowering, node: ir.Node) -> None:
    """Add, Sub, Mul, Div: of two activations, or by a constant, which makes an affine operator."""
    operands, kind = (arg(node), arg(node, 1)), node.op_type.lower()
    if any(ctx.dtype(v) not in (None, *FLOATS) for v in operands):
        raise Blocked("it isn't floating point")
    constant = [ctx.is_constant(v) for v in operands]
    if not any(constant):
        if ctx.opset < 7 and attribute(node, "broadcast", 0):
            raise Blocked("it broadcasts an activation in the way of opset 6")
        scales = [(i, found) for i, v in enumerate(operands) if kind == "mul" and (found := scale_of(ctx, v)) is not None]
        if scales:
            scaled(ctx, node, scales[0][0], *scales[0][1])
        elif kind in ("add", "sub"):
            pointwise(ctx, node, "Add", *operands, signs=(1, 1 if kind == "add" else -1))
        else:
            pointwise(ctx, node, "Mul", *operands, factors=2 if kind == "mul" else 1)
        return
    if scale_of(ctx, node.outputs[0]) is not None:
        return  # a part of the product that it scales
    which = constant.index(True)
    shape, x, c = None, operands[1 - which], ctx.const(operands[which])
    assert c is not None
    if ctx.opset < 7 and attribute(node, "broadcast", 0) and "axis" in node.attributes:  # it says where the constant aligns
        lead = whole(node, "axis", 0) % ctx.rank(x)
        shape = (1,) * lead + c.shape + (1,) * (ctx.rank(x) - lead - c.ndim)
    weights.by_constant(ctx, node, kind, x, which, c, first=which == 1, shape=shape)
