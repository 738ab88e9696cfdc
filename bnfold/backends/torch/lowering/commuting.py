"""ATen operators that let maps cross, in the terms of the rules."""

from __future__ import annotations

from torch.fx import Node as Op

from bnfold.algebra import geometry
from bnfold.algebra.affine import Blocked
from bnfold.algebra.geometry import pointwise
from bnfold.algebra.graph import Param

from ..export.walk import arguments, is_float, operator_name
from .lowering import Lower, TorchLowering, each, first
from .module_host import AVERAGES, ModuleHost
from .movement import mirror
from .places import Slot


def elementwise(kind: str) -> Lower:
    def lower(ctx: TorchLowering, op: Op) -> None:
        if not is_float(first(op)):
            raise Blocked("its input isn't floating point")
        pointwise(ctx, op, kind, first(op))

    return lower


def dropout(ctx: TorchLowering, op: Op) -> None:
    if arguments(op).get("train", arguments(op).get("training", True)):
        raise Blocked("it is in training mode")
    pointwise(ctx, op, "Identity", first(op))


def clamp(ctx: TorchLowering, op: Op) -> None:
    given = arguments(op)
    low, high = (given.get(name, given.get(f"{name}_val")) for name in ("min", "max"))
    if any(isinstance(bound, Op) for bound in (low, high)):
        raise Blocked("its bounds are computed")
    _clips(ctx, op, low, high)


def relu(ctx: TorchLowering, op: Op) -> None:
    _clips(ctx, op, 0.0, None)


def _clips(ctx: TorchLowering, op: Op, low: float | None, high: float | None) -> None:
    if not is_float(first(op)):
        raise Blocked("its input isn't floating point")
    geometry.clip(ctx, op, first(op), low, high)
    if isinstance(ctx.host, ModuleHost):
        ctx.nodes[-1].attrs["clips"] = ctx.host.why_not_replaced(op)


def threshold(ctx: TorchLowering, op: Op) -> None:
    if arguments(op)["threshold"] != 0 or arguments(op)["value"] != 0:
        raise Blocked("it cuts at a bound other than zero")
    elementwise("Relu")(ctx, op)


def prelu(ctx: TorchLowering, op: Op) -> None:
    if not ctx.is_constant(next(value for name, value in arguments(op).items() if name != "self")):
        raise Blocked("its slope is computed")
    elementwise("Relu")(ctx, op)


def rrelu(ctx: TorchLowering, op: Op) -> None:
    if arguments(op)["training"]:
        raise Blocked("it is in training mode")
    elementwise("Relu")(ctx, op)


def windowed(kind: str) -> Lower:
    """Pools over the last one, two or three axes."""

    def lower(ctx: TorchLowering, op: Op) -> None:
        given, rank = arguments(op), ctx.rank(first(op))
        dims = next(n for n in (1, 2, 3) if f"{n}d" in operator_name(op))
        if kind == "Average" and given.get("divisor_override") is not None:
            raise Blocked("it divides by another number than it adds")
        padded = any(ctx.sizes.static(given.get("padding"), [0]) or [0])
        # 0 for computed ones, which fits nothing
        kernel, dilation = (each(ctx.sizes.static(given.get(key, 1), 0), dims) for key in ("kernel_size", "dilation"))
        stride = ctx.sizes.static(given.get("stride") or given.get("kernel_size"), 0)
        # a module's code calls a function again
        fixed = padded or given.get("ceil_mode") or 0 in each(stride or 0, dims) or rank == dims + 1
        fixed = fixed or (isinstance(ctx.host, ModuleHost) and bool(ctx.host.why_not_replaced(op, AVERAGES)))
        geometry.pool(
            ctx,
            op,
            kind,
            first(op),
            tuple(range(rank - dims, rank)),
            kernel if "kernel_size" in given else None,
            dilation,
            padded=padded,
            counted=bool(given.get("count_include_pad") and padded),
            strict=not is_float(op) and 1 in ctx.items(op),
            stride=None if fixed else each(stride, dims),
        )

    return lower


