"""ATen operators that let maps cross, in the terms of the rules. Each function is as `table` describes it."""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Node as Op

from bnfold.algebra.commuting import picks
from bnfold.algebra.graph import Param

from ..export.walk import arguments, is_float, operator_name
from .lowering import Lower, Slot, TorchLowering, each
from .movement import mirror_pad


def first(op: Op) -> Op:
    """The operator's first tensor, whatever its schema calls it."""
    source = next(value for value in arguments(op).values() if isinstance(value, Op))
    return source


def elementwise(kind: str) -> Lower:
    def lower(ctx: TorchLowering, op: Op) -> str | None:
        if not is_float(first(op)):
            return "its input isn't floating point"
        ctx.emit(kind, op, [first(op)])
        return None

    return lower


def dropout(ctx: TorchLowering, op: Op) -> str | None:
    given = arguments(op)
    if given.get("train", given.get("training", True)):
        return "it is in training mode"
    items = ctx.items(op)
    ctx.done.update(items.values())
    ctx.emit("Identity", op, [first(op)], output=items.get(0) if not is_float(op) else None)
    return None


def clamp(ctx: TorchLowering, op: Op) -> str | None:
    given = arguments(op)
    low, high = (given.get(name) for name in ("min", "max"))
    if operator_name(op) == "hardtanh":
        low, high = given["min_val"], given["max_val"]
    if low == 0 and (high is None or high == math.inf):
        return elementwise("Relu")(ctx, op)
    return "it clips at a bound other than zero"


def threshold(ctx: TorchLowering, op: Op) -> str | None:
    given = arguments(op)
    return elementwise("Relu")(ctx, op) if given["threshold"] == 0 and given["value"] == 0 else "it cuts at a bound other than zero"


def prelu(ctx: TorchLowering, op: Op) -> str | None:
    slope = next(value for name, value in arguments(op).items() if name != "self")
    return elementwise("Relu")(ctx, op) if ctx.constants.is_constant(slope) else "its slope is computed"


def rrelu(ctx: TorchLowering, op: Op) -> str | None:
    return "it is in training mode" if arguments(op)["training"] else elementwise("Relu")(ctx, op)


def windowed(kind: str) -> Lower:
    """Pools over the last one, two or three axes."""

    def lower(ctx: TorchLowering, op: Op) -> str | None:
        given, name, rank = arguments(op), operator_name(op), ctx.rank(first(op))
        dims = next(n for n in (1, 2, 3) if f"{n}d" in name)
        items = ctx.items(op)
        out = op if is_float(op) else items.get(0)
        if out is None:
            return "its output isn't used"
        attrs: dict[str, Any] = {"mixes": tuple(range(rank - dims, rank)), "strict": 1 in items}
        padded = any(ctx.sizes.static(given.get("padding"), [0]) or [0])
        if kind == "Max":
            attrs["picks"] = _picks(ctx, op, out, dims, padded=padded)
        counted = given.get("count_include_pad") and padded
        if kind == "Average" and given.get("divisor_override") is not None:
            return "it divides by another number than it adds"
        if counted:
            ctx.emit("Pad", op, [first(op)], {**attrs, "fill": 0.0})
        else:
            ctx.emit(kind, op, [first(op)], attrs, output=None if out is op else out)
        ctx.done.update(items.values())
        return None

    return lower


def _picks(ctx: TorchLowering, op: Op, out: Op, dims: int, *, padded: bool) -> bool:
    """Whether each window of a maximum holds one element."""
    given, before, after = arguments(op), ctx.value(first(op)), ctx.value(out)
    if "kernel_size" not in given:  # adaptive: as many windows as elements
        pairs = zip(before.probes or (), after.probes or (), strict=True)
        return before.probes is not None and all(None not in a and a == b for a, b in pairs)
    kernel, dilation = (ctx.sizes.static(given[key], None) for key in ("kernel_size", "dilation"))
    if kernel is None or dilation is None:
        return False
    return picks((before.sizes or (None,) * ctx.rank(first(op)))[-dims:], each(kernel, dims), each(dilation, dims), padded=padded)


