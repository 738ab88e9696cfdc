"""How a stored array is laid out, against the layout that the rules have of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .affine import Blocked

Shape = tuple[int, ...]
Array = npt.NDArray[Any]  # of any type: what only rearranges does so in each
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """`canonical` gives the rules' layout, `stored` is its inverse.

    linear: both only rearrange the elements, or multiply them by `gain` (canonical over stored). whole: of an array that has lost places,
    the layout before.
    """

    name: str
    canonical: Callable[[Array], Array]
    stored: Callable[[Array], Array]
    linear: bool = True
    gain: float = 1.0
    whole: Layout | None = None

    def after(self, first: Layout) -> Layout:
        """This layout of what another one makes of the stored array."""
        if first is AS_STORED or self is AS_STORED:
            return self if first is AS_STORED else first
        return Layout(
            f"{self.name} of {first.name}",
            lambda w: self.canonical(first.canonical(w)),
            lambda w: first.stored(self.stored(w)),
            self.linear and first.linear,
            self.gain * first.gain,
        )

    def fewer(self, shape: Shape, kept: Mapping[int, Places]) -> Layout:
        """The same of an array that has lost places along some axes. shape: canonical, before. kept: the places left, by axis."""

        def spread(w: Array) -> Array:
            full = np.full([shape[i] if i in kept and shape[i] > 1 else n for i, n in enumerate(w.shape)], np.nan)
            full[np.ix_(*(kept[i] if i in kept and shape[i] > 1 else np.arange(n) for i, n in enumerate(w.shape)))] = w
            return full

        return Layout(
            f"{self.name}, at places {hash(tuple((i, each.tobytes()) for i, each in kept.items()))}",
            lambda w: taken(self.canonical(w), kept, len(shape)),
            lambda w: _without_gaps(self.stored(spread(w))),
            self.linear,
            self.gain,
            self.whole or self,
        )


def taken(c: Array, kept: Mapping[int, Places], rank: int) -> Array:
    """What is left of coefficients for so many axes, which may have fewer, or the size 1 along some."""
    for axis, places in kept.items():
        own = axis - (rank - c.ndim)
        if own >= 0 and c.shape[own] > 1:
            c = c.take(places, own)
    return c


def _without_gaps(w: Array) -> Array:
    """An array without the places along each axis at which it has no numbers at all."""
    there = ~np.isnan(w)
    return w[np.ix_(*(np.flatnonzero(there.any(axis=tuple(i for i in range(w.ndim) if i != axis))) for axis in range(w.ndim)))]


AS_STORED = Layout("as stored", lambda w: w, lambda w: w)


def scaled(canonical: Shape, stored: Shape, factor: float = 1.0) -> Layout:
    """A constant in another shape, `factor` times. An array that grew is stored in the canonical rank, which broadcasts alike.

    Raises Blocked where one shape has more elements than the other.
    """
    if math.prod(canonical) != math.prod(stored):
        raise Blocked(f"its parameter of shape {stored} doesn't fit where {canonical} must stand")
    if factor == 1 and canonical == stored:
        return AS_STORED
    if factor == 1:
        return Layout(f"as {canonical}", lambda w: w.reshape(canonical), lambda w: _back(w, canonical, stored))
    return Layout(
        f"{factor} times {canonical}",
        lambda w: factor * w.reshape(canonical),
        lambda w: _back(w / factor, canonical, stored),
        gain=abs(factor),
    )


def _back(w: Array, canonical: Shape, stored: Shape) -> Array:
    return w.reshape(stored) if w.shape == canonical else w


def reciprocal(canonical: Shape, stored: Shape) -> Layout:
    return Layout(f"reciprocal {canonical}", lambda w: 1 / w.reshape(canonical), lambda w: _back(1 / w, canonical, stored), linear=False)


def new(shape: Shape, stored: Shape) -> Layout:
    """Of a parameter that isn't there yet: what it grows to is stored in this shape."""
    return Layout(f"new {shape}", lambda w: w, lambda w: np.broadcast_to(w, shape).reshape(stored))


def swapped(stored: Shape, groups: int) -> tuple[Shape, Layout]:
    """[in, out/g, *kernel] as [out, in/g, *kernel]."""
    fan_in, fan_out, kernel = stored[0] // groups, stored[1], stored[2:]
    canonical = (fan_out * groups, fan_in, *kernel)

    def turn(w: Array, rows: int, columns: int, shape: Shape) -> Array:
        return w.reshape(groups, rows, columns, *kernel).swapaxes(1, 2).reshape(shape)

    return canonical, Layout(
        f"transposed in {groups} groups", lambda w: turn(w, fan_in, fan_out, canonical), lambda w: turn(w, fan_out, fan_in, stored)
    )
