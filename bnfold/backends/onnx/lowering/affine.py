"""ONNX operators that are affine maps: BatchNormalization, and Add, Sub, Mul, Div by a constant. These are the sites."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Layout, Norm, Param

from ..graph.walk import arg, attribute, in_training, number, whole
from .commuting import several, used
from .lowering import OnnxLowering

BN_ROLES = ("gamma", "beta", "running mean", "running variance")


def batchnorm(ctx: OnnxLowering, node: ir.Node) -> str | None:
    """gamma*(x - mean)/sqrt(var + epsilon) + beta along axis 1; `spatial=0` (opset < 9) has parameters [C, H, W]."""
    x = arg(node)
    constants = [ctx.constants.get(v) for v in node.inputs[1:5]]
    gamma, _, mean, var = constants
    missing = [role for role, c in zip(BN_ROLES, constants, strict=True) if c is None]
    shape_of = next((c.shape for c in constants if c is not None), ())
    channels = math.prod(shape_of) if shape_of else _inferred(ctx, node)
    rank = ctx.rank(x)
    if rank is None and shape_of:
        rank = ctx.rank(node.outputs[0])
    ctx.set_rank(node.outputs[0], rank)
    refusal = None
    if in_training(node, ctx.opset):
        told = f", which its {len(node.outputs)} outputs say, read or not" if 7 <= ctx.opset < 14 else ""
        refusal = f"it is in training mode{told}: it normalises each batch by itself"
    elif any(used(node, i) for i in range(1, len(node.outputs))):
        refusal = "its further outputs are read, which only training mode gives"
    elif missing:
        refusal = f"its {missing[0]} is not a constant, or callers may override it"
    elif rank is None:
        refusal = "the rank of its input isn't known"
    else:
        refusal = _sick(constants, number(node, "epsilon", 1e-5))
    if refusal is not None:
        ctx.barrier(node, refusal)
        ctx.site(node, ctx.nodes[-1], channels, is_batchnorm=True, refusal=refusal)
        return None
    assert gamma is not None
    assert mean is not None
    assert var is not None
    assert rank is not None
    shape = (1, *gamma.shape) if gamma.ndim > 1 else (1, gamma.size, *(1,) * (rank - 2))
    shape += (1,) * (rank - len(shape))
    gain = 1 / np.sqrt(var.reshape(shape) + number(node, "epsilon", 1e-5))
    params = {role: param for role, i in (("gamma", 1), ("beta", 2)) if (param := ctx.param(node, i, shape)) is not None}
    if len(params) < 2:
        ctx.barrier(node, "its parameters are quantised")
        ctx.site(node, ctx.nodes[-1], channels, is_batchnorm=True, refusal="its parameters are quantised")
        return None
    attrs = {"gain": gain, "mean": mean.reshape(shape), "dead": int((gamma == 0).sum())}
    vectors = [np.asarray(c, np.float64).ravel() for c in constants]
    attrs["norm"] = Norm(vectors[0], vectors[1], vectors[2], vectors[3], number(node, "epsilon", 1e-5))
    made = ctx.emit("Affine", node, [x], attrs, params, {"gamma": 1, "beta": 2})
    odd = ctx.opset < 9 and not attribute(node, "spatial", 1) and gamma.ndim == 1 and rank > 2
    note = "its file says spatial=0, but its parameters are one per channel: read as spatial=1" if odd else ""
    ctx.site(tuple(node.inputs[3:5]), made, gamma.shape[0] if gamma.ndim else 1, is_batchnorm=True, note=note)
    return None


def _inferred(ctx: OnnxLowering, node: ir.Node) -> int:
    """The channels of a BatchNorm without a constant parameter, as its input or its gamma tells them; 0 where neither does."""
    sizes = [shape[axis] for v, axis in ((arg(node), 1), (arg(node, 1), 0)) if (shape := ctx.value(v).sizes) and len(shape) > axis]
    return next((size for size in sizes if size is not None), 0)


def _sick(constants: list[Any], epsilon: float) -> str | None:
    """What makes parameters unusable, with the channel: not finite, or a negative variance; computed ones may differ in shape."""
    if len({c.shape for c in constants}) > 1:
        return "its parameters differ in shape: " + ", ".join(f"{role} {c.shape}" for role, c in zip(BN_ROLES, constants, strict=True))
    for role, c in zip(BN_ROLES, constants, strict=True):
        if not np.isfinite(c).all():
            k = int(np.argwhere(~np.isfinite(c.ravel()))[0, 0])
            return f"its {role} is {c.ravel()[k]} in channel {k}"
    var = constants[3].ravel()
    if (var < 0).any():
        k = int(np.argmax(var < 0))
        return f"its running variance is negative ({var[k]:.3g}) in channel {k}"
    if not np.isfinite(epsilon):
        return f"its epsilon is {epsilon}"
    if (var + epsilon <= 0).any():
        return f"its running variance and epsilon are both zero in channel {int(np.argmax(var + epsilon <= 0))}"
    return None


def negation(ctx: OnnxLowering, node: ir.Node) -> str | None:
    """-x, the affine map that no parameter can change."""
    ctx.set_rank(node.outputs[0], ctx.rank(arg(node)))
    if ctx.rank(arg(node)) is None:
        return "the rank of its input isn't known"
    ctx.emit("Affine", node, [arg(node)], {"gain": -1.0})
    return None


def arithmetic(ctx: OnnxLowering, node: ir.Node) -> str | None:
    """Add, Sub, Mul, Div: of two activations, or by a constant, which makes an affine operator."""
    constant = [ctx.is_const(node, i) for i in (0, 1)]
    if not ctx.floating(arg(node)) or not ctx.floating(arg(node, 1)):
        return "it isn't floating point"
    if not any(constant):
        if ctx.opset < 7 and attribute(node, "broadcast", 0):
            return "it broadcasts an activation in the way of opset 6"
        if node.op_type in ("Add", "Sub"):
            return several("Add", signs=(1, 1 if node.op_type == "Add" else -1))(ctx, node)
        return several("Mul", factors=2 if node.op_type == "Mul" else 1)(ctx, node)
    which = constant.index(True)
    x, c = arg(node, 1 - which), arg(node, which)
    tensor, rank = ctx.tensor(c), ctx.rank(x)
    array = ctx.constants.get(c)
    if tensor is None or array is None:
        return ctx.no_tensor(node, which, "constant")
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
        layout = Layout(f"reciprocal {shape}", lambda w: 1 / w.reshape(shape), lambda w: _stored(1 / w, shape, array.shape), linear=False)
    attrs["gain"] = sign
    made = ctx.emit("Affine", node, [x], attrs, {role: Param(tensor, shape, layout)}, {role: which})
    vector = [n for n in shape if n != 1]
    behind_affine = made.inputs[0].producer is not None and made.inputs[0].producer.op == "Affine"
    if len(vector) == 1 or (not vector and behind_affine):  # a scalar alone is not worth moving
        ctx.site(made, made, vector[0] if vector else 1, is_batchnorm=False)
    return None


def _aligned(ctx: OnnxLowering, node: ir.Node, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The constant's shape in the rank of the tensor; before opset 7 an attribute says where it aligns."""
    if ctx.opset < 7 and attribute(node, "broadcast", 0) and "axis" in node.attributes:
        lead = whole(node, "axis", 0) % rank
        return (1,) * lead + shape + (1,) * (rank - lead - len(shape))
    return (1,) * (rank - len(shape)) + shape


def _stored(w: Array, canonical: tuple[int, ...], stored: tuple[int, ...]) -> Array:
    return w.reshape(stored) if w.shape == canonical else w


def _signed(sign: float, canonical: tuple[int, ...], stored: tuple[int, ...]) -> Layout:
    return Layout(f"{sign} {canonical}", lambda w: sign * w.reshape(canonical), lambda w: _stored(sign * w, canonical, stored))
