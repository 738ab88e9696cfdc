"""Weights that are stored as integer codes: a scale is a scale, wherever it is stored.

    array = (codes - zero) * scale        one scale and one zero for each block of codes

A map that multiplies each block by one number goes into the scales, and not one code changes. Where its number is negative, the codes
are negated about their zero; where the negative of one doesn't exist in their type, they are mirrored about the middle of the type, and
the zero with them: lowest + highest - code. Both are exact. Where the number is 0, the codes become their zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .affine import Array, Blocked
from .rounding import lost, rounded

ROUNDED = "it rounds activations to integers, which no map crosses exactly: fold before quantising, or recalibrate"
Blocks = tuple[int, ...]  # the sizes of a block along each axis
Rounding = Callable[[npt.NDArray[Any], npt.NDArray[Any], Array], Array]  # the codes of an array, by its scales and zeros


@dataclass(frozen=True, eq=False)
class FloatSource:
    """A float array that is rounded to the codes whenever the model runs.

    read: the array in its stored type. roundings: how runtimes do it, of which some divide in float32 what others do in float16.
    """

    read: Callable[[], npt.NDArray[Any]]
    roundings: Sequence[Rounding]


@dataclass(frozen=True, eq=False)
class Rescaled:
    """A quantised tensor under a map. codes: None where they are as they were. scale, zero: a number for each block, the scale in its
    stored type. source: what rounds to the codes. axis: along which one scale became several. negated, mirrored, dead: how many channels.
    """

    codes: Array | None
    scale: npt.NDArray[Any]
    zero: Array
    blocks: Blocks
    source: npt.NDArray[Any] | None
    axis: int | None
    negated: int
    mirrored: int
    dead: int

    def said(self, name: str, *, coded: bool = False) -> str:
        """What became of the tensor, in plain words. coded: whether its scales had been codes themselves."""
        parts = [f"{name} takes it in its scales, and none of its integers changes"]
        if self.negated or self.dead:
            changes = [f"in {self.negated} channels they change their sign"] * bool(self.negated)
            changes += [f"of these {self.mirrored} move their zero point, since their type lacks the negative of one"] * bool(self.mirrored)
            changes += [f"in {self.dead} channels they become their zero point"] * bool(self.dead)
            parts = [f"{name} takes it in its scales, and its integers stay but for their sign: " + ", ".join(changes)]
            if not self.negated:
                parts = [f"{name} takes it in its scales: {', '.join(changes)}, and no other integer changes"]
        if self.axis is not None:
            parts.append(f"its one scale becomes one for each channel along axis {self.axis}, which some targets don't take")
        if coded:
            parts.append(f"its scales, which were codes with a scale themselves, become {self.scale.dtype}")
        return "; ".join(parts)


def said_of_scale(name: str, *, grown: bool) -> str:
    """The same of a factor of integers' products. grown: whether it had been one number."""
    text = f"{name} scales integers, none of which changes"
    return f"{text}; its one scale becomes one for each channel, which some targets don't take" if grown else text


