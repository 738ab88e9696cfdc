"""ATen operators in which maps end, in the terms of the rules. Each function is as `table` describes it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.fx import Node as Op
from torch.utils import _pytree as pytree

from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Layout, Param
from bnfold.folding.branches import Window

from ..export.walk import arguments, is_float, operator_name
from .lowering import Slot, TorchLowering, each


def conv(ctx: TorchLowering, op: Op) -> str | None:
    """conv1d to conv3d, conv_transpose1d to 3d, and convolution, which is all of them."""
    given, name = arguments(op), operator_name(op)
    x, weight = given["input"], ctx.param(op, given["weight"], computed=True)
    if weight is None:
        return ctx.no_weight(given["weight"])
    shape = weight.shape
    if ctx.rank(x) != len(shape):
        return "its input has no batch axis"
    settings = [given.get(name) for name in ("groups", "stride", "padding", "dilation", "output_padding")]
    if any(isinstance(leaf, Op) for leaf in pytree.tree_leaves(settings)):
        return "its settings are computed from the sizes of the input"
    groups, kernel = int(given["groups"]), shape[2:]
    transposed = bool(given.get("transposed", "transpose" in name))
    stride, dilation = (each(given[key], len(kernel)) for key in ("stride", "dilation"))
    padding = _padding(given["padding"], kernel, dilation)
    slots: dict[str, Slot | str] = {"weight": "weight"}
    attrs: dict[str, Any] = {"groups": groups}
    if transposed:
        into, out = shape[0], shape[1] * groups
        canonical = (out, into // groups, *kernel)
        weight = weight.seen_as(canonical, _swapped(shape, canonical, groups))
        plain = all(k == 1 for k in kernel) and all(s == 1 for s in stride) and not any(map(sum, padding))
        attrs |= {"uniform": plain and not any(each(given["output_padding"], len(kernel))), "uneven": "its outputs see different taps"}
    else:
        out = shape[0]
        attrs |= {"uniform": not any(map(sum, padding)), "uneven": "it pads with zeros"}
        before, after = zip(*padding, strict=True)
        attrs["window"] = Window(stride, dilation, before, after)
    bias, slot, why = ctx.bias(op, given["bias"], weight, (out,))
    if bias is None or slot is None:
        if given["bias"] is not None:
            return why
        bias, attrs["no_bias"] = Param(None, (out,)), why
    else:
        slots["bias"] = slot
    ctx.emit("Conv", op, [x], attrs, {"weight": weight, "bias": bias}, slots)
    return None


def _padding(given: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[tuple[int, int]]:
    """Zeros before and after, for each spatial axis; "same" puts the odd one behind."""
    if given == "valid":
        return [(0, 0)] * len(kernel)
    if given == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(n // 2, n - n // 2) for n in total]
    return [(n, n) for n in each(given, len(kernel))]


def _swapped(stored: tuple[int, ...], canonical: tuple[int, ...], groups: int) -> Layout:
    """[in, out/g, *kernel] as [out, in/g, *kernel]."""
    fan_in, fan_out, kernel = stored[0] // groups, stored[1], stored[2:]

    def to(w: Array) -> Array:
        return w.reshape(groups, fan_in, fan_out, *kernel).swapaxes(1, 2).reshape(canonical)

    def back(w: Array) -> Array:
        return w.reshape(groups, fan_out, fan_in, *kernel).swapaxes(1, 2).reshape(stored)

    return Layout(f"transposed in {groups} groups", to, back)


LETTERS = "abcdefgh"


def linear(ctx: TorchLowering, op: Op) -> str | None:
    """x @ W.T + b over the last axis; a vector of features is a barrier's affair."""
    given = arguments(op)
    x, weight = given["input"], ctx.param(op, given["weight"], computed=True)
    if weight is None or ctx.is_activation(given["bias"]):
        return ctx.no_weight(given["weight"])
    rank = ctx.rank(x)
    if len(weight.shape) != 2 or rank < 2:
        return "an operand is a vector"
    lead = LETTERS[: rank - 1]
    shape = (1,) * (rank - 1) + (weight.shape[0],)
    return _contraction(ctx, op, x, weight, "weight", f"{lead}k", "ok", f"{lead}o", bias_shape=shape, bias=given["bias"])


