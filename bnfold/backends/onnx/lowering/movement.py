"""The ONNX operators that only move data, each as what it does to an array and which axes it leaves alone (see bnfold.moves)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graph.walk import arg, attribute, whole, wholes
from .lowering import OnnxLowering

Ids = npt.NDArray[np.int64]
Run = Callable[[list[Ids], tuple[int, ...]], Ids]
UNKNOWN = "the rank of its input isn't known"
COMPUTED = "how it moves data is computed"


def _move(
    ctx: OnnxLowering,
    node: ir.Node,
    run: Run,
    kept: dict[int, int],
    *,
    output: ir.Value | None = None,
    inputs: list[ir.Value] | None = None,
    ones: dict[ir.Value, tuple[int, ...]] | None = None,
) -> None:
    sources = inputs if inputs is not None else [v for v in node.inputs[:1] if v is not None]
    sizes = {ctx.value(v): axes for v, axes in (ones or {}).items()}
    ctx.emit("Move", node, sources, {"run": run, "kept": kept, "ones": sizes}, output=output)


def _same(rank: int, but: Any = ()) -> dict[int, int]:
    return {i: i for i in range(rank) if i not in but}


def _reshape(ctx: OnnxLowering, node: ir.Node) -> str | None:
    """Reshape and Flatten: axes at the front and at the back whose sizes agree, at every probe, are left alone."""
    x, y = ctx.value(arg(node)), ctx.value(node.outputs[0])
    if x.probes is None or y.probes is None:
        return "the shapes around it aren't known"
    front = _agreeing([(a, b) for a, b in zip(x.probes, y.probes, strict=True)])
    back = _agreeing([(a[front:][::-1], b[front:][::-1]) for a, b in zip(x.probes, y.probes, strict=True)])
    n, m = len(x.probes[0]), len(y.probes[0])
    kept = {i: i for i in range(front)} | {n - 1 - i: m - 1 - i for i in range(back)}
    _move(ctx, node, lambda xs, shape: xs[0].reshape(shape), kept)
    return None


def _agreeing(pairs: list[tuple[Any, Any]]) -> int:
    count = 0
    while all(count < min(len(a), len(b)) and a[count] is not None and a[count] == b[count] for a, b in pairs):
        count += 1
    return count


def _squeeze(ctx: OnnxLowering, node: ir.Node) -> str | None:
    x, rank = arg(node), ctx.rank(arg(node))
    if rank is None:
        return UNKNOWN
    axes = ctx.static(node, "axes", 1, [])
    if axes is None:
        return COMPUTED
    if not axes:
        sizes = ctx.value(x).sizes
        if sizes is None or None in sizes:
            return "which axes it takes away depends on a size that isn't known"
        axes = [i for i, n in enumerate(sizes) if n == 1]
    gone = {int(axis) % rank for axis in axes}
    left = [i for i in range(rank) if i not in gone]
    ctx.set_rank(node.outputs[0], len(left))
    _move(ctx, node, lambda xs, _: xs[0].squeeze(tuple(gone)), {i: o for o, i in enumerate(left)}, ones={x: tuple(gone)})
    return None


def _unsqueeze(ctx: OnnxLowering, node: ir.Node) -> str | None:
    rank = ctx.rank(arg(node))
    if rank is None:
        return UNKNOWN
    axes = ctx.static(node, "axes", 1)
    if axes is None:
        return COMPUTED
    total = rank + len(axes)
    new = tuple(sorted(int(axis) % total for axis in axes))
    ctx.set_rank(node.outputs[0], total)
    old = [o for o in range(total) if o not in new]
    _move(ctx, node, lambda xs, _: np.expand_dims(xs[0], new), dict(enumerate(old)), ones={node.outputs[0]: new})
    return None


def _transpose(ctx: OnnxLowering, node: ir.Node) -> str | None:
    rank = ctx.rank(arg(node))
    perm = wholes(node, "perm") or None
    if perm is None and rank is None:
        return UNKNOWN
    order = tuple(range(rank or 0))[::-1] if perm is None else perm
    ctx.set_rank(node.outputs[0], len(order))
    ctx.set_rank(arg(node), len(order))
    _move(ctx, node, lambda xs, _: xs[0].transpose(order), {i: o for o, i in enumerate(order)})
    return None


def _concat(ctx: OnnxLowering, node: ir.Node) -> str | None:
    inputs = [v for v in node.inputs if v is not None]
    rank = next((r for r in map(ctx.rank, [*inputs, node.outputs[0]]) if r is not None), None)
    if rank is None:
        return UNKNOWN
    if len({ctx.constants.dtype(v) if ctx.constants.is_constant(v) else ctx.shapes.dtype(v) for v in inputs} - {None}) > 1:
        return "its inputs differ in type"
    axis = whole(node, "axis", 1) % rank
    for v in (*inputs, node.outputs[0]):
        if not ctx.constants.is_constant(v):
            ctx.set_rank(v, rank)
    constant = [v for v in inputs if ctx.constants.is_constant(v)]
    kept = {} if constant else _same(rank, (axis,))  # a constant part has its real size along every axis
    _move(ctx, node, lambda xs, _: np.concatenate(xs, axis), kept, inputs=inputs)
    return None


def _slice(ctx: OnnxLowering, node: ir.Node) -> str | None:
    rank = ctx.rank(arg(node))
    if rank is None:
        return UNKNOWN
    ctx.set_rank(node.outputs[0], rank)
    starts, ends = ctx.static(node, "starts", 1), ctx.static(node, "ends", 2)
    axes, steps = ctx.static(node, "axes", 3, list(range(rank))), ctx.static(node, "steps", 4, [1] * rank)
    if axes is None:
        return COMPUTED
    touched = tuple(int(axis) % rank for axis in axes)
    if starts is None or ends is None or steps is None:
        ctx.emit("Crop", node, [arg(node)], {"mixes": touched})
        return None
    cuts = [slice(None)] * rank
    for axis, start, end, step in zip(touched, starts, ends, steps, strict=False):
        last = None if step < 0 and end <= -(2**31) + 1 else int(end)
        cuts[axis] = slice(int(start), last, int(step))
    _move(ctx, node, lambda xs, _: xs[0][tuple(cuts)], _same(rank, touched))
    return None


def _split(ctx: OnnxLowering, node: ir.Node) -> str | None:
    """One move for each output."""
    rank = ctx.rank(arg(node))
    if rank is None:
        return UNKNOWN
    axis = whole(node, "axis", 0) % rank
    parts = ctx.static(node, "split", 1, [])
    size = (ctx.value(arg(node)).sizes or ())[axis]
    if not parts and parts is not None and size is not None:
        each = -(-size // len(node.outputs))
        parts = [min(each, size - i * each) for i in range(len(node.outputs))]
    if not parts:
        return COMPUTED
    start = 0
    for v, n in zip(node.outputs, parts, strict=True):
        ctx.set_rank(v, rank)
        cut = (slice(None),) * axis + (slice(start, start + int(n)),)
        _move(ctx, node, _cut(cut), _same(rank, (axis,)), output=v)
        start += int(n)
    return None


def _cut(where: tuple[slice, ...]) -> Run:
    return lambda xs, _: xs[0][where]


def _gather(ctx: OnnxLowering, node: ir.Node) -> str | None:
    rank, indices = ctx.rank(arg(node)), ctx.const(node, 1)
    if rank is None:
        return UNKNOWN
    axis = whole(node, "axis", 0) % rank
    if indices is None:
        return _lookup(ctx, node, axis, 1, ctx.rank(arg(node, 1)))
    ctx.set_rank(node.outputs[0], rank - 1 + indices.ndim)
    kept = {i: i if i < axis else i - 1 + indices.ndim for i in range(rank) if i != axis}
    _move(ctx, node, lambda xs, _: np.take(xs[0], indices, axis), kept)
    return None


def _lookup(ctx: OnnxLowering, node: ir.Node, axis: int, taken: int, new: int | None) -> str | None:
    """Data at computed places, which stand for `taken` axes from `axis` on; `new` axes of the output are theirs."""
    rank = ctx.rank(arg(node))
    if rank is None or new is None:
        return UNKNOWN
    ctx.set_rank(node.outputs[0], rank - taken + new)
    ctx.emit("Lookup", node, [arg(node)], {"axis": axis, "taken": taken, "given": new})
    return None


def _gather_elements(ctx: OnnxLowering, node: ir.Node) -> str | None:
    """Each element from another place along the axis, and from its own along all axes of the same size."""
    rank, fixed = ctx.rank(arg(node)), ctx.const(node, 1)
    if rank is None:
        return UNKNOWN
    ctx.set_rank(node.outputs[0], rank)
    axis = whole(node, "axis", 0) % rank
    if fixed is not None and None not in (ctx.value(arg(node)).sizes or (None,)):

        def run(xs: list[Ids], _: tuple[int, ...]) -> Ids:
            inside = tuple(slice(None) if i == axis else slice(n) for i, n in enumerate(fixed.shape))
            return np.take_along_axis(xs[0][inside], fixed, axis)

        _move(ctx, node, run, {})
        return None
    before, after = ctx.value(arg(node)).probes, ctx.value(node.outputs[0]).probes
    if before is None or after is None:
        return "the shapes around it aren't known"
    moved = {i for i in range(rank) if any(a[i] is None or a[i] != b[i] for a, b in zip(before, after, strict=True))}
    ctx.emit("Crop", node, [arg(node)], {"mixes": tuple(sorted(moved | {axis}))})
    return None


def _gather_nd(ctx: OnnxLowering, node: ir.Node) -> str | None:
    """x[i] by the vectors along the last axis of the places, behind the axes that both have in common."""
    places, fixed, rank = ctx.value(arg(node, 1)), ctx.const(node, 1), ctx.rank(arg(node))
    if fixed is not None and rank is not None and not whole(node, "batch_dims", 0):
        named, new = fixed.shape[-1], fixed.ndim - 1
        ctx.set_rank(node.outputs[0], new + rank - named)
        kept = {i: i - named + new for i in range(named, rank)}
        _move(ctx, node, lambda xs, _: xs[0][tuple(np.moveaxis(fixed, -1, 0))], kept)
        return None
    lead, taken = whole(node, "batch_dims", 0), None if places.sizes is None else places.sizes[-1]
    return COMPUTED if taken is None or places.rank is None else _lookup(ctx, node, lead, taken, places.rank - 1 - lead)


def _expand(ctx: OnnxLowering, node: ir.Node) -> str | None:
    """Expand and Tile: axes that keep their size at every probe are left alone."""
    x, y = ctx.value(arg(node)), ctx.value(node.outputs[0])
    if x.probes is None or y.probes is None:
        return "the shapes around it aren't known"
    lead = len(y.probes[0]) - len(x.probes[0])
    kept = {
        i: i + lead
        for i in range(len(x.probes[0]))
        if all(a[i] is not None and a[i] == b[i + lead] for a, b in zip(x.probes, y.probes, strict=True))
    }

    def run(xs: list[Ids], shape: tuple[int, ...]) -> Ids:
        if node.op_type == "Tile":
            return np.tile(xs[0], [n // m for n, m in zip(shape, xs[0].shape, strict=True)])
        return np.broadcast_to(xs[0], shape)

    _move(ctx, node, run, kept)
    return None


def _depth_to_space(ctx: OnnxLowering, node: ir.Node) -> str | None:
    b = whole(node, "blocksize", 1)
    column_first = attribute(node, "mode", "DCR") == "CRD"

    def run(xs: list[Ids], shape: tuple[int, ...]) -> Ids:
        n, c, h, w = xs[0].shape
        if column_first:
            return xs[0].reshape(n, c // b**2, b, b, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(shape)
        return xs[0].reshape(n, b, b, c // b**2, h, w).transpose(0, 3, 4, 1, 5, 2).reshape(shape)

    ctx.set_rank(node.outputs[0], 4)
    _move(ctx, node, run, {0: 0})
    return None


def _space_to_depth(ctx: OnnxLowering, node: ir.Node) -> str | None:
    b = whole(node, "blocksize", 1)

    def run(xs: list[Ids], shape: tuple[int, ...]) -> Ids:
        n, c, h, w = xs[0].shape
        return xs[0].reshape(n, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4).reshape(shape)

    ctx.set_rank(node.outputs[0], 4)
    _move(ctx, node, run, {0: 0})
    return None


def _mirror_pad(ctx: OnnxLowering, node: ir.Node) -> str | None:
    """Pad in mode reflect, edge or wrap."""
    rank = ctx.rank(arg(node))
    if rank is None:
        return UNKNOWN
    pads = ctx.static(node, "pads" if "pads" in node.attributes else "paddings", 1)
    axes = ctx.static(node, "", 3, list(range(rank)))
    if pads is None or axes is None:
        return COMPUTED
    half, widths = len(pads) // 2, [(0, 0)] * rank
    for axis, lo, hi in zip(axes, pads[:half], pads[half:], strict=True):
        widths[int(axis) % rank] = (int(lo), int(hi))
    cuts = tuple(slice(max(-lo, 0), min(hi, 0) or None) for lo, hi in widths)
    grow = [(max(lo, 0), max(hi, 0)) for lo, hi in widths]
    mode: Any = attribute(node, "mode")
    ctx.set_rank(node.outputs[0], rank)
    _move(ctx, node, lambda xs, _: np.pad(xs[0][cuts], grow, mode=mode), _same(rank, [i for i, w in enumerate(widths) if w != (0, 0)]))
    return None


def sequence(ctx: OnnxLowering, node: ir.Node) -> str | None:
    """A sequence is nothing to the rules where all that is done with it is taking its parts out again."""
    return None if ctx.sequences.follows(node) else "it makes a sequence that isn't only taken apart again"


def taken(ctx: OnnxLowering, node: ir.Node) -> str | None:
    """SequenceAt and ConcatFromSequence: a move of the tensors that the parts are cut from."""
    parts = ctx.sequences.parts(node)
    if parts is None:
        return "which parts of its sequence it takes isn't known"
    rank, drops = ctx.rank(parts[0].source), parts[0].drops
    if rank is None:
        return UNKNOWN
    stacks = bool(attribute(node, "new_axis", 0))
    along = None if node.op_type == "SequenceAt" else whole(node, "axis", 0) % (rank - drops + stacks)
    ctx.set_rank(node.outputs[0], rank - drops + stacks)
    cut = {part.axis % rank for part in parts if part.start is not None}
    alike = all(part.drops == drops and not ctx.constants.is_constant(part.source) for part in parts)
    kept = {}
    for axis in range(rank) if alike else ():
        out = axis - (drops and axis > parts[0].axis % rank)
        out += stacks and along is not None and out >= along
        if axis not in cut and out != along:
            kept[axis] = out

    def run(xs: list[Ids], _: tuple[int, ...]) -> Ids:
        arrays = [part.cut(x) for part, x in zip(parts, xs, strict=True)]
        return arrays[0] if along is None else np.stack(arrays, along) if stacks else np.concatenate(arrays, along)

    ctx.emit_parts(node, parts, {"run": run, "kept": kept})
    return None


MOVES: dict[str, Callable[[OnnxLowering, ir.Node], str | None]] = {
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Concat": _concat,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Expand": _expand,
    "Tile": _expand,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Pad": _mirror_pad,
}
