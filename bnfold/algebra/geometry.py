"""Operators without weights in the terms of the rules: what both front-ends make of the arguments that they read.

Each function emits the neutral node of one operator, or raises `Blocked`. Axes are counted from the front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .affine import Blocked
from .graph import Node, Param, Value, Window
from .lowering import Lowering, Op, Ref, Sizes

Ids = npt.NDArray[np.int64]
Run = Callable[[list[Ids], tuple[int, ...]], Ids]
COMPUTED = "how it moves data is computed"


def counted(axes: Any, rank: int) -> tuple[int, ...]:
    """Axes from the front, in order; one number is one axis."""
    return tuple(sorted({int(axis) % rank for axis in np.ravel(axes)})) if rank else ()


def keeping(pairs: Sequence[tuple[Sizes, Sizes]], lead: int = 0) -> list[int]:
    """The axes that have the same size on both sides at every probe. lead: axes that are new in front."""
    return [i for i in range(len(pairs[0][0])) if all(a[i] is not None and a[i] == b[i + lead] for a, b in pairs)]


# --- element by element ------------------------------------------------------------------------------------------------------------


def pointwise(ctx: Lowering, op: Op, kind: str, *inputs: Ref, **attrs: Any) -> Node:
    """One operator on each element, or on those at the same place of several inputs that broadcast."""
    ranks = [ctx.value(ref).rank for ref in inputs if not ctx.is_constant(ref)]
    if ranks and None not in ranks:
        ctx.set_rank(ctx.output(op), max(rank or 0 for rank in ranks))
    return ctx.emit(kind, op, inputs, attrs)


def clip(ctx: Lowering, op: Op, x: Ref, low: float | None, high: float | None) -> None:
    """bounds: None and infinite ones are none."""
    rectifies = low == 0 and (high is None or high >= 3.4e38)
    attrs: dict[str, Any] = {"bounds": (-np.inf if low is None else low, np.inf if high is None else high)}
    pointwise(ctx, op, "Relu" if rectifies else "Barrier", x, **attrs, why="it clips at a bound other than zero")


def bounds_of(ctx: Lowering, op: Op, refs: Sequence[Ref], *, above: bool) -> dict[str, Any]:
    """What a maximum or minimum (above) of two states besides, where one of them is a constant that doesn't make the other larger."""
    constants = [ctx.is_constant(ref) for ref in refs]
    if len(refs) != 2 or sum(constants) != 1:
        return {}
    c, x = ctx.const(refs[constants.index(True)]), ctx.value(refs[constants.index(False)])
    if c is None or x.sizes is None or c.ndim > len(x.sizes):
        return {}
    c = c.reshape((1,) * (len(x.sizes) - c.ndim) + c.shape)
    fits = all(n in (1, own) for n, own in zip(c.shape, x.sizes, strict=True))
    return {"bounds": (-np.inf, c) if above else (c, np.inf)} if fits else {}


# --- along axes --------------------------------------------------------------------------------------------------------------------


def crop(ctx: Lowering, op: Op, x: Ref, axes: Iterable[int], *, drops: bool = False, output: Ref | None = None) -> None:
    """Parts along some axes, between computed bounds."""
    ctx.emit("Crop", op, [x], {"mixes": tuple(axes), "drops": drops}, output=output)


def pool(
    ctx: Lowering,
    op: Op,
    kind: str,
    x: Ref,
    axes: tuple[int, ...],
    kernel: tuple[int, ...] | None = None,
    dilation: tuple[int, ...] = (),
    *,
    padded: bool = False,
    counted: bool = False,
    strict: bool = False,
    places: Sequence[Ref] = (),
    stride: tuple[int, ...] | None = None,
) -> None:
    """Windows that slide. kernel: None where they fit the sizes (global, adaptive). counted: zeros beside the border count in a mean.
    strict: the places of the maxima are used, which a scale of 0 would move. places: other inputs, which say where it reads. stride: where
    all windows lie inside the borders, as those of a convolution would.
    """
    attrs: dict[str, Any] = {"mixes": axes, "strict": strict}
    if kind == "Max":
        attrs["picks"] = _picks(ctx.value(x), ctx.value(ctx.output(op)), axes, kernel, dilation or (1,) * len(axes), padded)
    if counted:
        kind, attrs["fill"] = "Pad", 0.0
    elif kernel is not None and stride is not None:
        one, none = (1,) * len(kernel), (0,) * len(kernel)
        attrs |= {"kernel": kernel, "window": Window(stride, dilation or one, none, none)}
    ctx.emit(kind, op, [x, *places], attrs)


