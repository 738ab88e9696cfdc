"""Affine maps y = scale * x + shift: the only object that the folding algebra talks about.

Coefficients have the rank of x and size 1 on every axis along which they don't vary, so that
broadcasting *is* the axis bookkeeping: a BatchNorm over NCHW has coefficients of shape (1, C, 1, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Blocked(Exception):
    """The map cannot cross or enter an operator; the text, one clause, says why."""


class NoBias(Blocked):
    """An operator would take the map, had it a place for its shift."""


@dataclass(frozen=True, eq=False)
class Affine:
    """The map x -> scale * x + shift, in float64.

    An element that is NaN in both coefficients is free: nobody reads the data it would apply to
    (see `movement.move_up`). `settled` gives every free element a value.
    """

    scale: Array
    shift: Array

    def __post_init__(self) -> None:
        scale, shift = np.asarray(self.scale, np.float64), np.asarray(self.shift, np.float64)
        if scale.shape != shift.shape:
            scale, shift = np.broadcast_arrays(scale, shift)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "shift", shift)

    @classmethod
    def identity(cls, rank: int) -> Affine:
        one = np.ones((1,) * rank)
        return cls(one, 0 * one)

    @classmethod
    def scaling(cls, scale: npt.ArrayLike) -> Affine:
        """x -> scale * x."""
        return cls(np.asarray(scale, np.float64), np.zeros(()))

    @classmethod
    def shifting(cls, shift: npt.ArrayLike) -> Affine:
        """x -> x + shift."""
        return cls(np.ones(()), np.asarray(shift, np.float64))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.scale.shape

    @property
    def rank(self) -> int:
        return self.scale.ndim

    @property
    def is_identity(self) -> bool:
        return bool((self.scale == 1).all() and (self.shift == 0).all())

    @property
    def varying(self) -> tuple[int, ...]:
        """The axes along which the map varies (of size above 1, since equal coefficients are shrunk)."""
        return tuple(axis for axis, size in enumerate(self.shape) if size > 1)

    def __call__(self, x: Array | float) -> Array:
        with np.errstate(invalid="ignore", over="ignore"):  # what is no number is refused where it is written
            scaled = np.asarray(self.scale * x)
            return scaled + self.shift if self.shift.any() else scaled

    def after(self, first: Affine) -> Affine:
        """The composition self(first(x))."""
        return Affine(self.scale * first.scale, self(first.shift))

    def map(self, move: Callable[[Array], Array]) -> Affine:
        """The same map on rearranged data: both coefficients travel as the data do."""
        return Affine(move(self.scale), move(self.shift))

    @property
    def linear(self) -> Affine:
        """The map without its shift."""
        return Affine(self.scale, np.zeros_like(self.shift))

    def settled(self) -> Affine:
        """Shrink the axes along which nothing varies, then make the free elements the identity."""
        scale, shift = self.scale, self.shift
        for axis in range(self.rank):
            if scale.shape[axis] < 2:
                continue
            ends = [(np.fmin.reduce(c, axis, keepdims=True), np.fmax.reduce(c, axis, keepdims=True)) for c in (scale, shift)]
            if not any((low < high).any() for low, high in ends):  # a comparison with NaN is False: free elements fit anything
                scale, shift = ends[0][0], ends[1][0]
        free = np.isnan(scale)
        return Affine(np.where(free, 1.0, scale), np.where(free, 0.0, shift)) if free.any() else Affine(scale, shift)

    def along(self, axis: int, size: int) -> tuple[Array, Array]:
        """Scale and shift as vectors of length `size`, if `axis` is the only one along which they vary."""
        axis %= self.rank
        if others := [i for i in self.varying if i != axis]:
            raise Blocked(f"the map varies along axis {' and '.join(map(str, others))}, the operator's channels lie along axis {axis}")
        if self.shape[axis] not in (1, size):
            raise Blocked(f"the map has {self.shape[axis]} channels, the operator {size}")
        scale, shift = (np.broadcast_to(c.reshape(-1), size) for c in (self.scale, self.shift))
        return scale, shift

    def require(self, *, increasing: bool = False, unshifted: bool = False, unscaled: bool = False) -> Affine:
        """This map, or `Blocked` where it breaks a condition.

        increasing: scale >= 0 everywhere. unshifted: shift 0. unscaled: scale 1.
        """
        if increasing and (negative := int((self.scale < 0).sum())):
            raise Blocked(f"{negative} of its {self.scale.size} scales {'is' if negative == 1 else 'are'} negative")
        if unshifted and self.shift.any():
            raise Blocked("its shift is not zero")
        if unscaled and not (self.scale == 1).all():
            raise Blocked("its scale is not one")
        return self

    def broadcast_from(self, rank: int, sizes: tuple[int | None, ...] | None) -> Affine:
        """This map for an operand that broadcasts to the operator's output.

        `rank` and `sizes` are the operand's. An operand of size 1 (or without an axis) along which the map varies
        would have to grow, which is refused; an unknown size might be 1, so it is refused too.
        """
        for axis in self.varying:
            own = axis - (self.rank - rank)
            if own < 0 or sizes is None or sizes[own] is None or sizes[own] == 1:
                raise Blocked(f"the map varies along axis {axis}, along which an operand is broadcast")
        return self.map(lambda c: c.reshape(c.shape[self.rank - rank :]) if rank <= self.rank else c)

    def same_as(self, other: Affine) -> bool:
        """Equality of two maps, element by element, broadcasting."""
        return all(bool((one == another).all()) for one, another in ((self.scale, other.scale), (self.shift, other.shift)))
