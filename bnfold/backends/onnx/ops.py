"""The table of this front-end: each ONNX operator in the terms of the rules.

Every function lowers one node and returns None, or returns the clause that says why no map may cross it. Read OPERATORS at
the end first. Specification: https://onnx.ai/onnx/operators, all opsets from 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from ...graph import Layout, Param
from ...merge import Window
from .constants import FLOATS
from .lower import Lowering, given
from .ops_moves import MOVES
from .walk import attribute

Lower = Callable[[Lowering, ir.Node], "str | None"]


def _used(node: ir.Node, index: int) -> bool:
    """Whether somebody reads the node's output at `index`."""
    return len(node.outputs) > index and bool(node.outputs[index].name) and bool(node.outputs[index].uses() or node.outputs[index].is_graph_output())


# --- one activation ----------------------------------------------------------------------------------------------------------


def _elementwise(op: str) -> Lower:
    def lower(ctx: Lowering, node: ir.Node) -> str | None:
        ctx.set_rank(node.outputs[0], ctx.rank(node.inputs[0]))
        ctx.emit(op, node, [node.inputs[0]])
        return None

    return lower


def _dropout(ctx: Lowering, node: ir.Node) -> str | None:
    if ctx.opset < 7 and not attribute(node, "is_test", 0):
        return "it is in training mode"
    if given(node, 2) is not None:
        mode = ctx.const(node, 2)
        if mode is None or bool(mode.any()):
            return "it is, or may be, in training mode"
    if _used(node, 1):
        return "its mask is used"
    return _elementwise("Identity")(ctx, node)


def _cast(ctx: Lowering, node: ir.Node) -> str | None:
    if not all(ctx.shapes.dtype(v) in FLOATS for v in (node.inputs[0], node.outputs[0])):
        return "it casts from or to a type that isn't floating point"
    return _elementwise("Identity")(ctx, node)


def _clip(ctx: Lowering, node: ir.Node) -> str | None:
    low = ctx.static(node, "min", 1, [-np.inf])
    high = ctx.static(node, "max", 2, [np.inf])
    if low is None or high is None:
        return "its bounds are computed"
    if low[0] == 0 and high[0] >= 3.4e38:
        return _elementwise("Relu")(ctx, node)
    return "it clips at a bound other than zero"


def _prelu(ctx: Lowering, node: ir.Node) -> str | None:
    return _elementwise("Relu")(ctx, node) if ctx.is_const(node, 1) else "its slope is computed"


def _space(ctx: Lowering, node: ir.Node) -> tuple[int, ...] | None:
    rank = ctx.rank(node.inputs[0]) or ctx.rank(node.outputs[0])
    kernel = attribute(node, "kernel_shape")
    if rank is None and kernel is not None:
        rank = len(kernel) + 2  # type: ignore[arg-type]
    if rank is None:
        return None
    ctx.set_rank(node.inputs[0], rank)
    ctx.set_rank(node.outputs[0], rank)
    return tuple(range(2, rank))


def _windowed(op: str) -> Lower:
    def lower(ctx: Lowering, node: ir.Node) -> str | None:
        mixes = _space(ctx, node)
        if mixes is None:
            return "the rank of its input isn't known"
        if op == "Max" and _used(node, 1):
            return "its indices are used"
        attrs: dict[str, Any] = {"mixes": mixes}
        counted = attribute(node, "count_include_pad", 0) and (_pads(node) or attribute(node, "ceil_mode", 0))
        if op == "Average" and counted:
            ctx.emit("Pad", node, [node.inputs[0]], {**attrs, "fill": 0.0})
        else:
            ctx.emit(op, node, [node.inputs[0]], attrs)
        return None

    return lower


def _pads(node: ir.Node, kernel: tuple[int, ...] | None = None) -> bool:
    """Whether a window may reach past the border. SAME padding of a kernel of ones pads nothing."""
    mode = attribute(node, "auto_pad", "NOTSET") or "NOTSET"
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        return kernel is None or any(k != 1 for k in kernel)
    return mode == "NOTSET" and any(attribute(node, "pads", ()))  # type: ignore[arg-type]