def addmm(ctx: TorchLowering, op: Op) -> str | None:
    """beta*self + alpha*(mat1 @ mat2), with one of the matrices constant."""
    given = arguments(op)
    which = next((name for name in ("mat2", "mat1") if ctx.constants.is_constant(given[name])), None)
    weight = None if which is None else ctx.param(op, given[which], computed=True)
    if which is None or weight is None:
        return ctx.no_weight(given["mat2"], given["mat1"])
    if not all(isinstance(given[name], (int, float)) for name in ("alpha", "beta")):
        return "its alpha or beta is computed"
    alpha, beta = float(given["alpha"]), float(given["beta"])
    if alpha == 0:
        return "its alpha is zero"
    weight = weight.seen_as(weight.shape, Layout(f"times {alpha}", lambda w: alpha * w, lambda w: w / alpha, gain=abs(alpha)))
    x, w = ("nk", "ko") if which == "mat2" else ("ko", "nk")
    other = given["mat1" if which == "mat2" else "mat2"]
    if beta == 0:  # what it adds isn't read at all
        return _contraction(ctx, op, other, weight, which, x, w, "no")
    added = ctx.const(given["self"])
    if added is None:
        return "what it adds is computed from the data"
    shape = (1,) * (2 - added.ndim) + added.shape
    layout = Layout(
        f"times {beta} {shape}", lambda c: beta * c.reshape(shape), lambda c: _back(c / beta, shape, added.shape), gain=abs(beta)
    )
    bias = ctx.param(op, given["self"], shape, layout, computed=True)
    if bias is None:
        return "its bias is no constant that can be rewritten"
    slots: dict[str, Slot | str] = {"weight": which, "bias": "self"}
    ctx.emit("Contraction", op, [other], {"x": x, "w": w, "y": "no"}, {"weight": weight, "bias": bias}, slots)
    return None


def _back(c: Array, canonical: tuple[int, ...], stored: tuple[int, ...]) -> Array:
    return c.reshape(stored) if c.shape == canonical else c


def matmul(ctx: TorchLowering, op: Op) -> str | None:
    """matmul, mm, bmm: by a constant on either side, batched or not; of two activations otherwise."""
    names = [name for name in arguments(op) if name in ("self", "other", "mat2")]
    given = [arguments(op)[name] for name in names]
    which = next((i for i in (1, 0) if ctx.constants.is_constant(given[i])), None)
    if min(ctx.rank(each) for each in given) < 2:
        return "an operand is a vector"
    if which is None:
        ctx.emit("MatMul", op, given)
        return None
    x, weight = given[1 - which], ctx.param(op, given[which], computed=True)
    if weight is None:
        return ctx.no_weight(*given)
    rank, shape = ctx.rank(x), weight.shape
    letters = LETTERS[: max(rank, len(shape)) - 2]
    own = letters[len(letters) - len(shape) + 2 :]
    kept = [(name, n) for name, n in zip(own, shape[:-2], strict=True) if n != 1]
    first, second = (("mk", "ko"), ("ko", "mk"))[which == 0]
    squeezed = tuple(n for _, n in kept) + shape[-2:]
    weight = ctx.param(op, given[which], squeezed, computed=True)
    assert weight is not None
    xs, ws = letters[len(letters) - rank + 2 :] + first, "".join(name for name, _ in kept) + second
    return _contraction(ctx, op, x, weight, names[which], xs, ws, letters + "mo")


def einsum(ctx: TorchLowering, op: Op) -> str | None:
    given = arguments(op)
    equation, operands = str(given["equation"]).replace(" ", ""), given["tensors"]
    left, arrow, y = equation.partition("->")
    terms = left.split(",")
    if len(operands) != 2 or sum(map(ctx.constants.is_constant, operands)) != 1:
        return "it isn't the product of one activation and one constant"
    if not arrow:
        y = "".join(sorted(name for name in set(left) - {","} if left.count(name) == 1))
    which = 1 if ctx.constants.is_constant(operands[1]) else 0
    weight = ctx.param(op, operands[which], computed=True)
    if "." in equation or weight is None or any(len(set(t)) != len(t) for t in (*terms, y)):
        return "its equation has an ellipsis or a diagonal, or its constant can't be rewritten"
    x, w = terms[1 - which], terms[which]
    if set(x) - set(w) - set(y) or set(w) - set(x) - set(y) or 1 in weight.shape:
        return "its equation sums over one operand alone, or broadcasts"
    return _contraction(ctx, op, operands[1 - which], weight, f"tensors.{which}", x, w, y)