def reduced(kind: str) -> Lower:
    """mean, sum, amax, amin, max.dim and the norms, along axes."""

    def lower(ctx: TorchLowering, op: Op) -> None:
        given, x = arguments(op), first(op)
        if not is_float(x):
            raise Blocked("its input isn't floating point")
        if operator_name(op) in ("max", "min") and isinstance(given.get("other"), Op):
            pointwise(ctx, op, "Maximum", x, given["other"])
            return
        axes = given.get("dim")
        strict = not is_float(op) and 1 in ctx.items(op)
        geometry.reduction(ctx, op, kind, x, None if axes == [] else axes, drops=not given.get("keepdim", False), strict=strict)

    return lower


def norm(ctx: TorchLowering, op: Op) -> None:
    """A norm is a stretching if its order is positive: the zeroth counts."""
    order = arguments(op).get("ord", arguments(op).get("p", 2))
    if not isinstance(order, (int, float)) or order <= 0:
        raise Blocked("its order isn't positive")
    reduced("Relu")(ctx, op)


def resize(ctx: TorchLowering, op: Op) -> None:
    """nearest, linear and cubic interpolation: their weights sum to 1."""
    ctx.emit("Resize", op, [first(op)], {"mixes": tuple(range(2, ctx.rank(first(op))))})


def sample(ctx: TorchLowering, op: Op) -> None:
    """Interpolation at computed places."""
    given, space = arguments(op), tuple(range(2, ctx.rank(first(op))))
    geometry.pool(ctx, op, "Resize", first(op), space, counted=given["padding_mode"] == 0, places=[given["grid"]])


def pad(ctx: TorchLowering, op: Op) -> None:
    given, rank = arguments(op), ctx.rank(op)
    if given.get("mode", "constant") != "constant":
        mirror(ctx, op)
        return
    widths = [ctx.sizes.bounds(n) for n in given["pad"]]  # a computed one may be 0 or negative with the example, and not elsewhere
    axes = sorted({rank - 1 - i // 2 for i, limits in enumerate(widths) if limits != (0, 0)})
    if axes and all(largest <= 0 for _, largest in widths):
        geometry.crop(ctx, op, first(op), axes)
        return
    if isinstance(given.get("value"), Op):
        raise Blocked("it pads with a computed value")
    fill = float(given.get("value") or 0.0)
    param = Param(None, (), default=fill, slot=Slot("value", op)) if ctx.host.grows else None
    geometry.pad(ctx, op, first(op), axes, fill, param)


def scatter(ctx: TorchLowering, op: Op) -> None:
    """scatter_add, index_add, scatter_reduce, onto zeros: how graph networks gather what comes along edges."""
    given, base, kind = arguments(op), first(op), arguments(op).get("reduce", "sum")
    zeros = ctx.const(base) if ctx.is_constant(base) else None
    made = operator_name(base) in ("zeros", "new_zeros", "zeros_like") or arguments(base).get("fill_value") == 0
    if not made and (zeros is None or zeros.any()):
        raise Blocked("what it adds to isn't known to be zero")
    if kind not in ("sum", "mean", "amax", "amin"):
        raise Blocked(f"it reduces by {kind}")
    source: Op = given["source" if "source" in given else "src"]
    geometry.scatter(ctx, op, source, int(given["dim"]) % ctx.rank(op), sums=kind in ("sum", "mean"))


def where(ctx: TorchLowering, op: Op) -> None:
    given = [arguments(op).get(name) for name in ("condition", "self", "other")]
    if not all(isinstance(each, Op) for each in given):
        raise Blocked("it chooses between a tensor and a number")
    if ctx.is_constant(given[0]):
        raise Blocked("its condition is a constant")
    pointwise(ctx, op, "Where", *given, selectors=1)


def maximum(ctx: TorchLowering, op: Op) -> None:
    given = [value for value in arguments(op).values() if isinstance(value, Op)]
    if len(given) != 2:
        raise Blocked("it compares with a number")
    bounds = {} if operator_name(op)[0] == "f" else geometry.bounds_of(ctx, op, given, above=operator_name(op) == "minimum")
    pointwise(ctx, op, "Maximum", *given, **bounds)


def cast(ctx: TorchLowering, op: Op) -> None:
    if not is_float(first(op)) or not is_float(op):
        raise Blocked("it casts from or to a type that isn't floating point")
    pointwise(ctx, op, "Identity", first(op))