def _reduced(op: str) -> Lower:
    def lower(ctx: Lowering, node: ir.Node) -> str | None:
        rank = ctx.rank(node.inputs[0])
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
        ctx.emit(op, node, [node.inputs[0]], {"mixes": mixes, "drops": not attribute(node, "keepdims", 1)})
        return None

    return lower


def _resize(ctx: Lowering, node: ir.Node) -> str | None:
    if attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return "it extrapolates"
    x, y = ctx.value(node.inputs[0]), ctx.value(node.outputs[0])
    if x.rank is None:
        return "the rank of its input isn't known"
    mixes: tuple[int, ...] = tuple(range(x.rank))
    scales = ctx.static(node, "scales", 1 if node.op_type == "Upsample" or ctx.opset < 11 else 2, [])
    axes = attribute(node, "axes") or range(x.rank)
    if scales:
        mixes = tuple(int(axis) % x.rank for axis, scale in zip(axes, scales, strict=False) if scale != 1)  # type: ignore[call-overload]
    elif x.probes and y.probes:
        mixes = tuple(i for i in mixes if any(a[i] is None or a[i] != b[i] for a, b in zip(x.probes, y.probes, strict=False)))
    ctx.emit("Resize", node, [node.inputs[0]], {"mixes": mixes})
    return None


def _pad(ctx: Lowering, node: ir.Node) -> str | None:
    mode = attribute(node, "mode", "constant")
    if mode != "constant":
        return MOVES["Pad"](ctx, node)
    rank = ctx.rank(node.inputs[0])
    if rank is None:
        return "the rank of its input isn't known"
    pads = ctx.static(node, "pads" if "pads" in node.attributes else "paddings", 1)
    axes = ctx.static(node, "", 3, list(range(rank)))
    mixes = tuple(range(rank))
    if pads is not None and axes is not None:
        half = len(pads) // 2
        mixes = tuple(int(axis) % rank for axis, lo, hi in zip(axes, pads[:half], pads[half:], strict=False) if lo or hi)
    attrs: dict[str, Any] = {"mixes": mixes, "fill": 0.0}
    params: dict[str, Param] = {}
    slots: dict[str, int | str] = {}
    if ctx.opset < 11:
        attrs["fill"] = float(attribute(node, "value", 0.0))  # type: ignore[arg-type]
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
    ctx.emit("Pad", node, [node.inputs[0]], attrs, params, slots)
    return None


# --- several activations, and constants ------------------------------------------------------------------------------------------


def _several(op: str, **attrs: Any) -> Lower:
    def lower(ctx: Lowering, node: ir.Node) -> str | None:
        inputs = [v for v in node.inputs if v is not None]
        ranks = [ctx.rank(v) for v in inputs if not ctx.constants.is_constant(v)]
        if None not in ranks and ranks:
            ctx.set_rank(node.outputs[0], max(r for r in ranks if r is not None))
        ctx.emit(op, node, inputs, attrs)
        return None

    return lower


