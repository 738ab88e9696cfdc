"""Large arrays in blocks that fit a processor's cache, where they are folded, rounded and measured; none is made whole in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import rounding
from .affine import Array
from .graph import Param

BLOCK = 1 << 16  # numbers


def aligned(first: npt.NDArray[Any], *others: npt.NDArray[Any]) -> Iterator[tuple[npt.NDArray[Any], ...]]:
    """The parts of an array, each with those of others of its rank that broadcast to it; views, in the order in which the array lies."""
    order = sorted(range(first.ndim), key=lambda axis: -abs(first.strides[axis]))
    arrays = [array.transpose(order) for array in (first, *others)]
    for place in _places(arrays[0].shape):
        yield tuple(_part(array, place) for array in arrays)


def _part(array: npt.NDArray[Any], place: Sequence[slice]) -> npt.NDArray[Any]:
    """What an array that broadcasts has at a place; a view, also of a number without axes."""
    places: tuple[Any, ...] = tuple(slice(None) if n == 1 else part for n, part in zip(array.shape, place, strict=False))
    return array[(*places, ...)]


def _places(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Where blocks lie, along the first axes."""
    inner = int(np.prod(shape[1:], dtype=np.int64)) if shape else 1
    if not shape or shape[0] * inner <= BLOCK:
        yield ()
    elif inner >= BLOCK:
        for i in range(shape[0]):
            for place in _places(shape[1:]):
                yield slice(i, i + 1), *place
    else:
        rows = BLOCK // inner
        for i in range(0, shape[0], rows):
            yield (slice(i, i + rows),)


class Extent(NamedTuple):
    """The largest and the smallest magnitude of an array's numbers, zeros apart: one for each place along some axes, 1 along the others."""

    largest: Array
    smallest: Array


def extent(array: npt.NDArray[Any], axes: Sequence[int]) -> Extent:
    """Largest: NaN where a number is NaN; 0, with an infinite smallest, where there is none but zeros. axes: along which to tell apart.

    Magnitudes of IEEE types are ordered as their bits are, read as whole numbers; of these, one less than zero is the largest.
    """
    kind = np.dtype(f"u{array.dtype.itemsize}")
    magnitude = np.asarray(np.iinfo(kind).max >> 1, kind)
    shape = tuple(n if axis in axes else min(n, 1) for axis, n in enumerate(array.shape))
    largest, smallest = np.zeros(shape, kind), np.full(shape, np.iinfo(kind).max, kind)
    if array.size:
        for part, high, low in aligned(array.view(kind), largest, smallest):
            others = tuple(axis for axis, n in enumerate(high.shape) if n != part.shape[axis])
            bits = part & magnitude
            np.maximum(high, bits.max(axis=others, keepdims=True), out=high)
            bits -= np.asarray(1, kind)
            np.minimum(low, bits.min(axis=others, keepdims=True), out=low)
    live = largest > 0
    smallest = np.where(live, smallest + np.asarray(1, kind), 0).astype(kind)
    return Extent(largest.view(array.dtype).astype(np.float64), np.where(live, smallest.view(array.dtype).astype(np.float64), np.inf))


# --- of a parameter -------------------------------------------------------------------------------------------------------------------


def folded(param: Param, *others: npt.NDArray[Any]) -> Iterator[tuple[npt.NDArray[Any], ...]]:
    """A parameter's canonical array before and behind its update, in blocks of float64, each with the parts of others of its shape.

    A block is overwritten by the next.
    """
    source, update = param.source(), param.update
    if source is None or not _keeps(param, source.shape):
        original = param.original()
        yield original, original if update is None else update(original), *others
        return
    if update is None:
        for part, *rest in aligned(source, *others):
            wide = part.astype(np.float64)
            yield wide, wide, *rest
        return
    maps = [c.reshape((1,) * (source.ndim - c.ndim) + c.shape) for c in (update.scale, update.shift)[: 1 + bool(update.shift.any())]]
    with np.errstate(invalid="ignore", over="ignore"):
        for part, *rest in aligned(source, *maps, *others):
            wide = part.astype(np.float64)
            made = wide * rest[0]
            if len(maps) > 1:
                made += rest[1]
            yield wide, made, *rest[len(maps) :]


def _keeps(param: Param, shape: tuple[int, ...]) -> bool:
    """Whether what the update makes of an array of this shape has it too."""
    update = param.update
    return update is None or (update.rank <= len(shape) and np.broadcast_shapes(update.shape, shape) == shape)


def stored(param: Param, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The array with its update as it will be stored, rounded once."""
    if param.tensor is not None and (made := np.empty(param.tensor.shape, dtype)).size > BLOCK and param.source() is not None:
        there = param.layout.canonical(made)
        if np.may_share_memory(there, made) and _keeps(param, there.shape):
            for _, exact, part in folded(param, there):
                part[...] = rounding.rounded(exact, dtype, flush=param.flush)
            return made
    return rounding.rounded(param.layout.stored(param.read()), dtype, flush=param.flush)


def in_order(param: Param, dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
    """The same in contiguous parts, one behind the other."""
    source = param.source()
    if source is None or not source.flags.c_contiguous or not _is_view(param, source) or not _keeps(param, source.shape):
        yield stored(param, dtype)  # it is laid out anew
        return
    for _, exact in folded(param):
        yield rounding.rounded(exact, dtype, flush=param.flush)


def _is_view(param: Param, source: npt.NDArray[Any]) -> bool:
    tensor = param.tensor
    return tensor is not None and tensor.raw is not None and np.may_share_memory(source, tensor.raw())


def lost(param: Param, dtype: np.dtype[Any]) -> tuple[int, int]:
    """How many coefficients fall below the normal range of a type, where it keeps fewer bits of them, or none; and of how many."""
    source = param.source()
    if source is None or not _keeps(param, source.shape):
        exact = param.layout.stored(param.read())
        return rounding.lost(exact, rounding.rounded(exact, dtype, flush=param.flush)), exact.size
    update = param.update
    if update is not None and not update.shift.any():
        least = np.abs(update.scale[update.scale != 0]).min(initial=np.inf)
        if measured(param).smallest.min(initial=np.inf) * least >= 2 * float(rounding.limits(dtype).tiny):
            return 0, source.size
    return sum(rounding.lost(exact, rounding.rounded(exact, dtype, flush=param.flush)) for _, exact in folded(param)), source.size


def measured(param: Param, axes: Sequence[int] = ()) -> Extent:
    """The extent of the canonical array before its update, worked out once."""
    key = param.layout.name, tuple(axes)
    known: dict[Any, Extent] = {} if param.tensor is None else param.tensor.extents
    if key not in known:
        finer = None if axes else next((found for (layout, _), found in known.items() if layout == key[0]), None)
        if finer is None:
            source = param.source()
            known[key] = extent(param.original() if source is None else source, axes)
        else:
            known[key] = Extent(finer.largest.max(keepdims=True), finer.smallest.min(keepdims=True))
    return known[key]
