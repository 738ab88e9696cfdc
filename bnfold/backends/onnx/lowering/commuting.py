"""ONNX operators that let maps cross, in the terms of the rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from bnfold.algebra import geometry
from bnfold.algebra.affine import Blocked
from bnfold.algebra.geometry import pointwise
from bnfold.algebra.graph import Param
from bnfold.algebra.layouts import scaled
from bnfold.algebra.weights import same_padding

from ..graph.constants import FLOATS
from ..graph.walk import arg, attribute, number, whole, wholes
from .lowering import Lower, OnnxLowering, given
from .movement import mirror, sequence, widths

SAME = ("SAME_UPPER", "SAME_LOWER")


def used(node: ir.Node, index: int) -> bool:
    """Whether somebody reads the node's output at `index`."""
    v = node.outputs[index] if len(node.outputs) > index else None
    return v is not None and bool(v.name) and bool(v.uses() or v.is_graph_output())


def elementwise(kind: str) -> Lower:
    def lower(ctx: OnnxLowering, node: ir.Node) -> None:
        pointwise(ctx, node, kind, arg(node))

    return lower


def several(kind: str, **attrs: Any) -> Lower:
    def lower(ctx: OnnxLowering, node: ir.Node) -> None:
        pointwise(ctx, node, kind, *(v for v in node.inputs if v is not None), **attrs)

    return lower


def identity(ctx: OnnxLowering, node: ir.Node) -> None:
    (sequence if ctx.sequences.makes(node) else elementwise("Identity"))(ctx, node)


def dropout(ctx: OnnxLowering, node: ir.Node) -> None:
    if ctx.opset < 7 and not attribute(node, "is_test", 0):
        raise Blocked("it is in training mode")
    mode = ctx.const(given(node, 2))
    if given(node, 2) is not None and (mode is None or bool(mode.any())):
        raise Blocked("it is, or may be, in training mode")
    pointwise(ctx, node, "Identity", arg(node))


def cast(ctx: OnnxLowering, node: ir.Node) -> None:
    if not all(ctx.shapes.dtype(v) in FLOATS for v in (arg(node), node.outputs[0])):
        raise Blocked("it casts from or to a type that isn't floating point")
    pointwise(ctx, node, "Identity", arg(node))


def clip(ctx: OnnxLowering, node: ir.Node) -> None:
    low, high = ctx.static(node, "min", 1, [-np.inf]), ctx.static(node, "max", 2, [np.inf])
    if low is None or high is None:
        raise Blocked("its bounds are computed")
    _clips(ctx, node, arg(node), low[0], high[0])


def relu(ctx: OnnxLowering, node: ir.Node) -> None:
    _clips(ctx, node, arg(node), 0.0, None)


def _clips(ctx: OnnxLowering, node: ir.Node, x: ir.Value, low: float, high: float | None) -> None:
    geometry.clip(ctx, node, x, low, high)
    if ctx.opset < 8:
        ctx.nodes[-1].attrs["clips"] = "before opset 8 a Max doesn't broadcast"


def prelu(ctx: OnnxLowering, node: ir.Node) -> None:
    if not ctx.is_constant(arg(node, 1)):
        raise Blocked("its slope is computed")
    pointwise(ctx, node, "Relu", arg(node))


