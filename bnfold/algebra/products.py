"""Products of matrices, and sums of them, in nearly twice the precision of float64: what is stored of them is rounded once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .affine import Array

PARTS = 2  # of which each takes some 20 bits


class Total:
    """A sum of arrays in twice the precision of float64 (Knuth, The Art of Computer Programming, vol. 2, 4.2.2, theorem B)."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._high, self._low = np.zeros(shape), np.zeros(shape)

    def add(self, term: Array, place: tuple[slice, ...] = ()) -> None:
        """Add an array to a part of the sum."""
        high = self._high[place]
        total = high + term
        back = total - high
        self._low[place] += (high - (total - back)) + (term - back)
        self._high[place] = total

    def sum(self) -> Array:
        """What it comes to, rounded to float64."""
        return self._high + self._low


def totalled(terms: Iterable[Array], shape: Sequence[int]) -> Array:
    """The sum of arrays of one shape."""
    total = Total(shape)
    for term in terms:
        total.add(term)
    return total.sum()


def exact(a: Array, b: Array) -> Iterator[Array]:
    """Products of matrices whose sum is a @ b: of parts with so few bits that the sums of their products are exact in float64, whatever the
    order in which they are formed (Ozaki et al. 2012, Error-free transformations of matrix multiplication). What is left of each lies so
    far below its largest numbers that the rounding of its products doesn't count.
    """
    bits = (53 - a.shape[-1].bit_length()) // 2
    (rows, rest), (columns, left) = _parts(a, -1, bits), _parts(b, -2, bits)
    yield from (row @ column for row in rows for column in columns)
    yield from (each @ other for each, other in ((rest, b), (a - rest, left)) if each.any() and other.any())


def _parts(array: Array, axis: int, bits: int) -> tuple[list[Array], Array]:
    """Arrays whose numbers are whole multiples, of so many bits, of a power of two along an axis, and what is left of one without them."""
    found: list[Array] = []
    while len(found) < PARTS and array.any():
        exponents = np.frexp(np.abs(array).max(axis, keepdims=True))[1]
        found.append(np.ldexp(np.rint(np.ldexp(array, bits - exponents)), exponents - bits))
        array = array - found[-1]
    return found, array
