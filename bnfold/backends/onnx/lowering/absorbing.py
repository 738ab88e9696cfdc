"""ONNX operators in which maps end, in the terms of the rules; those of com.microsoft, too, that ONNX Runtime writes where it optimises.

One of them is one of the standard's linear operators, and what it fused in. Of products of integers the scales are worked out when the
model runs, as ONNX Runtime quantises dynamically:

    y = x_integer . w_integer * (x_scale * w_scale) + b        of DynamicQuantizeLinear, ConvInteger or MatMulInteger, Cast, Mul, Mul, Add

In real arithmetic that is (x_integer . w_integer * x_scale) * w_scale, and w_scale is a constant factor, which takes a map's scale as any
other does; so no integer changes, and its sign may.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from bnfold.algebra import weights
from bnfold.algebra.affine import Array, Blocked
from bnfold.algebra.graph import Param, Value
from bnfold.algebra.layouts import Layout
from bnfold.algebra.lowering import NO_RULE
from bnfold.data.spec import shape_text
from bnfold.errors import ModelError

from ..graph.walk import MICROSOFT, arg, attribute, is_standard, name_of, number, whole, wholes
from .commuting import padding
from .lowering import Lower, OnnxLowering, OnnxNative, given
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
    alpha = number(node, "alpha", 1.0)
    if any(attribute(node, f"transBatch{x}", 0) for x in "AB") or not alpha:
        raise Blocked("it moves its batch axes, or multiplies by zero")
    swaps = bool(attribute(node, "transA", 0)), bool(attribute(node, "transB", 0))
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


STRETCHING = ("Relu", "LeakyRelu")


def activated(lower: Lower) -> Lower:
    """The linear operator, what is added to it, and the activation behind: each a node of its own to the rules, none of them to double."""

    def run(ctx: OnnxLowering, node: ir.Node) -> None:
        made = ctx.value(node.outputs[0])
        inner = Value(f"{made.name}:linear", made.probes, made.rank)
        with ctx.standing_in(node.outputs[0], inner):
            lower(ctx, node)
        linear = ctx.nodes[-1]
        linear.attrs["cloneable"] = False
        linear.attrs.pop("window", None)  # it doesn't merge with a branch beside it
        made.rank = inner.rank
        attrs = {"limit": linear.attrs["limit"], "cloneable": False}
        if node.op_type == "FusedConv" and given(node, 3) is not None:
            added = Value(f"{made.name}:sum", made.probes, made.rank)
            stated = {**attrs, "settings": partial(fused, node, "Add")}
            both = OnnxNative(node, positions=[0, 3])
            ctx.add("Add", node, [inner, ctx.value(arg(node, 3))], [added], stated, {}, both).label = "Add"
            inner = added
        kind, why = _activation(node)
        label = _name(node) or node.op_type
        attrs |= {"why": why, "settings": partial(fused, node, label)}
        ctx.add(kind, node, [inner], [made], attrs, {}, OnnxNative(node)).label = label

    return run


def _name(node: ir.Node) -> str:
    return str(attribute(node, "activation", "") or "")


def _activation(node: ir.Node) -> tuple[str, str]:
    """The row of the rules that an activation belongs to, and why no map crosses it where there is none."""
    name = _name(node)
    if not name:
        return "Identity", ""
    bounds = attribute(node, "activation_params", None)
    if name in STRETCHING or (name == "Clip" and bounds is not None and bounds[0] == 0 and bounds[1] >= 3.4e38):  # type: ignore[index]
        return "Relu", ""
    return "Barrier", "it clips at a bound other than zero" if name == "Clip" else NO_RULE


FUSED: dict[str, Lower] = {
    f"{MICROSOFT}::FusedConv": activated(conv),
    f"{MICROSOFT}::FusedGemm": activated(gemm),
    f"{MICROSOFT}::FusedMatMul": matmul,
}


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