def _picks(x: Value, y: Value, axes: tuple[int, ...], kernel: tuple[int, ...] | None, dilation: tuple[int, ...], padded: bool) -> bool:
    """Whether each window holds one element: along every axis its kernel is 1, or there is only one element to hold."""
    if kernel is None:  # as many windows as elements
        pairs = list(zip(x.probes or (), y.probes or (), strict=False))
        return bool(pairs) and set(axes) <= {*keeping(pairs)}
    sizes = [None] * len(axes) if x.sizes is None else [x.sizes[axis] for axis in axes]
    return all((k == 1 and not padded) or (n == 1 and d == 1) for n, k, d in zip(sizes, kernel, dilation, strict=True))


def reduction(ctx: Lowering, op: Op, kind: str, x: Ref, axes: Any, *, drops: bool, strict: bool = False) -> None:
    """A mean, a sum, a maximum, a norm along axes; None: along all. drops: whether these are gone from the output."""
    rank = ctx.rank(x)
    mixes = tuple(range(rank)) if axes is None else counted(axes, rank)
    sizes = ctx.value(x).sizes
    one = kind == "Max" and sizes is not None and all(sizes[axis] == 1 for axis in mixes)
    ctx.emit(kind, op, [x], {"mixes": mixes, "drops": drops, "strict": strict, "picks": one})


def pad(ctx: Lowering, op: Op, x: Ref, axes: Iterable[int], fill: float, param: Param | None = None) -> None:
    """Padding by one number. param: that number, where it can be another."""
    mixes = tuple(sorted(axes))
    if not mixes:
        pointwise(ctx, op, "Identity", x)
        return
    ctx.emit("Pad", op, [x], {"mixes": mixes, "fill": fill}, {} if param is None else {"fill": param})


def scatter(ctx: Lowering, op: Op, x: Ref, axis: int, *, sums: bool) -> None:
    """Elements that are added to zeros (sums), or of which the largest or smallest stays beside zero, at computed places along an axis."""
    mixes = {axis} | {*range(ctx.rank(x))}.difference(keeping(ctx.around(x, ctx.output(op))))
    ctx.emit("Scatter" if sums else "Relu", op, [x], {"mixes": tuple(sorted(mixes))})


# --- data that move ----------------------------------------------------------------------------------------------------------------


def move(
    ctx: Lowering, op: Op, inputs: list[Ref], run: Run, kept: dict[int, int], ones: Mapping[Ref, Iterable[int]] | None = None, **to: Ref
) -> None:
    """See `movement`. ones: the axes of a value that have the size 1, known or not. to: the output, where it isn't the first."""
    sizes = {ctx.value(ref): tuple(axes) for ref, axes in (ones or {}).items()}
    ctx.emit("Move", op, inputs, {"run": run, "kept": kept, "ones": sizes}, **to)


def within(ctx: Lowering, op: Op, x: Ref, axes: Iterable[int], run: Callable[[Ids], Ids]) -> None:
    """Data that move along some axes alone."""
    rank, touched = ctx.rank(x), set(axes)
    ctx.set_rank(ctx.output(op), rank)
    move(ctx, op, [x], lambda xs, _: run(xs[0]), {i: i for i in range(rank) if i not in touched})


def reshape(ctx: Lowering, op: Op, x: Ref) -> None:
    """Axes at the front and at the back whose sizes agree, at every probe, are left alone."""
    pairs = ctx.around(x, ctx.output(op))
    front = _agreeing(pairs)
    back = _agreeing([(a[front:][::-1], b[front:][::-1]) for a, b in pairs])
    n, m = map(len, pairs[0])
    kept = {i: i for i in range(front)} | {n - 1 - i: m - 1 - i for i in range(back)}
    move(ctx, op, [x], lambda xs, shape: xs[0].reshape(shape), kept)


