"""ONNX operators that let maps cross, in the terms of the rules. Each function is as `table` describes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from bnfold.algebra.commuting import picks
from bnfold.algebra.graph import Layout, Param

from ..graph.constants import FLOATS
from ..graph.walk import arg, attribute, number, wholes
from .lowering import Lower, OnnxLowering, given
from .movement import MOVES, sequence


def used(node: ir.Node, index: int) -> bool:
    """Whether somebody reads the node's output at `index`."""
    return (
        len(node.outputs) > index
        and bool(node.outputs[index].name)
        and bool(node.outputs[index].uses() or node.outputs[index].is_graph_output())
    )


# --- one activation ----------------------------------------------------------------------------------------------------------


def elementwise(op: str) -> Lower:
    def lower(ctx: OnnxLowering, node: ir.Node) -> str | None:
        ctx.set_rank(node.outputs[0], ctx.rank(arg(node)))
        ctx.emit(op, node, [arg(node)])
        return None

    return lower


def identity(ctx: OnnxLowering, node: ir.Node) -> str | None:
    return sequence(ctx, node) if ctx.sequences.makes(node) else elementwise("Identity")(ctx, node)


def dropout(ctx: OnnxLowering, node: ir.Node) -> str | None:
    if ctx.opset < 7 and not attribute(node, "is_test", 0):
        return "it is in training mode"
    if given(node, 2) is not None:
        mode = ctx.const(node, 2)
        if mode is None or bool(mode.any()):
            return "it is, or may be, in training mode"
    return elementwise("Identity")(ctx, node)


def cast(ctx: OnnxLowering, node: ir.Node) -> str | None:
    if not all(ctx.shapes.dtype(v) in FLOATS for v in (arg(node), node.outputs[0])):
        return "it casts from or to a type that isn't floating point"
    return elementwise("Identity")(ctx, node)


def clip(ctx: OnnxLowering, node: ir.Node) -> str | None:
    low = ctx.static(node, "min", 1, [-np.inf])
    high = ctx.static(node, "max", 2, [np.inf])
    if low is None or high is None:
        return "its bounds are computed"
    if low[0] == 0 and high[0] >= 3.4e38:
        return elementwise("Relu")(ctx, node)
    return "it clips at a bound other than zero"


def prelu(ctx: OnnxLowering, node: ir.Node) -> str | None:
    return elementwise("Relu")(ctx, node) if ctx.is_const(node, 1) else "its slope is computed"


def _space(ctx: OnnxLowering, node: ir.Node) -> tuple[int, ...] | None:
    rank = ctx.rank(arg(node)) or ctx.rank(node.outputs[0])
    if rank is None and "kernel_shape" in node.attributes:
        rank = len(wholes(node, "kernel_shape")) + 2
    if rank is None:
        return None
    ctx.set_rank(arg(node), rank)
    ctx.set_rank(node.outputs[0], rank)
    return tuple(range(2, rank))


def windowed(op: str) -> Lower:
    def lower(ctx: OnnxLowering, node: ir.Node) -> str | None:
        mixes = _space(ctx, node)
        if mixes is None:
            return "the rank of its input isn't known"
        attrs: dict[str, Any] = {"mixes": mixes, "strict": op == "Max" and used(node, 1)}  # a scale of 0 would move its indices
        attrs["picks"] = op == "Max" and _picks(ctx, node, mixes)
        counted = attribute(node, "count_include_pad", 0) and (pads(node) or attribute(node, "ceil_mode", 0))
        if op == "Average" and counted:
            ctx.emit("Pad", node, [arg(node)], {**attrs, "fill": 0.0})
        else:
            ctx.emit(op, node, [arg(node)], attrs)
        return None

    return lower


def _picks(ctx: OnnxLowering, node: ir.Node, axes: tuple[int, ...]) -> bool:
    """Whether each window of a maximum holds one element."""
    sizes = ctx.value(arg(node)).sizes
    along = [None if sizes is None else sizes[axis] for axis in axes]
    if "kernel_shape" not in node.attributes:
        return all(n == 1 for n in along)
    kernel = wholes(node, "kernel_shape")
    return picks(along, kernel, wholes(node, "dilations") or (1,) * len(axes), padded=pads(node, kernel))


def pads(node: ir.Node, kernel: tuple[int, ...] | None = None) -> bool:
    """Whether a window may reach past the border. SAME padding of a kernel of ones pads nothing."""
    mode = attribute(node, "auto_pad", "NOTSET") or "NOTSET"
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        return kernel is None or any(k != 1 for k in kernel)
    return mode == "NOTSET" and any(wholes(node, "pads"))