def reduced(kind: str) -> Lower:
    """mean, sum, amax, amin, max.dim and the norms, along axes."""

    def lower(ctx: TorchLowering, op: Op) -> str | None:
        given, x = arguments(op), first(op)
        rank = ctx.rank(x)
        if not is_float(x):
            return "its input isn't floating point"
        if operator_name(op) in ("max", "min") and isinstance(given.get("other"), Op):
            return several("Maximum")(ctx, op)
        axes = given.get("dim")
        axes = range(rank) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
        items = ctx.items(op)
        out = op if is_float(op) else items.get(0)
        if out is None:
            return "its output isn't used"
        mixes = tuple(sorted({int(axis) % rank for axis in axes})) if rank else ()
        attrs = {"mixes": mixes, "drops": not given.get("keepdim", False), "strict": 1 in items}
        sizes = ctx.value(x).sizes
        attrs["picks"] = kind == "Max" and sizes is not None and all(sizes[axis] == 1 for axis in mixes)
        ctx.emit(kind, op, [x], attrs, output=None if out is op else out)
        ctx.done.update(items.values())
        return None

    return lower


def norm(ctx: TorchLowering, op: Op) -> str | None:
    """A norm is a stretching if its order is positive: the zeroth counts."""
    order = arguments(op).get("ord", arguments(op).get("p", 2))
    return reduced("Relu")(ctx, op) if isinstance(order, (int, float)) and order > 0 else "its order isn't positive"


def resize(ctx: TorchLowering, op: Op) -> str | None:
    """nearest, linear and cubic interpolation: their weights sum to 1."""
    x = first(op)
    rank = ctx.rank(x)
    ctx.emit("Resize", op, [x], {"mixes": tuple(range(2, rank))})
    return None


def pad(ctx: TorchLowering, op: Op) -> str | None:
    given = arguments(op)
    if given.get("mode", "constant") != "constant":
        return mirror_pad(ctx, op)
    rank = ctx.rank(op)
    widths = [ctx.sizes.bounds(n) for n in given["pad"]]  # a computed one may be 0 or negative with the example, and not elsewhere
    axes = {rank - 1 - i // 2 for i, limits in enumerate(widths) if limits != (0, 0)}
    if not axes:
        return elementwise("Identity")(ctx, op)
    if all(largest <= 0 for _, largest in widths):
        ctx.emit("Crop", op, [first(op)], {"mixes": tuple(sorted(axes))})
        return None
    if isinstance(given.get("value"), Op):
        return "it pads with a computed value"
    fill = float(given.get("value") or 0.0)
    attrs = {"mixes": tuple(sorted(axes)), "fill": fill}
    if ctx.host.grows:
        ctx.emit("Pad", op, [first(op)], attrs, {"fill": Param(None, (), default=fill)}, {"fill": Slot("value", op)})
    else:
        ctx.emit("Pad", op, [first(op)], attrs)
    return None


def several(kind: str, **attrs: Any) -> Lower:
    def lower(ctx: TorchLowering, op: Op) -> str | None:
        ctx.emit(kind, op, list(op.all_input_nodes if len(op.all_input_nodes) > 1 else [v for v in op.args if isinstance(v, Op)]), attrs)
        return None

    return lower


def where(ctx: TorchLowering, op: Op) -> str | None:
    given = arguments(op)
    if not all(isinstance(given.get(name), Op) for name in ("condition", "self", "other")):
        return "it chooses between a tensor and a number"
    if ctx.constants.is_constant(given["condition"]):
        return "its condition is a constant"
    ctx.emit("Where", op, [given[name] for name in ("condition", "self", "other")], {"selectors": 1})
    return None


def maximum(ctx: TorchLowering, op: Op) -> str | None:
    given = [value for value in arguments(op).values() if isinstance(value, Op)]
    if len(given) != 2:
        return "it compares with a number"
    ctx.emit("Maximum", op, given)
    return None


def cast(ctx: TorchLowering, op: Op) -> str | None:
    if not is_float(first(op)) or not is_float(op):
        return "it casts from or to a type that isn't floating point"
    ctx.emit("Identity", op, [first(op)])
    return None