def _agreeing(pairs: list[tuple[Sizes, Sizes]]) -> int:
    count = 0
    while all(count < min(len(a), len(b)) and a[count] is not None and a[count] == b[count] for a, b in pairs):
        count += 1
    return count


def squeeze(ctx: Lowering, op: Op, x: Ref, gone: tuple[int, ...]) -> None:
    left = [i for i in range(ctx.rank(x)) if i not in gone]
    ctx.set_rank(ctx.output(op), len(left))
    move(ctx, op, [x], lambda xs, _: xs[0].squeeze(gone), {i: o for o, i in enumerate(left)}, {x: gone})


def unsqueeze(ctx: Lowering, op: Op, x: Ref, new: tuple[int, ...]) -> None:
    """new: the axes of the output that weren't there."""
    rank, y = ctx.rank(x) + len(new), ctx.output(op)
    ctx.set_rank(y, rank)
    move(ctx, op, [x], lambda xs, _: np.expand_dims(xs[0], new), dict(enumerate(o for o in range(rank) if o not in new)), {y: new})


def transpose(ctx: Lowering, op: Op, x: Ref, order: Sequence[int]) -> None:
    for ref in (x, ctx.output(op)):
        ctx.set_rank(ref, len(order))
    move(ctx, op, [x], lambda xs, _: xs[0].transpose(order), {i: o for o, i in enumerate(order)})


def concat(ctx: Lowering, op: Op, inputs: list[Ref], axis: int, *, stacks: bool = False) -> None:
    """One behind the other, along an axis of theirs or along a new one."""
    y = ctx.output(op)
    ranks = [r + stacks for ref in inputs if (r := ctx.value(ref).rank) is not None]
    rank = ranks[0] if ranks else ctx.rank(y)
    if len({ctx.dtype(ref) for ref in inputs} - {None}) > 1:
        raise Blocked("its inputs differ in type")
    axis %= rank
    for ref in (*inputs, y):
        if not ctx.is_constant(ref):
            ctx.set_rank(ref, rank - (stacks and ref is not y))
    # a constant part has its real size along every axis
    kept = {} if any(map(ctx.is_constant, inputs)) else {o - (stacks and o > axis): o for o in range(rank) if o != axis}
    move(ctx, op, inputs, lambda xs, _: (np.stack if stacks else np.concatenate)(xs, axis), kept)


def cut(ctx: Lowering, op: Op, x: Ref, cuts: Mapping[int, slice | int], **to: Ref) -> None:
    """Parts along axes; a number takes the axis away. to: the output, where it isn't the first."""
    rank = ctx.rank(x)
    where = tuple(cuts.get(i, slice(None)) for i in range(rank))
    left = [i for i in range(rank) if not isinstance(where[i], int)]
    ctx.set_rank(to.get("output") or ctx.output(op), len(left))
    move(ctx, op, [x], lambda xs, _: xs[0][where], {i: o for o, i in enumerate(left) if i not in cuts}, **to)


def split(ctx: Lowering, op: Op, x: Ref, axis: int, sizes: Sequence[int | None], *, drops: bool = False) -> None:
    """One move for each output that somebody may read; a crop where it lies at bounds that are computed."""
    start: int | None = 0
    for index, size in enumerate(sizes):
        end = None if start is None or size is None else start + size
        if (output := ctx.outputs(op).get(index)) is not None:
            if start is None or end is None:
                crop(ctx, op, x, (axis,), drops=drops, output=output)
            else:
                cut(ctx, op, x, {axis: start if drops else slice(start, end)}, output=output)
        start = end


