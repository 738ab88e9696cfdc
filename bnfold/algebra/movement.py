"""One rule for every operator that only moves data: run it on element numbers and read off where each output came from.

A move node says how to run it, `attrs["run"](arrays, output_shape)`, and which axes it leaves alone, `attrs["kept"]`
(input axis -> output axis). Along a kept axis nothing needs numbering, so it is as long as the map has coefficients there;
every other axis is run at its real size, at each of the probe sizes. What comes out must be the same at every probe, or the
map would depend on a size that the user may change.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .affine import Affine, Array, Blocked
from .graph import Node, Value

Ids = npt.NDArray[np.int64]


class Unsized(Blocked):
    """Blocked since a size isn't known, which a map that doesn't vary along the axes in question doesn't need."""


def move_up(node: Node, a: Affine, *, shrink: bool = True) -> list[Affine]:
    """The map of each input, from the map on the output; elements that the output doesn't read are free (NaN).

    shrink: whether axes along which nothing varies but what is free may shrink, so that probes of different size agree.
    """
    try:
        return _up(node, a, shrink)
    except Unsized:
        if not set(a.varying) <= set(node.attrs["kept"].values()):
            raise
        return [_along(a, {o: i for i, o in node.attrs["kept"].items()}, _rank(v)) for v in node.inputs]


def _up(node: Node, a: Affine, shrink: bool) -> list[Affine]:
    kept = node.attrs["kept"]
    per_probe: list[list[Affine]] = []
    for probe in range(_probes(node)):
        along = {i: a.shape[o] for i, o in kept.items()}
        shapes, ids = _numbered(node, probe, along)
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        maps = []
        both = []
        for c in (a.scale, a.shift):
            flat = np.full(ends[-1], np.nan)
            wanted = _over(c, ids.shape)
            known = ~np.isnan(wanted)
            flat[ids[known]] = wanted[known]
            if (flat[ids[known]] != wanted[known]).any():
                raise Blocked("copies of one element would need different maps")
            both.append(np.split(flat, ends[:-1]))
        for shape, scale, shift in zip(shapes, *both, strict=True):
            maps.append(_shrunk(Affine(scale.reshape(shape), shift.reshape(shape))))
        per_probe.append(maps)
    return [_agreed(list(maps), shrink) for maps in zip(*per_probe, strict=True)]


def move_down(node: Node, maps: list[Affine]) -> Affine:
    """The map of the output, from the maps on the inputs."""
    try:
        return _down(node, maps)
    except Unsized:
        if not all(a.same_as(maps[0]) and set(a.varying) <= set(node.attrs["kept"]) for a in maps):
            raise
        return _along(maps[0], node.attrs["kept"], _rank(node.output))


def _along(a: Affine, axes: dict[int, int], rank: int) -> Affine:
    """A map that varies along axes that are left alone, on the other side: whatever the sizes of the others are."""
    targets = sorted(axes[axis] for axis in a.varying)
    order = sorted(a.varying, key=lambda axis: axes[axis])

    def move(c: Array) -> Array:
        c = c.transpose(*order, *(axis for axis in range(c.ndim) if axis not in order))
        return c.reshape([a.shape[order[targets.index(axis)]] if axis in targets else 1 for axis in range(rank)])

    return a.map(move)


def _down(node: Node, maps: list[Affine]) -> Affine:
    found = []
    for probe in range(_probes(node)):
        along = {i: max(a.shape[i] if a.rank else 1 for a in maps) for i in node.attrs["kept"]}
        shapes, ids = _numbered(node, probe, along)
        scale, shift = (
            np.concatenate([_over(c, shape).ravel() for c, shape in zip(cs, shapes, strict=True)])[ids]
            for cs in ([a.scale for a in maps], [a.shift for a in maps])
        )
        found.append(_shrunk(Affine(scale, shift)))
    return _agreed(found, True).settled()


def _over(c: Array, shape: tuple[int, ...]) -> Array:
    """The coefficients of every element."""
    if any(n not in (1, size) for n, size in zip(c.shape, shape, strict=False)):
        raise Blocked("the map varies along an axis of dynamic size")
    return np.broadcast_to(c, shape)


def _probes(node: Node) -> int:
    return max([len(v.probes) for v in (*node.inputs, node.output) if v.probes is not None], default=1)


def _numbered(node: Node, probe: int, along: dict[int, int]) -> tuple[list[tuple[int, ...]], Ids]:
    """The inputs' shapes, and the number of the input element that each output element shows."""
    shapes = [tuple(along[i] if i in along else _size(v, probe, i, node) for i in range(_rank(v))) for v in node.inputs]
    kept = {o: along[i] for i, o in node.attrs["kept"].items()}
    out = tuple(kept[o] if o in kept else _size(node.output, probe, o, node) for o in range(_rank(node.output)))
    start, numbers = 0, []
    for shape in shapes:
        size = int(np.prod(shape))
        numbers.append(np.arange(start, start + size).reshape(shape))
        start += size
    try:
        ids = node.attrs["run"](numbers, out)
    except (ValueError, IndexError):
        raise Blocked("its shapes don't fit each other at all the sizes that were tried") from None
    if ids.shape != out:
        raise Blocked(f"its output shape isn't certain (found {ids.shape}, expected {out})")
    return shapes, ids


def _rank(value: Value) -> int:
    if value.rank is None:
        raise Blocked(f"the rank of {value.name} isn't known")
    return value.rank


def _size(value: Value, probe: int, axis: int, node: Node) -> int:
    if axis in node.attrs.get("ones", {}).get(value, ()):
        return 1
    size = None if value.probes is None else value.probes[min(probe, len(value.probes) - 1)][axis]
    if size is None:
        raise Unsized(f"the size of axis {axis} of {value.name} isn't known")
    return size


def _shrunk(a: Affine) -> Affine:
    """Shrink the axes along which nothing varies, free elements counting as different from all others."""
    scale, shift = a.scale, a.shift
    for axis in (axis for axis, size in enumerate(a.shape) if size > 1):
        first: list[Array] = [c.take([0], axis) for c in (scale, shift)]
        if all(_same(f, c) for f, c in zip(first, (scale, shift), strict=True)):
            scale, shift = first
    return Affine(scale, shift)


def _same(one: Array, other: Array) -> bool:
    """Whether two arrays that broadcast are equal, free elements to each other."""
    equal = one == other
    return bool(equal.all() or (equal | (np.isnan(one) & np.isnan(other))).all())


def _agreed(found: list[Affine], shrink: bool) -> Affine:
    """The map that all probes found; free elements may be what hides that they agree."""
    for maps in (found, [a.settled() for a in found]) if shrink else (found,):
        first = maps[0]
        if all(a.shape == first.shape and _same(a.scale, first.scale) and _same(a.shift, first.shift) for a in maps[1:]):
            return first
    raise Blocked("where the map goes depends on the size of a dynamic axis")
