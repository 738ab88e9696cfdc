"""ONNX operators in which maps end, in the terms of the rules."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bnfold.algebra import weights
from bnfold.algebra.affine import Array, Blocked
from bnfold.algebra.graph import Param
from bnfold.algebra.layouts import Layout
from bnfold.data.spec import shape_text
from bnfold.errors import ModelError

from ..graph.walk import arg, attribute, name_of, number, whole, wholes
from .commuting import padding
from .lowering import OnnxLowering, given
from .movement import gathered

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