def padding(node: ir.Node, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """Zeros before and after, for each spatial axis; None where they depend on the input's size."""
    mode = attribute(node, "auto_pad", "NOTSET") or "NOTSET"
    if mode in SAME:
        found = same_padding(kernel, dilation)
        even = all(low == high for low, high in found) and set(stride) <= {1}
        return found if even or set(kernel) <= {1} else None
    pads = wholes(node, "pads") if mode == "NOTSET" else ()
    return list(zip(pads, pads[len(pads) // 2 :], strict=False)) if pads else [(0, 0)] * len(kernel)


def pads(node: ir.Node, kernel: tuple[int, ...] | None = None) -> bool:
    """Whether a window may reach past the border. SAME padding of a kernel of ones pads nothing."""
    mode = attribute(node, "auto_pad", "NOTSET") or "NOTSET"
    if mode in SAME:
        return kernel is None or set(kernel) != {1}
    return mode == "NOTSET" and any(wholes(node, "pads"))


def windowed(kind: str) -> Lower:
    def lower(ctx: OnnxLowering, node: ir.Node) -> None:
        kernel = wholes(node, "kernel_shape") or None
        rank = ctx.value(arg(node)).rank or ctx.value(node.outputs[0]).rank or (None if kernel is None else len(kernel) + 2)
        if rank is None:
            raise Blocked("the rank of its input isn't known")
        for v in (arg(node), node.outputs[0]):
            ctx.set_rank(v, rank)
        padded, beyond = pads(node, kernel), bool(attribute(node, "ceil_mode", 0))
        geometry.pool(
            ctx,
            node,
            kind,
            arg(node),
            tuple(range(2, rank)),
            kernel,
            wholes(node, "dilations"),
            padded=padded,
            counted=kind == "Average" and bool(attribute(node, "count_include_pad", 0) and (padded or beyond)),
            strict=kind == "Max" and used(node, 1),
            stride=None if padded or beyond else wholes(node, "strides", (1,) * (rank - 2)),
        )

    return lower


def reduced(kind: str) -> Lower:
    def lower(ctx: OnnxLowering, node: ir.Node) -> None:
        axes = ctx.static(node, "axes", 1, [])
        if axes is None:
            raise Blocked("its axes are computed")
        if not axes and attribute(node, "noop_with_empty_axes", 0):
            raise Blocked("it reduces nothing")
        geometry.reduction(ctx, node, kind, arg(node), axes or None, drops=not attribute(node, "keepdims", 1))

    return lower


def resize(ctx: OnnxLowering, node: ir.Node) -> None:
    if attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        raise Blocked("it extrapolates")
    x, y, rank = ctx.value(arg(node)), ctx.value(node.outputs[0]), ctx.rank(arg(node))
    mixes: tuple[int, ...] = tuple(range(rank))
    scales = ctx.static(node, "scales", 1 if node.op_type == "Upsample" or ctx.opset < 11 else 2, [])
    axes = wholes(node, "axes") or mixes
    if scales:
        mixes = tuple(int(axis) % rank for axis, scale in zip(axes, scales, strict=False) if scale != 1)
    elif x.probes and y.probes:
        kept = geometry.keeping(ctx.around(arg(node), node.outputs[0]))
        mixes = tuple(i for i in mixes if i not in kept)
    ctx.emit("Resize", node, [arg(node)], {"mixes": mixes})


def sample(ctx: OnnxLowering, node: ir.Node) -> None:
    """Interpolation at computed places."""
    space, zeros = tuple(range(2, ctx.rank(arg(node)))), attribute(node, "padding_mode", "zeros") == "zeros"
    geometry.pool(ctx, node, "Resize", arg(node), space, counted=zeros, places=[arg(node, 1)])


def pad(ctx: OnnxLowering, node: ir.Node) -> None:
    if attribute(node, "mode", "constant") != "constant":
        mirror(ctx, node)
        return
    rank, stated = ctx.rank(arg(node)), widths(ctx, node)
    axes = range(rank) if stated is None else [i for i, each in enumerate(stated) if each != (0, 0)]
    if ctx.opset < 11:
        fill = number(node, "value", 0.0)
        single = ctx.shapes.dtype(arg(node)) != ir.DataType.DOUBLE  # of which an attribute holds few
        param = Param(None, (), default=fill, slot="value") if single else None
    elif given(node, 2) is None:
        fill, param = 0.0, Param(None, (), slot=2)
    elif axes:
        array = ctx.const(given(node, 2))
        if array is None or ctx.tensor(arg(node, 2)) is None:
            raise Blocked("it pads with a computed value")
        fill, param = float(array.ravel()[0]), ctx.param(node, 2, (), scaled((), array.shape))
    geometry.pad(ctx, node, arg(node), axes, fill if axes else 0.0, param if axes else None)


def rectifies(ctx: OnnxLowering, node: ir.Node) -> bool:
    """Whether a Max is a Relu in other words, as ONNX Runtime writes it: of one activation and one zero."""
    constant = [v for v in node.inputs if v is not None and ctx.is_constant(v)]
    if node.op_type != "Max" or len(node.inputs) != 2 or len(constant) != 1:
        return False
    zero, rank = ctx.const(constant[0]), ctx.value(_other(ctx, node)).rank
    return zero is not None and zero.size == 1 and not zero.any() and rank is not None and zero.ndim <= rank


def _other(ctx: OnnxLowering, node: ir.Node) -> ir.Value:
    return next(v for v in node.inputs if v is not None and not ctx.is_constant(v))


def maximum(ctx: OnnxLowering, node: ir.Node) -> None:
    if rectifies(ctx, node):
        _clips(ctx, node, _other(ctx, node), 0.0, None)
    else:
        given = [v for v in node.inputs if v is not None]
        pointwise(ctx, node, "Maximum", *given, **geometry.bounds_of(ctx, node, given, above=node.op_type == "Min"))


def scatter(ctx: OnnxLowering, node: ir.Node) -> None:
    """ScatterElements and ScatterND that add to zeros, or take the largest or smallest beside zero."""
    kind, made, places = attribute(node, "reduction", "none"), arg(node).producer(), ctx.value(arg(node, 1))
    if kind not in ("add", "max", "min"):
        raise Blocked("it puts elements at computed places" if kind == "none" else f"it reduces by {kind}")
    fill: Any = attribute(made, "value", None) if made is not None and made.op_type == "ConstantOfShape" else None
    zeros = fill.numpy() if fill is not None else ctx.const(arg(node))
    if zeros is None or zeros.any():
        raise Blocked("what it adds to isn't known to be zero")
    if node.op_type == "ScatterND" and (places.sizes is None or len(places.sizes) != 2 or places.sizes[1] != 1):
        raise Blocked("which axes its places are of isn't known")
    geometry.scatter(ctx, node, arg(node, 2), whole(node, "axis", 0) % ctx.rank(arg(node, 2)), sums=kind == "add")


def where(ctx: OnnxLowering, node: ir.Node) -> None:
    if ctx.is_constant(arg(node)):
        raise Blocked("its condition is a constant")
    several("Where", selectors=1)(ctx, node)
