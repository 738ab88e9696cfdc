"""ONNX operators in which maps end, in the terms of the rules. Each function is as `table` describes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from bnfold.algebra.graph import Layout, Param
from bnfold.data.spec import shape_text
from bnfold.errors import ModelError
from bnfold.folding.branches import Window

from ..graph.walk import arg, attribute, name_of, number, whole, wholes
from .commuting import pads
from .lowering import OnnxLowering, given
from .movement import MOVES

WRONG_BIAS = (
    "torch.onnx.export writes such a file for a Conv3d without bias where its optimiser is off: fuse the module itself, or export it "
    "with dynamo=False, training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False"
)


def conv(ctx: OnnxLowering, node: ir.Node) -> str | None:
    weight = ctx.param(node, 1)
    if weight is None:
        return ctx.no_tensor(node, 1, "weight")
    deformed = node.op_type == "DeformConv"
    place = 3 if deformed else 2
    if (why := _bias_trouble(ctx, node, place)) is not None:
        return why
    shape, groups = weight.shape, whole(node, "group", 1)
    for v in (arg(node), node.outputs[0]):
        ctx.set_rank(v, len(shape))
    if node.op_type == "ConvTranspose":
        into, out = shape[0], shape[1] * groups
        canonical = (out, into // groups, *shape[2:])
        weight = Param(weight.tensor, canonical, _transposed(shape, canonical, groups))
        plain = all(k == 1 for k in shape[2:]) and all(s == 1 for s in wholes(node, "strides"))
        uniform = plain and not pads(node, shape[2:]) and not any(wholes(node, "output_padding"))
        uniform = uniform and "output_shape" not in node.attributes
        uneven = "its outputs see different taps"
    else:
        out, uniform, uneven = shape[0], not pads(node, shape[2:]), "it pads with zeros"
    steers = []
    if deformed:  # where it reads beyond the border it reads zeros, and how much of each tap counts is computed too
        uniform, uneven = False, "it reads zeros beyond the border"
        steers = [arg(node, 2), *([arg(node, 4)] if given(node, 4) is not None else [])]
    stored = None if given(node, place) is None else ctx.tensor(arg(node, place))
    if stored is not None and stored.shape != (out,):
        shape_found = shape_text(stored.shape)
        raise ModelError(
            f"{node.op_type} {name_of(node)} has a bias of shape {shape_found}, and the standard asks for one number for each of its {out} "
            f"output channels, so no runtime takes the file; {WRONG_BIAS if len(shape) == 5 else 'export it again'}"
        )
    bias = ctx.param(node, place, (out,)) or Param(None, (out,))
    attrs = {"groups": groups, "uniform": uniform, "uneven": uneven}
    if node.op_type == "Conv" and (window := _window(node, shape[2:])) is not None:
        attrs["window"] = window
    ctx.emit("Conv", node, [arg(node), *steers], attrs, {"weight": weight, "bias": bias}, {"weight": 1, "bias": place})
    return None


def _window(node: ir.Node, kernel: tuple[int, ...]) -> Window | None:
    """How the kernel slides; None where the padding depends on the input's size."""
    ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
    stride, dilation = (wholes(node, name, ones) for name in ("strides", "dilations"))
    mode = attribute(node, "auto_pad", "NOTSET") or "NOTSET"
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if stride != ones or any(n % 2 for n in total):
            return None
        return Window(stride, dilation, tuple(n // 2 for n in total), tuple(n // 2 for n in total))
    padding = wholes(node, "pads") if mode == "NOTSET" else ()
    padding = padding or zeros + zeros
    return Window(stride, dilation, padding[: len(kernel)], padding[len(kernel) :])


def _bias_trouble(ctx: OnnxLowering, node: ir.Node, index: int) -> str | None:
    v = given(node, index)
    if v is not None and ctx.tensor(v) is None:
        return ctx.no_tensor(node, index, "bias")
    return None


def _transposed(stored: tuple[int, ...], canonical: tuple[int, ...], groups: int) -> Layout:
    """[in, out/g, *kernel] as [out, in/g, *kernel]."""
    fan_in, fan_out, kernel = stored[0] // groups, stored[1], stored[2:]

    def to(w: Any) -> Any:
        return w.reshape(groups, fan_in, fan_out, *kernel).swapaxes(1, 2).reshape(canonical)

    def back(w: Any) -> Any:
        return w.reshape(groups, fan_out, fan_in, *kernel).swapaxes(1, 2).reshape(stored)

    return Layout(f"transposed in {groups} groups", to, back)


def gemm(ctx: OnnxLowering, node: ir.Node) -> str | None:
    """alpha * A' @ B' + beta * C with one of A and B constant."""
    which = next((i for i in (1, 0) if ctx.is_const(node, i)), None)
    param = None if which is None else ctx.param(node, which)
    if which is None:
        return "neither of its matrices is a float constant that callers may not override"
    if param is None:
        return ctx.no_tensor(node, which, "weight")
    if (why := _bias_trouble(ctx, node, 2)) is not None:
        return why
    alpha, beta = (number(node, name, 1.0) for name in ("alpha", "beta"))
    if alpha == 0 or len(param.shape) != 2:
        return "its alpha is zero" if alpha == 0 else "its weight is not a matrix"
    a = "kn" if attribute(node, "transA", 0) else "nk"
    b = "ok" if attribute(node, "transB", 0) else "ko"
    x, w = (a, b) if which == 1 else (b, a)
    param.layout = Layout(f"times {alpha}", lambda c: alpha * c, lambda c: c / alpha, gain=abs(alpha))
    bias_value = ctx.const(node, 2)
    stored = () if bias_value is None else bias_value.shape
    canonical = (1,) * (2 - len(stored)) + tuple(stored)

    def back(c: Any) -> Any:
        return (
            c.reshape(stored)
            if given(node, 2) is not None and c.shape == canonical
            else c.reshape(c.shape[1:] if c.shape[0] == 1 else c.shape)
        )

    def times_beta(c: Any) -> Any:
        return beta * c.reshape(canonical) if beta else np.zeros(canonical)  # what isn't read may hold anything

    layout = Layout(f"times {beta}", times_beta, back, gain=abs(beta), linear=True)
    bias = ctx.param(node, 2, canonical, layout) or Param(None, (1, 1), Layout("new", lambda c: c, back))
    for v in (arg(node), arg(node, 1), node.outputs[0]):
        if not ctx.constants.is_constant(v):
            ctx.set_rank(v, 2)
    reset = {"beta": ir.AttrFloat32("beta", 1.0)} | ({"broadcast": ir.AttrInt64("broadcast", 1)} if ctx.opset < 7 else {})
    inputs = [arg(node, 1 - which)]
    slots: dict[str, int | str] = {"weight": which, "bias": 2}
    ctx.emit("Contraction", node, inputs, {"x": x, "w": w, "y": "no"}, {"weight": param, "bias": bias}, slots, reset=reset)
    return None


def matmul(ctx: OnnxLowering, node: ir.Node) -> str | None:
    """Matrix product by a constant on either side, batched or not; of two activations otherwise.

    ONNX Runtime's FusedMatMul multiplies by `alpha` too, and may transpose its operands.
    """
    swaps = [bool(attribute(node, name, 0)) for name in ("transA", "transB")]
    alpha = number(node, "alpha", 1.0)
    if any(attribute(node, f"transBatch{x}", 0) for x in "AB") or not alpha:
        return "it moves its batch axes, or multiplies by zero"
    which = next((i for i in (1, 0) if ctx.is_const(node, i)), None)
    if which is None:
        ranks = [ctx.rank(v) for v in node.inputs if v is not None]
        if None in ranks or min(r or 0 for r in ranks) < 2:
            return "its operands are vectors, or of unknown rank"
        if any(swaps):
            return "it transposes a computed operand"
        ctx.emit("MatMul", node, [arg(node, 0), arg(node, 1)])
        return None
    weight = ctx.param(node, which)
    x = arg(node, 1 - which)
    assert x is not None
    rank = ctx.rank(x)
    if weight is None:
        return ctx.no_tensor(node, which, "weight")
    if rank is None or rank < 2 or len(weight.shape) < 2:
        return "an operand is a vector, or of unknown rank"
    letters = "abcdefgh"[: max(rank, len(weight.shape)) - 2]
    shape = weight.shape
    lead = "".join(name for name, n in zip(letters[len(letters) - len(shape) + 2 :], shape[:-2], strict=True) if n != 1)
    terms = ["km" if swaps[0] else "mk", "ok" if swaps[1] else "ko"]
    first, second = terms[1 - which], terms[which]
    xs, ws = letters[len(letters) - rank + 2 :] + first, lead + second
    squeezed = tuple(n for name, n in zip(letters[len(letters) - len(shape) + 2 :], shape[:-2], strict=True) if n != 1) + shape[-2:]
    scaled = None
    if alpha != 1:
        scaled = Layout(f"times {alpha}", lambda c: alpha * c.reshape(squeezed), lambda c: c.reshape(shape) / alpha, gain=abs(alpha))
    weight = ctx.param(node, which, squeezed, scaled)
    if weight is None:
        return ctx.no_tensor(node, which, "weight")
    return _contraction(ctx, node, x, weight, which, xs, ws, letters + "mo")


def einsum(ctx: OnnxLowering, node: ir.Node) -> str | None:
    if len(node.inputs) != 2 or sum(ctx.is_const(node, i) for i in (0, 1)) != 1:
        return "it isn't the product of one activation and one constant"
    equation = str(attribute(node, "equation", "")).replace(" ", "")
    left, arrow, y = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        y = "".join(sorted(name for name in set(left) - {","} if left.count(name) == 1))
    which = 1 if ctx.is_const(node, 1) else 0
    weight = ctx.param(node, which)
    if weight is None:
        return ctx.no_tensor(node, which, "constant")
    if "." in equation or any(len(set(t)) != len(t) for t in (*terms, y)):
        return "its equation has an ellipsis or a diagonal"
    x, w = terms[1 - which], terms[which]
    if set(x) - set(w) - set(y) or set(w) - set(x) - set(y) or 1 in weight.shape:
        return "its equation sums over one operand alone, or broadcasts"
    return _contraction(ctx, node, arg(node, 1 - which), weight, which, x, w, y)


def _contraction(ctx: OnnxLowering, node: ir.Node, x: ir.Value, weight: Param, which: int, xs: str, ws: str, ys: str) -> str | None:
    """A product without a bias of its own: where it needs one, an Add grows behind it."""
    ctx.set_rank(node.outputs[0], len(ys))
    if ctx.rank(node.outputs[0]) != len(ys) or ctx.rank(x) != len(xs):
        return "its rank isn't certain"
    bias = Param(None, (1,) * len(ys))
    attrs = {"x": xs, "w": ws, "y": ys, "grows_add": True}
    ctx.emit("Contraction", node, [x], attrs, {"weight": weight, "bias": bias}, {"weight": which, "bias": "Add"})
    return None


def gather(ctx: OnnxLowering, node: ir.Node) -> str | None:
    """A table looked up by an activation (Embedding); an activation at constant places is a move."""
    if not ctx.is_const(node, 0):
        return MOVES["Gather"](ctx, node)
    table, rank = ctx.param(node, 0), ctx.rank(arg(node, 1))
    if table is None:
        return ctx.no_tensor(node, 0, "table")
    if rank is None:
        return "the rank of its indices isn't known"
    axis = whole(node, "axis", 0) % len(table.shape)
    axes = [i if i < axis else None if i == axis else i + rank - 1 for i in range(len(table.shape))]
    ctx.emit("Table", node, [arg(node, 1)], {"axes": axes}, {"table": table}, {"table": 0})
    return None


def recurrent(ctx: OnnxLowering, node: ir.Node) -> str | None:
    weight = ctx.param(node, 1)
    if weight is None:
        return ctx.no_tensor(node, 1, "input weight")
    if (why := _bias_trouble(ctx, node, 3)) is not None:
        return why
    size = (weight.shape[0], 2 * weight.shape[1])
    params = {"weight": weight, "bias": ctx.param(node, 3) or Param(None, size)}
    states = [v for i, v in enumerate(node.inputs) if i >= 4 and v is not None and not ctx.constants.is_constant(v)]
    made = ctx.emit("Recurrent", node, [arg(node), *states], {}, params, {"weight": 1, "bias": 3})
    for v in node.outputs[1:]:
        value = ctx.value(v)
        value.producer = made
        made.outputs.append(value)
    return None


def normalisation(ctx: OnnxLowering, node: ir.Node) -> str | None:
    """InstanceNormalization, LayerNormalization, GroupNormalization (opset 21 on): their own scale and bias."""
    x, tensor = arg(node), None if given(node, 1) is None else ctx.tensor(arg(node, 1))
    rank = ctx.rank(x)
    if tensor is None:
        return ctx.no_tensor(node, 1, "own scale")
    if rank is None:
        return "the rank of its input isn't known"
    if node.op_type == "GroupNormalization" and ctx.opset < 21:
        return "its own scale is per group before opset 21"
    if (why := _bias_trouble(ctx, node, 2)) is not None:
        return why
    if node.op_type == "LayerNormalization":
        shape = (1,) * (rank - len(tensor.shape)) + tensor.shape
    else:
        shape = (1, tensor.shape[0], *(1,) * (rank - 2))
    beta = ctx.param(node, 2, shape) or Param(
        None, shape, Layout("new", lambda c: c, lambda c: np.broadcast_to(c, shape).reshape(tensor.shape))
    )
    gamma = ctx.param(node, 1, shape)
    if gamma is None:
        return ctx.no_tensor(node, 1, "own scale")
    ctx.emit("Normalisation", node, [x], {}, {"gamma": gamma, "beta": beta}, {"gamma": 1, "beta": 2})
    for extra in node.outputs[1:]:
        ctx.value(extra)  # statistics, which its own affine part doesn't touch
    return None
