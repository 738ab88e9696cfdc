"""The ATen operators that only move data, each as what it does to an array (see `bnfold.algebra.movement`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view as windows
from torch.fx import Node as Op

from bnfold.algebra import geometry
from bnfold.algebra.affine import Blocked
from bnfold.algebra.geometry import COMPUTED

from ..export.walk import arguments, dtype_of, operator_name, value_of
from .lowering import Lower, TorchLowering, by_first, first

MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _axis(ctx: TorchLowering, op: Op) -> int:
    return int(arguments(op)["dim"]) % ctx.rank(first(op))


def _static(ctx: TorchLowering, argument: Any) -> Any:
    """An argument, or `Blocked` where it is computed."""
    found = ctx.sizes.static(argument, None)
    if found is None:
        raise Blocked(COMPUTED)
    return found


def reshape(ctx: TorchLowering, op: Op) -> None:
    """view, reshape, flatten, unflatten."""
    if dtype_of(first(op)) != dtype_of(op):
        raise Blocked("it reads the bits as another type")
    geometry.reshape(ctx, op, first(op))


def squeeze(ctx: TorchLowering, op: Op) -> None:
    rank, axes = ctx.rank(first(op)), arguments(op).get("dim")
    sizes = ctx.value(first(op)).sizes or ()
    gone = tuple(i for i in (range(rank) if axes is None else geometry.counted(axes, rank)) if sizes[i] == 1)
    if rank - len(gone) != ctx.rank(op):
        raise Blocked("which axes it takes away depends on a size that may change")
    geometry.squeeze(ctx, op, first(op), gone)


def unsqueeze(ctx: TorchLowering, op: Op) -> None:
    geometry.unsqueeze(ctx, op, first(op), (int(arguments(op)["dim"]) % ctx.rank(op),))


def transpose(ctx: TorchLowering, op: Op) -> None:
    """permute, transpose, movedim, t, and the attributes T and mT."""
    given, name = arguments(op), operator_name(op)
    rank = ctx.rank(given["self"])
    order = list(range(rank))
    if name == "permute":
        order = [int(axis) % rank for axis in given["dims"]]
    elif name in ("transpose", "swapaxes", "swapdims"):
        one, other = (int(value) % rank for key, value in given.items() if key != "self")
        order[one], order[other] = other, one
    elif name == "mT":
        order[-2:] = order[:-3:-1]
    elif name in ("movedim", "moveaxis"):
        order = list(np.moveaxis(np.empty(order), given["source"], given["destination"]).shape)  # an array whose sizes are its axes
    else:
        order.reverse()
    geometry.transpose(ctx, op, given["self"], order)


def cat(ctx: TorchLowering, op: Op) -> None:
    given = arguments(op)
    inputs = [v for v in given["tensors"] if ctx.rank(v) == ctx.rank(op)]  # torch lets an empty vector stand among them
    geometry.concat(ctx, op, inputs, int(given["dim"]))


def stack(ctx: TorchLowering, op: Op) -> None:
    geometry.concat(ctx, op, list(arguments(op)["tensors"]), int(arguments(op)["dim"]), stacks=True)


def _slice(ctx: TorchLowering, op: Op) -> None:
    given, axis = arguments(op), _axis(ctx, op)
    names = ("start", "length") if operator_name(op) == "narrow" else ("start", "end", "step")
    stated = [ctx.sizes.static(given[name], "?") for name in names]
    if "?" in stated:
        geometry.crop(ctx, op, first(op), (axis,))
        return
    part = slice(*stated)
    if operator_name(op) == "narrow":
        part = slice(stated[0], sum(stated) or None)
    if part.start in (0, None) and part.step in (1, None) and ctx.value(first(op)).probes == ctx.value(op).probes:
        ctx.same(op, first(op))  # indexing begins with the axes that it leaves whole
        return
    geometry.cut(ctx, op, first(op), {axis: part})


def select(ctx: TorchLowering, op: Op) -> None:
    axis, index = _axis(ctx, op), ctx.sizes.static(arguments(op)["index"], None)
    if index is None:
        geometry.crop(ctx, op, first(op), (axis,), drops=True)
    else:
        geometry.cut(ctx, op, first(op), {axis: index})


def split(ctx: TorchLowering, op: Op) -> None:
    """split, split_with_sizes, chunk, tensor_split, hsplit, vsplit, dsplit, unbind."""
    rank, drops = ctx.rank(first(op)), operator_name(op) == "unbind"
    stated = {"vsplit": 0, "hsplit": min(1, rank - 1), "dsplit": 2}.get(operator_name(op))
    axis = _axis(ctx, op) if stated is None else stated
    sizes = [1 if drops else ctx.sizes.static(piece.shape[axis], None) for piece in op.meta["val"]]
    ctx.done.update(ctx.items(op).values())
    geometry.split(ctx, op, first(op), axis, sizes, drops=drops)


def interleave(ctx: TorchLowering, op: Op) -> None:
    times = arguments(op).get("repeats")
    if not isinstance(times, int) or arguments(op).get("dim") is None:
        raise Blocked(COMPUTED)
    axis = _axis(ctx, op)
    geometry.within(ctx, op, first(op), (axis,), lambda ids: np.repeat(ids, times, axis))


def index(ctx: TorchLowering, op: Op) -> None:
    """x[..., places, ...]: a move by a constant vector or array; a lookup by computed places, by several arrays, or by a mask."""
    places = list(arguments(op)["indices"])
    wanted = [i for i, place in enumerate(places) if place is not None]
    array = ctx.const(places[wanted[0]]) if len(wanted) == 1 else None
    if array is not None:
        geometry.take(ctx, op, first(op), wanted[0], np.flatnonzero(array) if array.dtype == np.bool_ else array)
        return
    masks = [place for place in places if place is not None and value_of(place).dtype in (torch.bool, torch.uint8)]
    if wanted != list(range(wanted[0], wanted[-1] + 1)) or (masks and len(wanted) > 1):
        raise Blocked(COMPUTED)
    taken = ctx.rank(masks[0]) if masks else len(wanted)
    geometry.lookup(ctx, op, first(op), wanted[0], taken, 1 if masks else max(ctx.rank(places[i]) for i in wanted))


def index_select(ctx: TorchLowering, op: Op) -> None:
    array, axis = ctx.const(arguments(op)["index"]), _axis(ctx, op)
    if array is None:
        geometry.lookup(ctx, op, first(op), axis, 1, 1)
    else:
        geometry.take(ctx, op, first(op), axis, array)


def gather(ctx: TorchLowering, op: Op) -> None:
    """gather and take_along_dim."""
    given = arguments(op)
    places: Op = given["index" if "index" in given else "indices"]
    if given["dim"] is None:
        raise Blocked(COMPUTED)
    source = arguments(places)["self"] if operator_name(places) == "expand" else places
    array = ctx.const(source)
    fits = array is not None and array.ndim == ctx.rank(places)  # one that is expanded has the size 1 along some axes
    geometry.take_along(ctx, op, first(op), _axis(ctx, op), array if fits else None)


def flip(ctx: TorchLowering, op: Op) -> None:
    axes = geometry.counted(arguments(op)["dims"], ctx.rank(op))
    geometry.within(ctx, op, first(op), axes, lambda ids: np.flip(ids, axes))


def roll(ctx: TorchLowering, op: Op) -> None:
    given, rank = arguments(op), ctx.rank(op)
    shifts, axes = _static(ctx, given["shifts"]), tuple(int(axis) % rank for axis in given["dims"])
    if not axes:
        raise Blocked(COMPUTED)
    geometry.within(ctx, op, first(op), axes, lambda ids: np.roll(ids, shifts, axes))


def blocks(ctx: TorchLowering, op: Op) -> None:
    """pixel_shuffle and pixel_unshuffle."""
    factor = int(next(value for key, value in arguments(op).items() if key != "self"))
    geometry.blocks(ctx, op, first(op), factor, spreads=operator_name(op) == "pixel_shuffle", channels_first=True)


def channel_shuffle(ctx: TorchLowering, op: Op) -> None:
    groups = int(arguments(op)["groups"])

    def mix(ids: geometry.Ids) -> geometry.Ids:
        n, c, *rest = ids.shape
        return ids.reshape(n, groups, c // groups, *rest).swapaxes(1, 2).reshape(ids.shape)

    geometry.within(ctx, op, first(op), (1,), mix)


def unfold(ctx: TorchLowering, op: Op) -> None:
    """Windows along an axis, which lie along a new last one."""
    size, step, rank = arguments(op)["size"], arguments(op)["step"], ctx.rank(first(op))
    size, step, axis = _static(ctx, size), _static(ctx, step), int(arguments(op)["dimension"]) % rank
    steps = (slice(None),) * axis + (slice(None, None, step),)
    geometry.move(ctx, op, [first(op)], lambda xs, _: windows(xs[0], size, axis)[steps], {i: i for i in range(rank) if i != axis})


def columns(ctx: TorchLowering, op: Op) -> None:
    """im2col: the channels of the elements of each window, [N, C*h*w, windows]."""
    names = ("kernel_size", "dilation", "padding", "stride")
    (h, w), (below, beside), padding, stride = (_static(ctx, arguments(op)[name]) for name in names)
    if any(padding):
        raise Blocked("it pads with zeros")

    def run(xs: list[geometry.Ids], shape: tuple[int, ...]) -> geometry.Ids:
        seen = windows(xs[0], (below * (h - 1) + 1, beside * (w - 1) + 1), (-2, -1))
        seen = seen[..., :: stride[0], :: stride[1], ::below, ::beside]
        return np.moveaxis(seen, (-2, -1), (-4, -3)).reshape(shape)

    geometry.move(ctx, op, [first(op)], run, {i: i for i in range(ctx.rank(op) - 2)})


def mirror(ctx: TorchLowering, op: Op) -> None:
    """Padding by reflection, by the edge, or around the corner; torch names the axes from the last one on."""
    given, name, rank = arguments(op), operator_name(op), ctx.rank(op)
    stated = _static(ctx, given.get("pad", given.get("padding")))
    mode = given.get("mode", "reflect" if "reflection" in name else "replicate")
    if mode not in MODES:
        raise Blocked(f"it pads in mode {mode}")
    widths = [(0, 0)] * rank
    for i in range(0, len(stated), 2):
        widths[rank - 1 - i // 2] = (stated[i], stated[i + 1])
    geometry.mirror(ctx, op, first(op), widths, MODES[mode])


MOVES: dict[str, Lower] = {
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
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), by_first(geometry.expand, tiles=False)),
    **dict.fromkeys(("repeat", "tile"), by_first(geometry.expand, tiles=True)),
    "repeat_interleave": interleave,
    "index": index,
    "index_select": index_select,
    "gather": gather,
    "take_along_dim": gather,
    "flip": flip,
    "roll": roll,
    "pixel_shuffle": blocks,
    "pixel_unshuffle": blocks,
    "unfold": unfold,
    "im2col": columns,
    "channel_shuffle": channel_shuffle,
    "native_channel_shuffle": channel_shuffle,
    **{f"{kind}_pad{n}d": mirror for kind in ("reflection", "replication") for n in (1, 2, 3)},
}