def _arithmetic(ctx: Lowering, node: ir.Node) -> str | None:
    """Add, Sub, Mul, Div: of two activations, or by a constant, which makes an affine operator."""
    constant = [ctx.is_const(node, i) for i in (0, 1)]
    if not ctx.floating(node.inputs[0]) or not ctx.floating(node.inputs[1]):
        return "it isn't floating point"
    if not any(constant):
        if ctx.opset < 7 and attribute(node, "broadcast", 0):
            return "it broadcasts an activation in the way of opset 6"
        if node.op_type in ("Add", "Sub"):
            return _several("Add", signs=(1, 1 if node.op_type == "Add" else -1))(ctx, node)
        return _several("Mul", factors=2 if node.op_type == "Mul" else 1)(ctx, node)
    which = constant.index(True)
    x, c = node.inputs[1 - which], node.inputs[which]
    assert x is not None and c is not None
    tensor, rank = ctx.tensor(c), ctx.rank(x)
    array = ctx.constants.get(c)
    if tensor is None or array is None:
        return "its constant is quantised"
    if rank is None:
        return "the rank of its input isn't known"
    if node.op_type == "Div" and which == 0:
        return "it divides by an activation"
    shape = _aligned(ctx, node, array.shape, rank)
    sizes = ctx.value(x).sizes
    if len(shape) != rank or sizes is None or any(n != 1 and n != own for n, own in zip(shape, sizes, strict=True)):
        return "its constant makes the tensor larger, or may"
    attrs: dict[str, Any] = {"grows": True}
    role, sign, layout = "beta", 1.0, _signed(1.0, shape, array.shape)
    if node.op_type == "Sub":
        sign = -1.0 if which == 0 else 1.0
        layout = _signed(1.0 if which == 0 else -1.0, shape, array.shape)
    elif node.op_type == "Mul":
        role = "gamma"
    elif node.op_type == "Div":
        role = "gamma"
        if (array == 0).any():
            return "it divides by zero"
        layout = Layout(
            f"reciprocal {shape}", lambda w: 1 / w.reshape(shape), lambda w: _stored(1 / w, shape, array.shape), linear=False
        )
    attrs["gain"] = sign
    made = ctx.emit("Affine", node, [x], attrs, {role: Param(tensor, shape, layout)}, {role: which})
    vector = [n for n in shape if n != 1]
    behind_affine = made.inputs[0].producer is not None and made.inputs[0].producer.op == "Affine"
    if len(vector) == 1 or (not vector and behind_affine):  # a scalar alone is not worth moving
        ctx.site(made, made, vector[0] if vector else 1, is_batchnorm=False)
    return None