def expand(ctx: Lowering, op: Op, x: Ref, *, tiles: bool) -> None:
    """Copies, along axes of size 1 or of the whole. Axes that keep their size at every probe are left alone."""
    pairs = ctx.around(x, ctx.output(op))
    lead = len(pairs[0][1]) - len(pairs[0][0])

    def run(xs: list[Ids], shape: tuple[int, ...]) -> Ids:
        if not tiles:
            return np.broadcast_to(xs[0], shape)
        wide = xs[0].reshape((1,) * lead + xs[0].shape)
        return np.tile(wide, [n // m for n, m in zip(shape, wide.shape, strict=True)])

    move(ctx, op, [x], run, {i: i + lead for i in keeping(pairs, lead)})


def take(ctx: Lowering, op: Op, x: Ref, axis: int, places: npt.NDArray[Any]) -> None:
    """x[:, places] along an axis, by constant places of any rank."""
    rank, new = ctx.rank(x), places.ndim - 1
    ctx.set_rank(ctx.output(op), rank + new)
    for i, size in enumerate(places.shape, axis):
        ctx.set_size(ctx.output(op), i, size)
    move(ctx, op, [x], lambda xs, _: np.take(xs[0], places, axis), {i: i + new * (i > axis) for i in range(rank) if i != axis})


def lookup(ctx: Lowering, op: Op, x: Ref, axis: int, taken: int, new: int) -> None:
    """Data at computed places, which stand for `taken` axes from `axis` on; `new` axes of the output are theirs."""
    rank = ctx.rank(x) - taken + new
    ctx.set_rank(ctx.output(op), rank)
    if ctx.rank(ctx.output(op)) != rank:
        raise Blocked(COMPUTED)
    ctx.emit("Lookup", op, [x], {"axis": axis, "taken": taken, "given": new})


def take_along(ctx: Lowering, op: Op, x: Ref, axis: int, places: npt.NDArray[Any] | None) -> None:
    """Each element from another place along the axis, and from its own along all axes of the same size. places: None where computed."""
    y, sizes = ctx.output(op), ctx.value(x).sizes
    ctx.set_rank(y, ctx.rank(x))
    pairs = ctx.around(x, y)
    moved = [i for i in range(len(pairs[0][1])) if i == axis or i not in keeping(pairs)]
    if places is not None and places.size and moved == [axis]:
        columns = np.moveaxis(places, axis, 0).reshape(places.shape[axis], -1)
        if (columns == columns[:, :1]).all():  # the same along all the others
            take(ctx, op, x, axis, columns[:, 0].copy())
            return
    if places is not None and sizes is not None and None not in sizes and ctx.value(y).sizes == places.shape:
        inside = tuple(slice(None) if i == axis else slice(n) for i, n in enumerate(places.shape))
        move(ctx, op, [x], lambda xs, _: np.take_along_axis(xs[0][inside], places, axis), {})
        return
    crop(ctx, op, x, moved)


def blocks(ctx: Lowering, op: Op, x: Ref, b: int, *, spreads: bool, channels_first: bool) -> None:
    """Channels of b*b neighbours become these neighbours (spreads), or the reverse; the channels stand before or behind them."""
    rank = ctx.value(x).rank or 4
    ctx.set_rank(ctx.output(op), rank)
    n = rank - 3

    def run(xs: list[Ids], shape: tuple[int, ...]) -> Ids:
        *lead, c, h, w = xs[0].shape
        if spreads:
            parts, order = ((c // b**2, b, b), (0, 3, 1, 4, 2)) if channels_first else ((b, b, c // b**2), (2, 3, 0, 4, 1))
            wide = xs[0].reshape(*lead, *parts, h, w)
        else:
            order = (0, 2, 4, 1, 3) if channels_first else (2, 4, 0, 1, 3)
            wide = xs[0].reshape(*lead, c, h // b, b, w // b, b)
        return wide.transpose(*range(n), *(n + i for i in order)).reshape(shape)

    move(ctx, op, [x], run, {i: i for i in range(n)})


def mirror(ctx: Lowering, op: Op, x: Ref, widths: Sequence[tuple[int, int]], mode: Any) -> None:
    """Padding by what is there: mode reflect, edge or wrap. widths: before and behind, for each axis; negative ones crop."""
    cuts = tuple(slice(max(-low, 0), min(high, 0) or None) for low, high in widths)
    grown = [(max(low, 0), max(high, 0)) for low, high in widths]
    within(ctx, op, x, [i for i, each in enumerate(widths) if each != (0, 0)], lambda ids: np.pad(ids[cuts], grown, mode=mode))
