"""ONNX operators that are affine maps, the sites, and those in which maps end, in the terms of the rules.

Of products of integers the scales are worked out when the model runs, as ONNX Runtime quantises dynamically:

    y = x_integer . w_integer * (x_scale * w_scale) + b        of DynamicQuantizeLinear, ConvInteger or MatMulInteger, Cast, Mul, Mul, Add

In real arithmetic that is (x_integer . w_integer * x_scale) * w_scale, and w_scale is a constant factor, which takes a map's scale as any
other does; so no integer changes, and its sign may.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import onnx_ir as ir

from bnfold.algebra import weights
from bnfold.algebra.affine import Array, Blocked
from bnfold.algebra.geometry import pointwise
from bnfold.algebra.graph import Param, Value
from bnfold.algebra.layouts import Layout
from bnfold.data.spec import shape_text
from bnfold.errors import ModelError

from ..graph.constants import FLOATS
from ..graph.quantised import MOVING
from ..graph.walk import arg, attribute, in_training, is_standard, name_of, number, stored_tensor, whole, wholes
from .commuting import padding, used
from .lowering import OnnxLowering, OnnxNative, given
from .movement import gathered
from .settings import fused

WRONG_BIAS = (
    "torch.onnx.export writes such a file for a Conv3d without bias where its optimiser is off: fuse the module itself, or export it "
    "with dynamo=False, training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False"
)


def conv(ctx: OnnxLowering, node: ir.Node) -> None:
    weight, deformed = ctx.param(node, 1), node.op_type == "DeformConv"
    shape, groups, place = weight.shape, whole(node, "group", 1), 3 if deformed else 2
    for v in (arg(node), node.outputs[0]):
        ctx.set_rank(v, len(shape))
    ones, transposed = (1,) * len(shape[2:]), node.op_type == "ConvTranspose"
    stride, dilation = (wholes(node, name, ones) for name in ("strides", "dilations"))
    out = shape[1] * groups if transposed else shape[0]
    stored = None if given(node, place) is None else ctx.tensor(arg(node, place))
    if stored is not None and stored.shape != (out,):
        raise ModelError(
            f"{node.op_type} {name_of(node)} has a bias of shape {shape_text(stored.shape)}, and the standard asks for one number for each "
            f"of its {out} output channels, so no runtime takes the file; {WRONG_BIAS if len(shape) == 5 else 'export it again'}"
        )
    weights.convolution(
        ctx,
        node,
        arg(node),
        weight,
        place,
        groups,
        stride,
        dilation,
        padding(node, shape[2:], stride, dilation),
        transposed=transposed,
        extended=any(wholes(node, "output_padding")) or "output_shape" in node.attributes,
        steers=[v for v in (given(node, 2), given(node, 4)) if v is not None] if deformed else None,
    )


def gemm(ctx: OnnxLowering, node: ir.Node) -> None:
    """alpha * A' @ B' + beta * C with one of A and B constant."""
    if not any(ctx.is_constant(given(node, i)) for i in (0, 1)):
        raise Blocked("neither of its matrices is a float constant that callers may not override")
    alpha, beta = (number(node, name, 1.0) for name in ("alpha", "beta"))
    if alpha == 0:
        raise Blocked("its alpha is zero")
    for v in (arg(node), arg(node, 1), node.outputs[0]):
        if not ctx.is_constant(v):
            ctx.set_rank(v, 2)
    bias = _times_beta(ctx, node, beta)
    swaps = bool(attribute(node, "transA", 0)), bool(attribute(node, "transB", 0))
    made = weights.matrix_product(ctx, node, (0, 1), swaps=swaps, alpha=alpha, bias=bias)
    made.native.reset = {"beta": ir.AttrFloat32("beta", 1.0)} | ({"broadcast": ir.AttrInt64("broadcast", 1)} if ctx.opset < 7 else {})


def _times_beta(ctx: OnnxLowering, node: ir.Node, beta: float) -> Param:
    """C as it counts. Written back it is the whole product, and beta is 1."""
    if given(node, 2) is None:
        return Param(None, (1, 1), Layout("new", lambda c: c, lambda c: c[0] if len(c) == 1 else c), slot=2)
    stored = ctx.param(node, 2, role="bias").shape
    canonical = (1,) * (2 - len(stored)) + stored

    def back(c: Array) -> Array:
        return c.reshape(stored) if c.shape == canonical else c[0] if len(c) == 1 else c

    def counted(c: Array) -> Array:
        return beta * c.reshape(canonical) if beta else np.zeros(canonical)  # what isn't read may hold anything

    return ctx.param(node, 2, canonical, Layout(f"times {beta}", counted, back, gain=abs(beta)))


def matmul(ctx: OnnxLowering, node: ir.Node) -> None:
    """ONNX Runtime's FusedMatMul multiplies by `alpha` too, and may transpose its operands."""
    if is_standard(node):
        weights.matrix_product(ctx, node, (0, 1))
        return
    alpha = number(node, "alpha", 1.0)
    if any(whole(node, f"transBatch{x}", 0) for x in "AB") or not alpha:
        raise Blocked("it moves its batch axes, or multiplies by zero")
    swaps = bool(whole(node, "transA", 0)), bool(whole(node, "transB", 0))
    weights.matrix_product(ctx, node, (0, 1), swaps=swaps, alpha=alpha)