def _aligned(ctx: Lowering, node: ir.Node, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The constant's shape in the rank of the tensor; before opset 7 an attribute says where it aligns."""
    axis = attribute(node, "axis")
    if ctx.opset < 7 and attribute(node, "broadcast", 0) and axis is not None:
        lead = int(axis) % rank  # type: ignore[call-overload]
        return (1,) * lead + shape + (1,) * (rank - lead - len(shape))
    return (1,) * (rank - len(shape)) + shape


def _stored(w: Any, canonical: tuple[int, ...], stored: tuple[int, ...]) -> Any:
    return w.reshape(stored) if w.shape == canonical else w


def _signed(sign: float, canonical: tuple[int, ...], stored: tuple[int, ...]) -> Layout:
    return Layout(f"{sign} {canonical}", lambda w: sign * w.reshape(canonical), lambda w: _stored(sign * w, canonical, stored))


def _where(ctx: Lowering, node: ir.Node) -> str | None:
    if not ctx.is_const(node, 0):
        return _several("Where", selectors=1)(ctx, node)
    return "its condition is a constant"


# --- BatchNormalization ------------------------------------------------------------------------------------------------------------

BN_ROLES = ("gamma", "beta", "running mean", "running variance")


def _batchnorm(ctx: Lowering, node: ir.Node) -> str | None:
    """gamma*(x - mean)/sqrt(var + epsilon) + beta along axis 1; `spatial=0` (opset < 9) has parameters [C, H, W]."""
    x = node.inputs[0]
    assert x is not None
    constants = [ctx.constants.get(v) for v in node.inputs[1:5]]
    gamma, beta, mean, var = constants
    missing = [role for role, c in zip(BN_ROLES, constants, strict=True) if c is None]
    channels = 0 if gamma is None else gamma.size
    shape_of = next((c.shape for c in constants if c is not None), ())
    rank = ctx.rank(x)
    if rank is None and shape_of:
        rank = ctx.rank(node.outputs[0])
    ctx.set_rank(node.outputs[0], rank)
    training = bool(attribute(node, "training_mode", 0)) or any(_used(node, i) for i in range(1, len(node.outputs)))
    training |= ctx.opset < 7 and not attribute(node, "is_test", 0)
    refusal = None
    if training:
        refusal = "it is in training mode: it normalises each batch by itself"
    elif missing:
        refusal = f"its {missing[0]} is not a constant, or callers may override it"
    elif rank is None:
        refusal = "the rank of its input isn't known"
    else:
        refusal = _sick(constants, float(attribute(node, "epsilon", 1e-5)))  # type: ignore[arg-type]
    if refusal is not None:
        ctx.barrier(node, refusal)
        ctx.site(node, ctx.nodes[-1], channels, is_batchnorm=True, refusal=refusal)
        return None
    assert gamma is not None and mean is not None and var is not None and rank is not None
    shape = (1, *gamma.shape) if gamma.ndim > 1 else (1, gamma.size, *(1,) * (rank - 2))
    shape += (1,) * (rank - len(shape))
    gain = 1 / np.sqrt(var.reshape(shape) + float(attribute(node, "epsilon", 1e-5)))  # type: ignore[arg-type]
    params = {role: ctx.param(node, i, shape) for role, i in (("gamma", 1), ("beta", 2))}
    if None in params.values():
        ctx.barrier(node, "its parameters are quantised")
        ctx.site(node, ctx.nodes[-1], channels, is_batchnorm=True, refusal="its parameters are quantised")
        return None
    attrs = {"gain": gain, "mean": mean.reshape(shape), "dead": int((gamma == 0).sum())}
    made = ctx.emit("Affine", node, [x], attrs, params, {"gamma": 1, "beta": 2})  # type: ignore[arg-type]
    ctx.site(tuple(node.inputs[3:5]), made, gamma.shape[0] if gamma.ndim else 1, is_batchnorm=True)
    return None


def _sick(constants: list[Any], epsilon: float) -> str | None:
    """What makes parameters unusable, with the channel: not finite, or a negative variance."""
    for role, c in zip(BN_ROLES, constants, strict=True):
        if not np.isfinite(c).all():
            k = int(np.argwhere(~np.isfinite(c.ravel()))[0, 0])
            return f"its {role} is {c.ravel()[k]} in channel {k}"
    var = constants[3].ravel()
    if (var < 0).any():
        k = int(np.argmax(var < 0))
        return f"its running variance is negative ({var[k]:.3g}) in channel {k}"
    if (var + epsilon <= 0).any():
        return f"its running variance and epsilon are both zero in channel {int(np.argmax(var + epsilon <= 0))}"
    return None


# --- what absorbs ------------------------------------------------------------------------------------------------------------------


def _conv(ctx: Lowering, node: ir.Node) -> str | None:
    weight = ctx.param(node, 1)
    if weight is None:
        return "its weight is not a float constant, or callers may override it"
    if (why := _bias_trouble(ctx, node, 2)) is not None:
        return why
    shape, groups = weight.shape, int(attribute(node, "group", 1))  # type: ignore[call-overload]
    for v in (node.inputs[0], node.outputs[0]):
        ctx.set_rank(v, len(shape))  # type: ignore[arg-type]
    if node.op_type == "ConvTranspose":
        into, out = shape[0], shape[1] * groups
        canonical = (out, into // groups, *shape[2:])
        weight = Param(weight.tensor, canonical, _transposed(shape, canonical, groups))
        plain = all(k == 1 for k in shape[2:]) and all(s == 1 for s in attribute(node, "strides", (1,)))  # type: ignore[attr-defined]
        uniform = plain and not _pads(node, shape[2:]) and not any(attribute(node, "output_padding", ()))  # type: ignore[arg-type]
        uniform = uniform and "output_shape" not in node.attributes
        uneven = "its outputs see different taps"
    else:
        out, uniform, uneven = shape[0], not _pads(node, shape[2:]), "it pads with zeros"
    bias = ctx.param(node, 2, (out,)) or Param(None, (out,))
    attrs = {"groups": groups, "uniform": uniform, "uneven": uneven}
    if node.op_type == "Conv" and (window := _window(node, shape[2:])) is not None:
        attrs["window"] = window
    ctx.emit("Conv", node, [node.inputs[0]], attrs, {"weight": weight, "bias": bias}, {"weight": 1, "bias": 2})  # type: ignore[list-item]
    return None


def _window(node: ir.Node, kernel: tuple[int, ...]) -> Window | None:
    """How the kernel slides; None where the padding depends on the input's size."""
    ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
    stride, dilation = (tuple(attribute(node, name, ones)) for name in ("strides", "dilations"))  # type: ignore[arg-type]
    mode = attribute(node, "auto_pad", "NOTSET") or "NOTSET"
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if stride != ones or any(n % 2 for n in total):
            return None
        return Window(stride, dilation, tuple(n // 2 for n in total), tuple(n // 2 for n in total))
    pads = tuple(attribute(node, "pads", ()) or ()) if mode == "NOTSET" else ()  # type: ignore[arg-type]
    pads = pads or zeros + zeros
    return Window(stride, dilation, pads[: len(kernel)], pads[len(kernel) :])


def _bias_trouble(ctx: Lowering, node: ir.Node, index: int) -> str | None:
    v = given(node, index)
    if v is not None and ctx.tensor(v) is None:
        return "its bias is not a float constant, or callers may override it"
    return None


def _transposed(stored: tuple[int, ...], canonical: tuple[int, ...], groups: int) -> Layout:
    """[in, out/g, *kernel] as [out, in/g, *kernel]."""
    fan_in, fan_out, kernel = stored[0] // groups, stored[1], stored[2:]

    def to(w: Any) -> Any:
        return w.reshape(groups, fan_in, fan_out, *kernel).swapaxes(1, 2).reshape(canonical)

    def back(w: Any) -> Any:
        return w.reshape(groups, fan_out, fan_in, *kernel).swapaxes(1, 2).reshape(stored)

    return Layout(f"transposed in {groups} groups", to, back)


def _gemm(ctx: Lowering, node: ir.Node) -> str | None:
    """alpha * A' @ B' + beta * C with one of A and B constant."""
    which = next((i for i in (1, 0) if ctx.is_const(node, i)), None)
    param = None if which is None else ctx.param(node, which)
    if which is None or param is None:
        return "neither of its matrices is a float constant that callers may not override"
    if (why := _bias_trouble(ctx, node, 2)) is not None:
        return why
    alpha, beta = (float(attribute(node, name, 1.0)) for name in ("alpha", "beta"))  # type: ignore[arg-type]
    if alpha == 0 or len(param.shape) != 2:
        return "its alpha is zero" if alpha == 0 else "its weight is not a matrix"
    a = "kn" if attribute(node, "transA", 0) else "nk"
    b = "ok" if attribute(node, "transB", 0) else "ko"
    x, w = (a, b) if which == 1 else (b, a)
    param.layout = Layout(f"times {alpha}", lambda c: alpha * c, lambda c: c / alpha, gain=abs(alpha))
    stored = () if given(node, 2) is None else ctx.const(node, 2).shape  # type: ignore[union-attr]
    canonical = (1,) * (2 - len(stored)) + tuple(stored)

    def back(c: Any) -> Any:
        return c.reshape(stored) if given(node, 2) is not None and c.shape == canonical else c.reshape(c.shape[1:] if c.shape[0] == 1 else c.shape)

    layout = Layout(f"times {beta}", lambda c: beta * c.reshape(canonical), back, gain=abs(beta), linear=True)
    bias = ctx.param(node, 2, canonical, layout) or Param(None, (1, 1), Layout("new", lambda c: c, back))
    for v in (node.inputs[0], node.inputs[1], node.outputs[0]):
        if not ctx.constants.is_constant(v):
            ctx.set_rank(v, 2)  # type: ignore[arg-type]
    reset = {"beta": ir.AttrFloat32("beta", 1.0)} | ({"broadcast": ir.AttrInt64("broadcast", 1)} if ctx.opset < 7 else {})
    inputs = [node.inputs[1 - which]]
    slots: dict[str, int | str] = {"weight": which, "bias": 2}
    ctx.emit("Contraction", node, inputs, {"x": x, "w": w, "y": "no"}, {"weight": param, "bias": bias}, slots, reset=reset)  # type: ignore[arg-type]
    return None


def _matmul(ctx: Lowering, node: ir.Node) -> str | None:
    """Matrix product by a constant on either side, batched or not; of two activations otherwise."""
    which = next((i for i in (1, 0) if ctx.is_const(node, i)), None)
    if which is None:
        ranks = [ctx.rank(v) for v in node.inputs if v is not None]
        if None in ranks or min(r or 0 for r in ranks) < 2:
            return "its operands are vectors, or of unknown rank"
        ctx.emit("MatMul", node, list(node.inputs))  # type: ignore[arg-type]
        return None
    weight = ctx.param(node, which)
    x = node.inputs[1 - which]
    assert x is not None
    rank = ctx.rank(x)
    if weight is None:
        return "its weight is not a float constant, or callers may override it"
    if rank is None or rank < 2 or len(weight.shape) < 2:
        return "an operand is a vector, or of unknown rank"
    letters = "abcdefgh"[: max(rank, len(weight.shape)) - 2]
    shape = weight.shape
    lead = "".join(l for l, n in zip(letters[len(letters) - len(shape) + 2 :], shape[:-2], strict=True) if n != 1)
    first, second = (("mk", "ko"), ("ko", "mk"))[which == 0]
    xs, ws = letters[len(letters) - rank + 2 :] + first, lead + second
    squeezed = tuple(n for l, n in zip(letters[len(letters) - len(shape) + 2 :], shape[:-2], strict=True) if n != 1) + shape[-2:]
    weight = ctx.param(node, which, squeezed)
    return _contraction(ctx, node, x, weight, which, xs, ws, letters + "mo")  # type: ignore[arg-type]


def _einsum(ctx: Lowering, node: ir.Node) -> str | None:
    if len(node.inputs) != 2 or sum(ctx.is_const(node, i) for i in (0, 1)) != 1:
        return "it isn't the product of one activation and one constant"
    equation = str(attribute(node, "equation", "")).replace(" ", "")
    left, arrow, y = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        y = "".join(sorted(l for l in set(left) - {","} if left.count(l) == 1))
    which = 1 if ctx.is_const(node, 1) else 0
    weight = ctx.param(node, which)
    if "." in equation or weight is None or any(len(set(t)) != len(t) for t in (*terms, y)):
        return "its equation has an ellipsis or a diagonal, or its constant is quantised"
    x, w = terms[1 - which], terms[which]
    if set(x) - set(w) - set(y) or set(w) - set(x) - set(y) or 1 in weight.shape:
        return "its equation sums over one operand alone, or broadcasts"
    return _contraction(ctx, node, node.inputs[1 - which], weight, which, x, w, y)  # type: ignore[arg-type]


def _contraction(ctx: Lowering, node: ir.Node, x: ir.Value, weight: Param, which: int, xs: str, ws: str, ys: str) -> str | None:
    """A product without a bias of its own: where it needs one, an Add grows behind it."""
    ctx.set_rank(node.outputs[0], len(ys))
    if ctx.rank(node.outputs[0]) != len(ys) or ctx.rank(x) != len(xs):
        return "its rank isn't certain"
    bias = Param(None, (1,) * len(ys))
    attrs = {"x": xs, "w": ws, "y": ys, "grows_add": True}
    ctx.emit("Contraction", node, [x], attrs, {"weight": weight, "bias": bias}, {"weight": which, "bias": "Add"})
    return None


def _gather(ctx: Lowering, node: ir.Node) -> str | None:
    """A table looked up by an activation (Embedding); an activation at constant places is a move."""
    if not ctx.is_const(node, 0):
        return MOVES["Gather"](ctx, node) if ctx.is_const(node, 1) else "its indices are computed"
    table, rank = ctx.param(node, 0), ctx.rank(node.inputs[1])  # type: ignore[arg-type]
    if table is None or rank is None:
        return "its table is not a float constant, or the rank of its indices isn't known"
    axis = int(attribute(node, "axis", 0)) % len(table.shape)  # type: ignore[call-overload]
    axes = [i if i < axis else None if i == axis else i + rank - 1 for i in range(len(table.shape))]
    ctx.emit("Table", node, [node.inputs[1]], {"axes": axes}, {"table": table}, {"table": 0})  # type: ignore[list-item]
    return None


def _recurrent(ctx: Lowering, node: ir.Node) -> str | None:
    weight = ctx.param(node, 1)
    if weight is None:
        return "its input weight is not a float constant, or callers may override it"
    if (why := _bias_trouble(ctx, node, 3)) is not None:
        return why
    size = (weight.shape[0], 2 * weight.shape[1])
    params = {"weight": weight, "bias": ctx.param(node, 3) or Param(None, size)}
    states = [v for i, v in enumerate(node.inputs) if i >= 4 and v is not None and not ctx.constants.is_constant(v)]
    made = ctx.emit("Recurrent", node, [node.inputs[0], *states], {}, params, {"weight": 1, "bias": 3})  # type: ignore[list-item]
    for v in node.outputs[1:]:
        value = ctx.value(v)
        value.producer = made
        made.outputs.append(value)
    return None


def _normalisation(ctx: Lowering, node: ir.Node) -> str | None:
    """InstanceNormalization, LayerNormalization, GroupNormalization (opset 21 on): their own scale and bias."""
    x, tensor = node.inputs[0], None if given(node, 1) is None else ctx.tensor(node.inputs[1])  # type: ignore[arg-type]
    rank = ctx.rank(x)  # type: ignore[arg-type]
    if tensor is None or rank is None:
        return "its own scale is not a float constant, or the rank of its input isn't known"
    if node.op_type == "GroupNormalization" and ctx.opset < 21:
        return "its own scale is per group before opset 21"
    if (why := _bias_trouble(ctx, node, 2)) is not None:
        return why
    if node.op_type == "LayerNormalization":
        shape = (1,) * (rank - len(tensor.shape)) + tensor.shape
    else:
        shape = (1, tensor.shape[0], *(1,) * (rank - 2))
    beta = ctx.param(node, 2, shape) or Param(None, shape, Layout("new", lambda c: c, lambda c: np.broadcast_to(c, shape).reshape(tensor.shape)))
    ctx.emit("Normalisation", node, [x], {}, {"gamma": ctx.param(node, 1, shape), "beta": beta}, {"gamma": 1, "beta": 2})  # type: ignore[dict-item, list-item]
    for extra in node.outputs[1:]:
        ctx.value(extra)  # statistics, which its own affine part doesn't touch
    return None


OPERATORS: dict[str, Lower] = {
    "BatchNormalization": _batchnorm,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Einsum": _einsum,
    "Gather": _gather,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "InstanceNormalization": _normalisation,
    "LayerNormalization": _normalisation,
    "GroupNormalization": _normalisation,
    "Add": _arithmetic,
    "Sub": _arithmetic,
    "Mul": _arithmetic,
    "Div": _arithmetic,
    "Sum": _several("Add"),
    "Mean": _several("Mean"),
    "Max": _several("Maximum"),
    "Min": _several("Maximum"),
    "Where": _where,
    "Identity": _elementwise("Identity"),
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast,
    "Relu": _elementwise("Relu"),
    "LeakyRelu": _elementwise("Relu"),
    "PRelu": _prelu,
    "Abs": _elementwise("Relu"),
    "Clip": _clip,
    "MaxPool": _windowed("Max"),
    "GlobalMaxPool": _windowed("Max"),
    "AveragePool": _windowed("Average"),
    "GlobalAveragePool": _windowed("Average"),
    "LpPool": _windowed("Relu"),
    "GlobalLpPool": _windowed("Relu"),
    "ReduceMean": _reduced("Average"),
    "ReduceSum": _reduced("Sum"),
    "ReduceMax": _reduced("Max"),
    "ReduceMin": _reduced("Max"),
    "ReduceL1": _reduced("Relu"),
    "ReduceL2": _reduced("Relu"),
    "Resize": _resize,
    "Upsample": _resize,
    "Pad": _pad,
    **{name: lower for name, lower in MOVES.items() if name not in ("Pad", "Gather")},
}