def _contraction(
    ctx: TorchLowering,
    op: Op,
    x: Op,
    weight: Param,
    argument: str,
    xs: str,
    ws: str,
    ys: str,
    *,
    bias_shape: tuple[int, ...] | None = None,
    bias: Any = None,
) -> str | None:
    """A product. Where it has no bias of its own, and the host lets it, an Add grows behind it."""
    slots: dict[str, Slot | str] = {"weight": argument}
    params, attrs = {"weight": weight}, {"x": xs, "w": ws, "y": ys}
    if bias_shape is not None:
        found, slot, why = ctx.bias(op, bias, weight, bias_shape)
        if found is not None and slot is not None:
            params["bias"], slots["bias"] = found, slot
        elif bias is not None:
            return why
    elif ctx.host.grows:
        params["bias"], slots["bias"] = Param(None, (1,) * len(ys)), Slot("Add", op)
        attrs["grows_add"] = True  # type: ignore[assignment]
    ctx.emit("Contraction", op, [x], attrs, params, slots)
    return None


def embedding(ctx: TorchLowering, op: Op) -> str | None:
    """Rows of a table; padding_idx and the like matter in training alone."""
    given = arguments(op)
    table = ctx.param(op, given["weight"], computed=True)
    if table is None:
        return ctx.no_weight(given["weight"])
    rank = ctx.rank(given["indices"])
    ctx.emit("Table", op, [given["indices"]], {"axes": [None, rank]}, {"table": table}, {"table": "weight"})
    return None


def normalisation(ctx: TorchLowering, op: Op) -> str | None:
    """layer_norm, group_norm and instance_norm by the data's own statistics: their own scale and bias."""
    given, name = arguments(op), operator_name(op).removeprefix("native_")
    x = given["input"]
    if name == "instance_norm" and not given["use_input_stats"]:
        return "it normalises by running statistics, which no BatchNorm does in this form"
    rank, gamma = ctx.rank(x), ctx.param(op, given["weight"], computed=True)
    if gamma is None or gamma.tensor is None:
        return "its own scale is no constant that can be rewritten"
    stored = gamma.shape
    shape = (1,) * (rank - len(stored)) + stored if name == "layer_norm" else (1, *stored, *(1,) * (rank - 2))
    gamma = ctx.param(op, given["weight"], shape, computed=True)
    assert gamma is not None
    beta, slot, why = ctx.bias(op, given["bias"], gamma, shape)
    if beta is None or slot is None:
        return why
    if beta.tensor is None:
        beta = Param(None, shape, Layout("new", lambda c: c, lambda c: np.broadcast_to(c, shape).reshape(stored)))
    items = ctx.items(op)
    out = op if is_float(op) else items.get(0)
    ctx.done.update(items.values())
    ctx.emit("Normalisation", op, [x], {}, {"gamma": gamma, "beta": beta}, {"gamma": "weight", "beta": slot}, None if out is op else out)
    return None


def recurrent(ctx: TorchLowering, op: Op) -> str | None:
    """lstm, gru and rnn: the input weights of the first layer, one set for each direction (LSTM's order of gates doesn't matter here)."""
    given = arguments(op)
    if "params" not in given:
        return "its sequences are packed"
    x, flat = given["input"], list(given["params"])
    per = 4 if given["has_biases"] else 2
    directions = 2 if given["bidirectional"] else 1
    projected = len(flat) != per * directions * int(given["num_layers"])
    if projected:
        return "it projects its state"
    params: dict[str, Param] = {}
    slots: dict[str, Slot | str] = {}
    for d in range(directions):
        weight = ctx.param(op, flat[per * d])
        if weight is None:
            return ctx.no_weight(flat[per * d])
        weight = ctx.param(op, flat[per * d], (1, *weight.shape))
        assert weight is not None
        params[f"weight{d}"], slots[f"weight{d}"] = weight, f"params.{per * d}"
        if per == 4:
            bias = ctx.param(op, flat[per * d + 2], (1, weight.shape[1]))
            if bias is None:
                return "its bias is no constant that can be rewritten"
            params[f"bias{d}"], slots[f"bias{d}"] = bias, f"params.{per * d + 2}"
    states = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
    items = ctx.items(op)
    out = items.get(0)
    if out is None:
        return "its output isn't used"
    ctx.done.update(items.values())
    made = ctx.emit("Recurrent", op, [x, *[s for s in states if ctx.is_activation(s)]], {}, params, slots, out)
    for index, item in sorted(items.items()):
        if index:
            value = ctx.value(item)
            value.producer = made
            made.outputs.append(value)
    return None
