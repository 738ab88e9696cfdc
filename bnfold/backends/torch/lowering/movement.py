"""The ATen operators that only move data, each as what it does to an array and which axes it leaves alone (see bnfold.moves)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import Node as Op

from ..export.walk import arguments, dtype_of, operator_name, value_of
from .lowering import TorchLowering

Ids = npt.NDArray[np.int64]
Run = Callable[[list[Ids], tuple[int, ...]], Ids]
COMPUTED = "how it moves data is computed"


def _move(
    ctx: TorchLowering,
    op: Op,
    run: Run,
    kept: dict[int, int],
    *,
    output: Op | None = None,
    inputs: list[Op] | None = None,
    ones: dict[Op, tuple[int, ...]] | None = None,
) -> None:
    sources = [arguments(op)["self"]] if inputs is None else inputs
    sizes = {ctx.value(v): axes for v, axes in (ones or {}).items()}
    ctx.emit("Move", op, sources, {"run": run, "kept": kept, "ones": sizes}, output=output)


def _same(rank: int, but: Any = ()) -> dict[int, int]:
    return {i: i for i in range(rank) if i not in but}


def _axis(ctx: TorchLowering, op: Op, name: str = "dim", rank: int | None = None) -> int:
    rank = ctx.rank(arguments(op)["self"]) if rank is None else rank
    return int(arguments(op)[name]) % rank


def reshape(ctx: TorchLowering, op: Op) -> str | None:
    """view, reshape, flatten, unflatten: axes at the front and at the back whose sizes agree, at every probe, are left alone."""
    x = arguments(op)["self"]
    if dtype_of(x) != dtype_of(op):
        return "it reads the bits as another type"
    before, after = ctx.value(x).probes, ctx.value(op).probes
    if before is None or after is None:
        return "the shapes around it aren't known"
    front = _agreeing(list(zip(before, after, strict=True)))
    back = _agreeing([(a[front:][::-1], b[front:][::-1]) for a, b in zip(before, after, strict=True)])
    n, m = len(before[0]), len(after[0])
    kept = {i: i for i in range(front)} | {n - 1 - i: m - 1 - i for i in range(back)}
    _move(ctx, op, lambda xs, shape: xs[0].reshape(shape), kept, inputs=[x])
    return None


def _agreeing(pairs: list[tuple[Any, Any]]) -> int:
    count = 0
    while all(count < min(len(a), len(b)) and a[count] is not None and a[count] == b[count] for a, b in pairs):
        count += 1
    return count


def squeeze(ctx: TorchLowering, op: Op) -> str | None:
    x = arguments(op)["self"]
    rank, axes = ctx.rank(x), arguments(op).get("dim")
    sizes = ctx.value(x).sizes or ()
    wanted = range(rank) if axes is None else [int(a) % rank for a in (axes if isinstance(axes, (list, tuple)) else [axes])] if rank else []
    gone = tuple(sorted(i for i in wanted if sizes[i] == 1))
    if rank - len(gone) != ctx.rank(op):
        return "which axes it takes away depends on a size that may change"
    left = [i for i in range(rank) if i not in gone]
    _move(ctx, op, lambda xs, _: xs[0].squeeze(gone), {i: o for o, i in enumerate(left)}, ones={x: gone})
    return None


def unsqueeze(ctx: TorchLowering, op: Op) -> str | None:
    rank = ctx.rank(op)
    new = _axis(ctx, op, rank=rank)
    old = [o for o in range(rank) if o != new]
    _move(ctx, op, lambda xs, _: np.expand_dims(xs[0], new), dict(enumerate(old)), ones={op: (new,)})
    return None


def transpose(ctx: TorchLowering, op: Op) -> str | None:
    """permute, transpose, t, and the attributes T and mT."""
    given, name = arguments(op), operator_name(op)
    rank = ctx.rank(given["self"])
    order = list(range(rank))
    if name == "permute":
        order = [int(axis) % rank for axis in given["dims"]]
    elif name in ("transpose", "swapaxes", "swapdims"):
        pairs = [int(value) % rank for key, value in given.items() if key != "self"]
        order[pairs[0]], order[pairs[1]] = pairs[1], pairs[0]
    elif name in ("mT", "matrix_H", "adjoint", "mH"):
        order[-2:] = [rank - 1, rank - 2]
    elif name in ("movedim", "moveaxis"):
        order = _permutation(rank, given["source"], given["destination"])
    else:
        order.reverse()
    _move(ctx, op, lambda xs, _: xs[0].transpose(order), {i: o for o, i in enumerate(order)})
    return None


def _permutation(rank: int, source: Any, destination: Any) -> list[int]:
    sources, destinations = (([int(v)] if isinstance(v, int) else [int(n) for n in v]) for v in (source, destination))
    order = [axis for axis in range(rank) if axis not in [s % rank for s in sources]]
    for to, axis in sorted(zip((d % rank for d in destinations), (s % rank for s in sources), strict=True)):
        order.insert(to, axis)
    return order


def cat(ctx: TorchLowering, op: Op) -> str | None:
    given = arguments(op)
    inputs, rank = list(given["tensors"]), ctx.rank(op)
    inputs = [v for v in inputs if ctx.rank(v) == rank]  # torch lets an empty vector stand among them
    if len({v.meta["val"].dtype for v in inputs}) > 1:
        return "its inputs differ in type"
    axis = int(given["dim"]) % rank
    constant = any(ctx.constants.is_constant(v) for v in inputs)
    kept = {} if constant else _same(rank, (axis,))  # a constant part has its real size along every axis
    _move(ctx, op, lambda xs, _: np.concatenate(xs, axis), kept, inputs=inputs)
    return None


def stack(ctx: TorchLowering, op: Op) -> str | None:
    given = arguments(op)
    inputs, rank = list(given["tensors"]), ctx.rank(op)
    axis = int(given["dim"]) % rank
    constant = any(ctx.constants.is_constant(v) for v in inputs)
    kept = {} if constant else {i: i if i < axis else i + 1 for i in range(rank - 1)}
    _move(ctx, op, lambda xs, _: np.stack(xs, axis), kept, inputs=inputs)
    return None


def _slice(ctx: TorchLowering, op: Op) -> str | None:
    given = arguments(op)
    x = given["self"]
    rank, axis = ctx.rank(x), _axis(ctx, op)
    name = operator_name(op)
    if name == "narrow":
        start, length = (ctx.sizes.static(given[key], "?") for key in ("start", "length"))
        cut = None if "?" in (start, length) else slice(start, start + length if start + length else None)
    else:
        ends = [ctx.sizes.static(given[key], "?") for key in ("start", "end", "step")]
        cut = None if "?" in ends else slice(*ends)
    if cut is not None and cut.start in (0, None) and cut.step in (1, None) and ctx.value(x).probes == ctx.value(op).probes:
        ctx.same(op, x)  # indexing begins with the axes that it leaves whole
        return None
    if cut is None:
        ctx.emit("Crop", op, [x], {"mixes": (axis,)})
        return None
    cuts = (slice(None),) * axis + (cut,)
    _move(ctx, op, _cut(cuts), _same(rank, (axis,)))
    return None


def _cut(where: tuple[Any, ...]) -> Run:
    return lambda xs, _: xs[0][where]


def select(ctx: TorchLowering, op: Op) -> str | None:
    rank, axis = ctx.rank(arguments(op)["self"]), _axis(ctx, op)
    index = ctx.sizes.static(arguments(op)["index"], None)
    if index is None:
        ctx.emit("Crop", op, [arguments(op)["self"]], {"mixes": (axis,), "drops": True})
        return None
    _move(ctx, op, _cut((slice(None),) * axis + (index,)), {i: i if i < axis else i - 1 for i in range(rank) if i != axis})
    return None


def split(ctx: TorchLowering, op: Op) -> str | None:
    """split, split_with_sizes, chunk, tensor_split, hsplit, vsplit, dsplit, unbind: one move for each item that somebody takes.

    Where an item lies at bounds that are computed, it is a crop, which every map crosses that is constant along the axis.
    """
    x = arguments(op)["self"]
    rank, items = ctx.rank(x), ctx.items(op)
    stated = {"vsplit": 0, "hsplit": min(1, rank - 1), "dsplit": 2}.get(operator_name(op))
    axis = _axis(ctx, op) if stated is None else stated
    drops = operator_name(op) == "unbind"
    kept = {i: i if i < axis or not drops else i - 1 for i in range(rank) if i != axis}
    start: int | None = 0
    used = {index: item for index, item in items.items() if item.users}
    for index, piece in enumerate(op.meta["val"]):
        size = 1 if drops else ctx.sizes.static(piece.shape[axis], None)
        end = None if start is None or size is None else start + int(size)
        if index in used and end is None:
            ctx.emit("Crop", op, [x], {"mixes": (axis,), "drops": drops}, output=items[index])
        elif index in used:
            cut = start if drops else slice(start, end)
            _move(ctx, op, _cut((slice(None),) * axis + (cut,)), kept, output=items[index])
        start = end
    ctx.done.update(items.values())
    return None


def expand(ctx: TorchLowering, op: Op) -> str | None:
    """expand and repeat: axes that keep their size at every probe are left alone."""
    x, name = arguments(op)["self"], operator_name(op)
    before, after = ctx.value(x).probes, ctx.value(op).probes
    if before is None or after is None:
        return "the shapes around it aren't known"
    lead = len(after[0]) - len(before[0])
    kept = {
        i: i + lead
        for i in range(len(before[0]))
        if all(a[i] is not None and a[i] == b[i + lead] for a, b in zip(before, after, strict=True))
    }

    def run(xs: list[Ids], shape: tuple[int, ...]) -> Ids:
        if name in ("repeat", "tile"):
            wide = xs[0].reshape((1,) * lead + xs[0].shape)
            return np.tile(wide, [n // m for n, m in zip(shape, wide.shape, strict=True)])
        return np.broadcast_to(xs[0], shape)

    _move(ctx, op, run, kept)
    return None


def interleave(ctx: TorchLowering, op: Op) -> str | None:
    given = arguments(op)
    times, rank = given.get("repeats"), ctx.rank(given["self"])
    if not isinstance(times, int) or given.get("dim") is None:
        return COMPUTED
    axis = _axis(ctx, op)
    _move(ctx, op, lambda xs, _: np.repeat(xs[0], times, axis), _same(rank, (axis,)))
    return None


def index(ctx: TorchLowering, op: Op) -> str | None:
    """x[..., places, ...]: a move by a constant vector or array; a lookup by computed places, by several arrays, or by a mask."""
    given = arguments(op)
    x, places = given["self"], list(given["indices"])
    wanted = [i for i, place in enumerate(places) if place is not None]
    array = ctx.const(places[wanted[0]]) if len(wanted) == 1 else None
    if array is not None:
        return _take(ctx, op, x, wanted[0], np.flatnonzero(array) if array.dtype == np.bool_ else array)
    masks = [place for place in places if place is not None and value_of(place).dtype in (torch.bool, torch.uint8)]
    if wanted != list(range(wanted[0], wanted[-1] + 1)) or (masks and len(wanted) > 1):
        return COMPUTED
    taken = ctx.rank(masks[0]) if masks else len(wanted)
    return _lookup(ctx, op, x, wanted[0], taken, 1 if masks else max(ctx.rank(places[i]) for i in wanted))


def _lookup(ctx: TorchLowering, op: Op, x: Op, axis: int, taken: int, new: int) -> str | None:
    if ctx.rank(x) - taken + new != ctx.rank(op):
        return COMPUTED
    ctx.emit("Lookup", op, [x], {"axis": axis, "taken": taken, "given": new})
    return None


def index_select(ctx: TorchLowering, op: Op) -> str | None:
    given = arguments(op)
    array, axis = ctx.const(given["index"]), _axis(ctx, op)
    return _lookup(ctx, op, given["self"], axis, 1, 1) if array is None else _take(ctx, op, given["self"], axis, array)


def gather(ctx: TorchLowering, op: Op) -> str | None:
    """gather and take_along_dim: each element from another place along the axis, and from its own along all axes of the same size."""
    x = arguments(op)["self"]
    before, after = ctx.value(x).probes, ctx.value(op).probes
    if before is None or after is None or arguments(op)["dim"] is None:
        return COMPUTED
    axis = _axis(ctx, op)
    moved = {i for i in range(ctx.rank(op)) if any(a[i] is None or a[i] != b[i] for a, b in zip(before, after, strict=True))} | {axis}
    if moved == {axis} and (places := _same_everywhere(ctx, arguments(op).get("index", arguments(op).get("indices")), axis)) is not None:
        return _take(ctx, op, x, axis, places)
    ctx.emit("Crop", op, [x], {"mixes": tuple(sorted(moved))})
    return None


def _same_everywhere(ctx: TorchLowering, places: Any, axis: int) -> npt.NDArray[Any] | None:
    """The constant places along an axis, where they are the same along all the others."""
    source = arguments(places)["self"] if operator_name(places) == "expand" else places
    array = ctx.const(source)
    if array is None or array.ndim <= axis or array.ndim != ctx.rank(places) or not array.size:
        return None
    vector = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    return vector[:, 0].copy() if (vector == vector[:, :1]).all() else None


def _take(ctx: TorchLowering, op: Op, x: Op, axis: int, places: npt.NDArray[Any]) -> str | None:
    rank = ctx.rank(x)
    kept = {i: i if i < axis else i - 1 + places.ndim for i in range(rank) if i != axis}
    _move(ctx, op, lambda xs, _: np.take(xs[0], places, axis), kept, inputs=[x])
    return None


def flip(ctx: TorchLowering, op: Op) -> str | None:
    rank = ctx.rank(op)
    axes = tuple(int(axis) % rank for axis in arguments(op)["dims"])
    _move(ctx, op, lambda xs, _: np.flip(xs[0], axes), _same(rank, axes))
    return None


def roll(ctx: TorchLowering, op: Op) -> str | None:
    given, rank = arguments(op), ctx.rank(op)
    shifts = ctx.sizes.static(given["shifts"], None)
    axes = tuple(int(axis) % rank for axis in given["dims"])
    if shifts is None or not axes:
        return COMPUTED
    _move(ctx, op, lambda xs, _: np.roll(xs[0], shifts, axes), _same(rank, axes))
    return None


def shuffle(ctx: TorchLowering, op: Op) -> str | None:
    """pixel_shuffle, pixel_unshuffle and channel_shuffle."""
    given, name, rank = arguments(op), operator_name(op), ctx.rank(op)
    r = int(next(value for key, value in given.items() if key != "self"))

    def run(xs: list[Ids], shape: tuple[int, ...]) -> Ids:
        *lead, c, h, w = xs[0].shape
        n = len(lead)
        if name == "pixel_shuffle":
            order = [*range(n), n, n + 3, n + 1, n + 4, n + 2]
            return xs[0].reshape(*lead, c // r**2, r, r, h, w).transpose(order).reshape(shape)
        order = [*range(n), n, n + 2, n + 4, n + 1, n + 3]
        return xs[0].reshape(*lead, c, h // r, r, w // r, r).transpose(order).reshape(shape)

    if name == "channel_shuffle":

        def mix(xs: list[Ids], shape: tuple[int, ...]) -> Ids:
            n, c, *rest = xs[0].shape
            return xs[0].reshape(n, r, c // r, *rest).swapaxes(1, 2).reshape(shape)

        _move(ctx, op, mix, _same(rank, (1,)))
        return None
    _move(ctx, op, run, {i: i for i in range(rank - 3)})
    return None


def mirror_pad(ctx: TorchLowering, op: Op) -> str | None:
    """Padding by reflection, by the edge, or around the corner; torch names the axes from the last one on."""
    given, name, rank = arguments(op), operator_name(op), ctx.rank(op)
    widths = ctx.sizes.static(given.get("pad", given.get("padding")), None)
    if widths is None:
        return COMPUTED
    given_mode = given.get("mode", "reflect" if "reflection" in name else "replicate")
    mode: Any = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}.get(given_mode)
    if mode is None:
        return f"it pads in mode {given_mode}"
    pairs = [(0, 0)] * rank
    for i in range(0, len(widths), 2):
        pairs[rank - 1 - i // 2] = (widths[i], widths[i + 1])
    cuts = tuple(slice(max(-lo, 0), min(hi, 0) or None) for lo, hi in pairs)
    grow = [(max(lo, 0), max(hi, 0)) for lo, hi in pairs]
    _move(ctx, op, lambda xs, _: np.pad(xs[0][cuts], grow, mode=mode), _same(rank, [i for i, w in enumerate(pairs) if w != (0, 0)]))
    return None


MOVES: dict[str, Callable[[TorchLowering, Op], str | None]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "_reshape_alias"), reshape),
    "view_copy": reshape,
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    **dict.fromkeys(("permute", "transpose", "t", "numpy_T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis"), transpose),
    "permute_copy": transpose,
    "cat": cat,
    "concat": cat,
    "concatenate": cat,
    "stack": stack,
    "slice": _slice,
    "narrow": _slice,
    "select": select,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split", "unsafe_chunk"), split),
    **dict.fromkeys(("hsplit", "vsplit", "dsplit", "unsafe_split_with_sizes"), split),
    **dict.fromkeys(("expand", "expand_as", "repeat", "tile", "broadcast_to"), expand),
    "repeat_interleave": interleave,
    "index": index,
    "index_select": index_select,
    "gather": gather,
    "take_along_dim": gather,
    "flip": flip,
    "roll": roll,
    "pixel_shuffle": shuffle,
    "pixel_unshuffle": shuffle,
    "channel_shuffle": shuffle,
    "native_channel_shuffle": shuffle,
    **{f"{kind}_pad{n}d": mirror_pad for kind in ("reflection", "replication") for n in (1, 2, 3)},
}