def reduced(op: str) -> Lower:
    def lower(ctx: OnnxLowering, node: ir.Node) -> str | None:
        rank = ctx.rank(arg(node))
        if rank is None:
            return "the rank of its input isn't known"
        axes = ctx.static(node, "axes", 1, [])
        if axes is None:
            return "its axes are computed"
        if not axes:
            if attribute(node, "noop_with_empty_axes", 0):
                return "it reduces nothing"
            axes = range(rank)
        mixes = tuple(sorted({int(axis) % rank for axis in axes}))
        attrs = {"mixes": mixes, "drops": not attribute(node, "keepdims", 1), "picks": op == "Max" and _picks(ctx, node, mixes)}
        ctx.emit(op, node, [arg(node)], attrs)
        return None

    return lower


def resize(ctx: OnnxLowering, node: ir.Node) -> str | None:
    if attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return "it extrapolates"
    x, y = ctx.value(arg(node)), ctx.value(node.outputs[0])
    if x.rank is None:
        return "the rank of its input isn't known"
    mixes: tuple[int, ...] = tuple(range(x.rank))
    scales = ctx.static(node, "scales", 1 if node.op_type == "Upsample" or ctx.opset < 11 else 2, [])
    axes = wholes(node, "axes") or tuple(range(x.rank))
    if scales:
        mixes = tuple(int(axis) % x.rank for axis, scale in zip(axes, scales, strict=False) if scale != 1)
    elif x.probes and y.probes:
        mixes = tuple(i for i in mixes if any(a[i] is None or a[i] != b[i] for a, b in zip(x.probes, y.probes, strict=False)))
    ctx.emit("Resize", node, [arg(node)], {"mixes": mixes})
    return None


def pad(ctx: OnnxLowering, node: ir.Node) -> str | None:
    mode = attribute(node, "mode", "constant")
    if mode != "constant":
        return MOVES["Pad"](ctx, node)
    rank = ctx.rank(arg(node))
    if rank is None:
        return "the rank of its input isn't known"
    pads = ctx.static(node, "pads" if "pads" in node.attributes else "paddings", 1)
    axes = ctx.static(node, "", 3, list(range(rank)))
    mixes = tuple(range(rank))
    if pads is not None and axes is not None:
        half = len(pads) // 2
        mixes = tuple(int(axis) % rank for axis, lo, hi in zip(axes, pads[:half], pads[half:], strict=False) if lo or hi)
    if not mixes:
        return elementwise("Identity")(ctx, node)
    attrs: dict[str, Any] = {"mixes": mixes, "fill": 0.0}
    params: dict[str, Param] = {}
    slots: dict[str, int | str] = {}
    if ctx.opset < 11:
        attrs["fill"] = number(node, "value", 0.0)
        params, slots = {"fill": Param(None, (), default=attrs["fill"])}, {"fill": "value"}
    elif given(node, 2) is None:
        params, slots = {"fill": Param(None, ())}, {"fill": 2}
    else:
        fill = ctx.const(node, 2)
        param = ctx.param(node, 2)
        if fill is None or param is None:
            return "it pads with a computed value"
        attrs["fill"] = float(fill.ravel()[0])
        params, slots = {"fill": Param(param.tensor, ())}, {"fill": 2}
        params["fill"].layout = Layout("scalar", lambda w: w.reshape(()), lambda w: w.reshape(fill.shape))
    ctx.emit("Pad", node, [arg(node)], attrs, params, slots)
    return None


def rectifies(ctx: OnnxLowering, node: ir.Node) -> bool:
    """Whether a Max is a Relu in other words, as ONNX Runtime writes it: of one activation and one zero."""
    constant = [v for v in node.inputs if v is not None and ctx.constants.is_constant(v)]
    if node.op_type != "Max" or len(node.inputs) != 2 or len(constant) != 1:
        return False
    zero, rank = ctx.constants.get(constant[0]), ctx.rank(next(v for v in node.inputs if v is not None and v is not constant[0]))
    return zero is not None and zero.size == 1 and not zero.any() and rank is not None and zero.ndim <= rank


def maximum(ctx: OnnxLowering, node: ir.Node) -> str | None:
    if not rectifies(ctx, node):
        return several("Maximum")(ctx, node)
    x = next(v for v in node.inputs if v is not None and not ctx.constants.is_constant(v))
    ctx.set_rank(node.outputs[0], ctx.rank(x))
    ctx.emit("Relu", node, [x])
    return None


def several(op: str, **attrs: Any) -> Lower:
    def lower(ctx: OnnxLowering, node: ir.Node) -> str | None:
        inputs = [v for v in node.inputs if v is not None]
        ranks = [ctx.rank(v) for v in inputs if not ctx.constants.is_constant(v)]
        if None not in ranks and ranks:
            ctx.set_rank(node.outputs[0], max(r for r in ranks if r is not None))
        ctx.emit(op, node, inputs, attrs)
        return None

    return lower


def where(ctx: OnnxLowering, node: ir.Node) -> str | None:
    if not ctx.is_const(node, 0):
        return several("Where", selectors=1)(ctx, node)
    return "its condition is a constant"