def einsum(ctx: OnnxLowering, node: ir.Node) -> None:
    weights.einsum(ctx, node, str(attribute(node, "equation", "")), range(len(node.inputs)))


def gather(ctx: OnnxLowering, node: ir.Node) -> None:
    """A table looked up by an activation (Embedding); an activation at constant places is a move."""
    if not ctx.is_constant(arg(node)):
        gathered(ctx, node)
        return
    weights.table(ctx, node, 0, arg(node, 1), whole(node, "axis", 0))


def recurrent(ctx: OnnxLowering, node: ir.Node) -> None:
    weight = ctx.param(node, 1, role="input weight")
    bias = ctx.bias(node, 3, weight, (weight.shape[0], 2 * weight.shape[1]))
    states = [v for i, v in enumerate(node.inputs) if i >= 4 and v is not None and not ctx.is_constant(v)]
    ctx.emit("Recurrent", node, [arg(node), *states], {}, {"weight": weight, "bias": bias}, more=node.outputs[1:])


def normalisation(ctx: OnnxLowering, node: ir.Node) -> None:
    """InstanceNormalization, LayerNormalization, GroupNormalization (opset 21 on): their own scale and bias."""
    if node.op_type == "GroupNormalization" and ctx.opset < 21:
        raise Blocked("its own scale is per group before opset 21")
    weights.normalisation(ctx, node, arg(node), 1, 2, trailing=node.op_type == "LayerNormalization")
    for extra in node.outputs[1:]:
        ctx.value(extra)  # statistics, which its own affine part doesn't touch


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


# --- affine maps ----------------------------------------------------------------------------------------------------------------------


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
            pointwise(ctx, node, "Add", *operands, multiples=(1, 1 if kind == "add" else -1))
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
    normalises = kind in ("mul", "div") and c.size > 1 and _divides(ctx, operands[which], kind == "div")
    weights.by_constant(ctx, node, kind, x, which, c, first=which == 1, shape=shape, normalises=normalises)


def _divides(ctx: OnnxLowering, v: ir.Value, under: bool) -> bool:
    """Whether a factor, or with `under` a divisor, divides by the root of a variance. A quantised layer that undoes a BatchNorm's scale
    multiplies by it."""
    stack, seen = [(v, under)], {(v, under)}
    while stack:
        v, under = stack.pop()
        if (node := v.producer()) is None or not is_standard(node):
            continue
        if _deviates(node):
            exponent = ctx.const(arg(node, 1)) if node.op_type == "Pow" else None
            if under != (exponent is not None and float(exponent.max()) < 0):
                return True
            continue
        turns = {"Reciprocal": [True], "Mul": [False, False], "Div": [False, True]}.get(node.op_type, [False] * (node.op_type in MOVING))
        found = {(x, under != turn) for x, turn in zip(node.inputs, turns, strict=False) if x is not None} - seen
        seen |= found
        stack += found
    return False


def _deviates(node: ir.Node) -> bool:
    """Whether an operator is the root of a stored vector, or of one and a number: of a BatchNorm's variance and epsilon."""
    under = node.inputs[0] if node.op_type in ("Sqrt", "Pow") else None
    maker = None if under is None else under.producer()
    sizes = [_stored_size(v) for v in (maker.inputs if maker is not None and maker.op_type == "Add" else [under])]
    return max(sizes) > 1 and sorted(sizes)[:-1] in ([], [1])


def _stored_size(v: ir.Value | None) -> int:
    """How many numbers a stored vector has, however it is laid out anew; 0 of what is computed otherwise."""
    while v is not None and (node := v.producer()) is not None and node.op_type in MOVING:
        v = node.inputs[0]
    tensor = None if v is None else stored_tensor(v)
    return 0 if tensor is None else tensor.size