@dataclass(frozen=True, eq=False)
class Quantised:
    """How a tensor is stored: see above. All arrays have the stored one's rank.

    read: the codes. scale, zero: a number for each block. code: the codes' type, and its ends; kind: that in which scales are stored.
    one_scale: why one scale can't become several, "" where it can. one_zero: likewise why no zero may move. small: whether it may as well
    be stored in floats, as a bias may, where its codes can't take a map. source: what rounds to the codes, None where these are stored.
    apart: whether its scale multiplies and does nothing else, so that it may be any number, of either sign.
    """

    read: Callable[[], Array]
    shape: tuple[int, ...]
    scale: Array
    zero: Array
    blocks: Blocks
    code: np.dtype[Any]
    lowest: float
    highest: float
    kind: np.dtype[Any]
    one_scale: str = ""
    one_zero: str = ""
    small: bool = False
    source: FloatSource | None = None
    apart: bool = False

    def array(self) -> Array:
        """What the codes stand for."""
        zero, scale = (spread(each, self.blocks, self.shape) for each in (self.zero, self.scale))
        found: Array = (self.read() - zero) * scale
        return found

    def rescaled(self, factors: Array, one_scale: str = "") -> Rescaled:
        """The tensor times factors of its shape. one_scale: why it must stay one, if so. Blocked, in a clause behind the tensor's name."""
        factors = least(factors)
        if not np.isfinite(factors).all():
            raise Blocked("is quantised, and its scale would be no number")
        blocks, axis = self.blocks, None
        negative, dead = (each & (not self.apart) for each in (factors < 0, factors == 0))
        sizes = factors if self.apart else np.where(dead, 1.0, np.abs(factors))
        if (times := _by_block(sizes, blocks)) is None:
            blocks, axis = self._one_for_each(factors, one_scale)
            times = sizes
        codes, zero = self.read(), self.zero
        about = spread(zero, self.blocks, self.shape)
        turned = np.where(dead, about, np.where(negative, 2 * about - codes, codes))
        stuck = (turned < self.lowest) | (turned > self.highest)
        mirrored = 0
        if stuck.any():
            if self.one_zero:
                where = tuple(int(i) for i in np.argwhere(stuck)[0])
                channel = where[next((i for i, n in enumerate(factors.shape) if n > 1), 0)]
                raise Blocked(f"is quantised, and channel {channel} would need the negative of {codes[where]:g}; {self.one_zero}")
            if _by_block(negative, blocks) is None:
                blocks, axis = self._one_for_each(factors, one_scale)
                times = sizes
            middle, moves = self.lowest + self.highest, _any_by_block(stuck, blocks)
            turned = np.where(spread(moves, blocks, self.shape), middle - codes, turned)
            zero = np.where(moves, middle - zero, zero)
            mirrored = int(moves.sum())
        scale = self._stored(self.scale * times)
        changed = bool(negative.any() or dead.any())
        source = None if self.source is None else self._source(self.source, factors, turned, scale, zero, blocks)
        counts = int(negative.sum()), mirrored, int(dead.sum())
        return Rescaled(turned if changed else None, scale, zero, blocks, source, axis, *counts)

    def _one_for_each(self, factors: Array, one_scale: str) -> tuple[Blocks, int]:
        """Blocks of one channel each, where one scale serves all that a map makes different."""
        varying = [i for i, n in enumerate(factors.shape) if n > 1]
        if blocks := [
            f"{b} along axis {i}" for i, (b, n) in enumerate(zip(self.blocks, self.shape, strict=True)) if 1 < b < n and i in varying
        ]:
            raise Blocked(f"is quantised in blocks of {blocks[0]}, and the map varies inside of one")
        if self.scale.size > 1:
            along = " and ".join(str(i) for i, n in enumerate(self.scale.shape) if n > 1)
            other = next((i for i in varying if self.scale.shape[i] == 1), varying[0])
            raise Blocked(f"is quantised with scales along axis {along}, and the map varies along axis {other}")
        if reason := one_scale or self.one_scale:
            raise Blocked(f"is quantised with one scale, and {reason}")
        if len(varying) > 1:
            raise Blocked("is quantised with one scale, and the map varies along several of its axes")
        return tuple(1 if i == varying[0] else n for i, n in enumerate(self.shape)), varying[0]

    def _stored(self, exact: Array) -> npt.NDArray[Any]:
        """The scales in their stored type."""
        scale = rounded(exact, self.kind)
        back = scale.astype(np.float64)
        if not np.isfinite(back).all() or (np.sign(back) != np.sign(exact)).any() or lost(exact, scale):
            with np.errstate(divide="ignore"):
                extreme = exact.ravel()[np.argmax(np.abs(np.log(np.abs(exact), where=exact != 0, out=np.zeros(exact.shape))))]
            raise Blocked(f"is quantised, and a scale of it would be {extreme:.3g}, which {self.kind} can't hold")
        return scale

    def _source(
        self, source: FloatSource, factors: Array, codes: Array, scale: npt.NDArray[Any], zero: Array, blocks: Blocks
    ) -> npt.NDArray[Any]:
        """What rounds to the codes: the array times the factors, but for what lies so near to a step that it falls on its other side."""
        old = source.read()
        made = rounded(old.astype(np.float64) * factors, old.dtype)
        scales, zeros = (spread(each, blocks, self.shape) for each in (scale, zero))
        centre = rounded((codes - zeros) * scales.astype(np.float64), old.dtype)
        ends = (np.asarray(np.inf, old.dtype), np.asarray(-np.inf, old.dtype))
        for other in (centre, *(np.nextafter(centre, end) for end in ends), None):
            wrong = np.logical_or.reduce([run(made, scales, zeros) != codes for run in source.roundings])
            if not wrong.any():
                return made
            if other is not None:
                made = np.where(wrong, other, made)
        raise Blocked(f"is quantised, and no {old.dtype} rounds to its code {codes[tuple(np.argwhere(wrong)[0])]:g} with a new scale")


def steps(zero: Any, bounds: tuple[float, float]) -> dict[str, Array]:
    """How far codes reach on either side of their zero: all that these, and the type that holds them, say of what is rounded."""
    about = np.asarray(zero, np.float64)
    return {"steps below zero": about - bounds[0], "steps above zero": bounds[1] - about}


def spread(grid: npt.NDArray[Any], blocks: Blocks, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A number for each block as one for each element, or as what broadcasts to it."""
    for axis, (block, size) in enumerate(zip(blocks, shape, strict=True)):
        if 1 < block < size and grid.shape[axis] > 1:
            grid = np.repeat(grid, block, axis).take(range(size), axis)
    return grid


def _by_block(values: npt.NDArray[Any], blocks: Blocks) -> npt.NDArray[Any] | None:
    """The one number of each block; None where some have several."""
    grid = values[tuple(slice(None, None, block) for block in blocks)]
    return grid if (spread(grid, blocks, values.shape) == values).all() else None


def _any_by_block(values: npt.NDArray[np.bool_], blocks: Blocks) -> npt.NDArray[np.bool_]:
    for axis, block in enumerate(blocks):
        values = np.logical_or.reduceat(values, range(0, values.shape[axis], block), axis)
    return values


def least(array: Array) -> Array:
    """The array without the axes along which it doesn't vary, which get size 1."""
    for axis in range(array.ndim):
        first = array.take([0], axis)
        if (array == first).all():
            array = first
    return array
