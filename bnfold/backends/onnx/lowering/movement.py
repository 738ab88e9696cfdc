"""The ONNX operators that only move data, each as what it does to an array (see `bnfold.algebra.movement`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bnfold.algebra import geometry
from bnfold.algebra.affine import Blocked
from bnfold.algebra.geometry import COMPUTED, Ids

from ..graph.walk import arg, attribute, whole, wholes
from .lowering import Lower, OnnxLowering, by_first


def _stated(ctx: OnnxLowering, node: ir.Node, name: str, index: int, default: Any = None) -> Any:
    """A setting, or `Blocked` where it is computed."""
    found = ctx.static(node, name, index, default)
    if found is None:
        raise Blocked(COMPUTED)
    return found


def _squeeze(ctx: OnnxLowering, node: ir.Node) -> None:
    x, rank = arg(node), ctx.rank(arg(node))
    axes = _stated(ctx, node, "axes", 1, [])
    if not axes:
        sizes = ctx.value(x).sizes
        if sizes is None or None in sizes:
            raise Blocked("which axes it takes away depends on a size that isn't known")
        axes = [i for i, n in enumerate(sizes) if n == 1]
    geometry.squeeze(ctx, node, x, geometry.counted(axes, rank))


def _unsqueeze(ctx: OnnxLowering, node: ir.Node) -> None:
    rank, axes = ctx.rank(arg(node)), _stated(ctx, node, "axes", 1)
    geometry.unsqueeze(ctx, node, arg(node), geometry.counted(axes, rank + len(axes)))


def _transpose(ctx: OnnxLowering, node: ir.Node) -> None:
    order = wholes(node, "perm") or range(ctx.rank(arg(node)))[::-1]
    geometry.transpose(ctx, node, arg(node), order)


def _concat(ctx: OnnxLowering, node: ir.Node) -> None:
    geometry.concat(ctx, node, [v for v in node.inputs if v is not None], whole(node, "axis", 1))


def _slice(ctx: OnnxLowering, node: ir.Node) -> None:
    x, rank = arg(node), ctx.rank(arg(node))
    ctx.set_rank(node.outputs[0], rank)
    axes = [int(axis) % rank for axis in _stated(ctx, node, "axes", 3, list(range(rank)))]
    starts, ends = ctx.static(node, "starts", 1), ctx.static(node, "ends", 2)
    steps = ctx.static(node, "steps", 4, [1] * rank)
    if starts is None or ends is None or steps is None:
        geometry.crop(ctx, node, x, axes)
        return
    cuts = {
        axis: slice(int(start), None if step < 0 and end <= -(2**31) + 1 else int(end), int(step))
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=False)
    }
    geometry.cut(ctx, node, x, cuts)


def _split(ctx: OnnxLowering, node: ir.Node) -> None:
    axis = whole(node, "axis", 0) % ctx.rank(arg(node))
    parts = _stated(ctx, node, "split", 1, [])
    if not parts:
        size, count = (ctx.value(arg(node)).sizes or ())[axis], len(node.outputs)
        if size is None:
            raise Blocked(COMPUTED)
        each = -(-size // count)
        parts = [min(each, size - i * each) for i in range(count)]
    geometry.split(ctx, node, arg(node), axis, [int(n) for n in parts])


def gathered(ctx: OnnxLowering, node: ir.Node) -> None:
    x, places = arg(node), ctx.const(arg(node, 1))
    axis = whole(node, "axis", 0) % ctx.rank(x)
    if places is None:
        geometry.lookup(ctx, node, x, axis, 1, ctx.rank(arg(node, 1)))
    else:
        geometry.take(ctx, node, x, axis, places)


def _gather_elements(ctx: OnnxLowering, node: ir.Node) -> None:
    x = arg(node)
    geometry.take_along(ctx, node, x, whole(node, "axis", 0) % ctx.rank(x), ctx.const(arg(node, 1)))


def _gather_nd(ctx: OnnxLowering, node: ir.Node) -> None:
    """x[i] by the vectors along the last axis of the places, behind the axes that both have in common."""
    x, places, fixed = arg(node), ctx.value(arg(node, 1)), ctx.const(arg(node, 1))
    rank, lead = ctx.rank(x), whole(node, "batch_dims", 0)
    if fixed is not None and not lead:
        named, new = fixed.shape[-1], fixed.ndim - 1
        ctx.set_rank(node.outputs[0], new + rank - named)
        kept = {i: i - named + new for i in range(named, rank)}
        geometry.move(ctx, node, [x], lambda xs, _: xs[0][tuple(np.moveaxis(fixed, -1, 0))], kept)
        return
    taken = None if places.sizes is None else places.sizes[-1]
    if taken is None or places.rank is None:
        raise Blocked(COMPUTED)
    geometry.lookup(ctx, node, x, lead, taken, places.rank - 1 - lead)


def _compress(ctx: OnnxLowering, node: ir.Node) -> None:
    """The places along an axis, or in the flat array, at which a mask is true."""
    x, mask = arg(node), ctx.const(arg(node, 1))
    if "axis" not in node.attributes:
        if mask is None:
            raise Blocked(COMPUTED)
        ctx.set_rank(node.outputs[0], 1)
        ctx.set_size(node.outputs[0], 0, int(mask.sum()))
        geometry.move(ctx, node, [x], lambda xs, _: np.compress(mask, xs[0]), {})
        return
    axis = whole(node, "axis", 0) % ctx.rank(x)
    if mask is None:
        geometry.lookup(ctx, node, x, axis, 1, 1)
    else:
        geometry.take(ctx, node, x, axis, np.flatnonzero(mask))


def _center_crop_pad(ctx: OnnxLowering, node: ir.Node) -> None:
    """A crop, or zeros beside, as much on either side."""
    x = arg(node)
    pairs = ctx.around(x, node.outputs[0])
    changed = [i for i in range(len(pairs[0][0])) if i not in geometry.keeping(pairs)]
    sizes = [(before[i], after[i]) for before, after in pairs for i in changed]
    if all(before is not None and after is not None and after <= before for before, after in sizes):
        geometry.crop(ctx, node, x, changed)
    else:
        geometry.pad(ctx, node, x, changed, 0.0)


def _reverse(ctx: OnnxLowering, node: ir.Node) -> None:
    """Each sample from its own last step back, as a bidirectional network reads it; what lies behind that stays."""
    geometry.crop(ctx, node, arg(node), [whole(node, "batch_axis", 1), whole(node, "time_axis", 0)])


def _blocks(ctx: OnnxLowering, node: ir.Node) -> None:
    spreads = node.op_type == "DepthToSpace"
    first = spreads and attribute(node, "mode", "DCR") == "CRD"
    geometry.blocks(ctx, node, arg(node), whole(node, "blocksize", 1), spreads=spreads, channels_first=first)


def widths(ctx: OnnxLowering, node: ir.Node) -> list[tuple[int, int]] | None:
    """What Pad pads before and behind, for each axis; None where that is computed."""
    rank = ctx.rank(arg(node))
    pads = ctx.static(node, "pads" if "pads" in node.attributes else "paddings", 1)
    axes = ctx.static(node, "", 3, list(range(rank)))
    if pads is None or axes is None:
        return None
    half, found = len(pads) // 2, [(0, 0)] * rank
    for axis, low, high in zip(axes, pads[:half], pads[half:], strict=False):
        found[int(axis) % rank] = (int(low), int(high))
    return found


def mirror(ctx: OnnxLowering, node: ir.Node) -> None:
    """Pad in mode reflect, edge or wrap."""
    found = widths(ctx, node)
    if found is None:
        raise Blocked(COMPUTED)
    geometry.mirror(ctx, node, arg(node), found, attribute(node, "mode"))


def sequence(ctx: OnnxLowering, node: ir.Node) -> None:
    """A sequence is nothing to the rules where all that is done with it is taking its parts out again."""
    if not ctx.sequences.follows(node):
        raise Blocked("it makes a sequence that isn't only taken apart again")


def from_sequence(ctx: OnnxLowering, node: ir.Node) -> None:
    """SequenceAt and ConcatFromSequence: a move of the tensors that the parts are cut from.

    It can't be doubled, nor read a double, nor be compared by what it is set to: its inputs are another operator's.
    """
    parts = ctx.sequences.parts(node)
    if parts is None:
        raise Blocked("which parts of its sequence it takes isn't known")
    rank, drops, y = ctx.rank(parts[0].source), parts[0].drops, node.outputs[0]
    stacks = bool(attribute(node, "new_axis", 0))
    along = None if node.op_type == "SequenceAt" else whole(node, "axis", 0) % (rank - drops + stacks)
    ctx.set_rank(y, rank - drops + stacks)
    cut = {part.axis % rank for part in parts if part.start is not None}
    for part in parts:
        lengths = [sizes[part.axis] for sizes in ctx.value(part.source).probes or ()] if part.start is not None else []
        if any(n is not None and part.start is not None and part.start >= n for n in lengths):
            raise Blocked("it takes a part that isn't there")
    alike = all(part.drops == drops and not ctx.is_constant(part.source) for part in parts)
    kept = {}
    for axis in range(rank) if alike else ():
        out = axis - (drops and axis > parts[0].axis % rank)
        out += stacks and along is not None and out >= along
        if axis not in cut and out != along:
            kept[axis] = out

    def run(xs: list[Ids], _: tuple[int, ...]) -> npt.NDArray[Any]:
        arrays = [part.cut(x) for part, x in zip(parts, xs, strict=True)]
        return arrays[0] if along is None else np.stack(arrays, along) if stacks else np.concatenate(arrays, along)

    native = ctx.native(node, [], [part.index for part in parts], y)
    sources = [ctx.operand(part.node, part.source, part.index) for part in parts]
    attrs = {"limit": native.limit, "cloneable": False, "settings": None, "run": run, "kept": kept}
    ctx.add("Move", node, sources, [ctx.value(y)], attrs, {}, native)


MOVES: dict[str, Lower] = {
    **dict.fromkeys(("Reshape", "Flatten"), by_first(geometry.reshape)),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Compress": _compress,
    "CenterCropPad": _center_crop_pad,
    "ReverseSequence": _reverse,
    "Expand": by_first(geometry.expand, tiles=False),
    "Tile": by_first(geometry.expand, tiles=True),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _blocks),
}
