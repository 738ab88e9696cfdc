"""Which integers an input takes, by what a network does with them: an index stays within its table, a length within its axis."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bnfold.data.spec import Range

LARGEST = 1 << 31


@dataclass(frozen=True)
class AffineRange:
    """A value that an input's integers have become: factor*x + offset, where the offset may lie anywhere between two."""

    factor: float = 1.0
    low: float = 0.0
    high: float = 0.0

    def plus(self, constant: Any) -> AffineRange:
        c = np.asarray(constant, np.float64)
        return replace(self, low=self.low + float(c.min()), high=self.high + float(c.max())) if c.size else self

    def times(self, constant: Any) -> AffineRange | None:
        c = np.unique(np.asarray(constant, np.float64))
        if c.size != 1 or c[0] == 0:
            return None
        low, high = sorted((self.low * float(c[0]), self.high * float(c[0])))
        return AffineRange(self.factor * float(c[0]), low, high)

    def ends(self, low: float, high: float) -> tuple[int, int] | None:
        """Between which integers x lies, if all that it becomes lies between low and high; None where there are none."""
        one, other = sorted(((low - self.low) / self.factor, (high - self.high) / self.factor))
        found = math.ceil(one), math.floor(other)
        return found if found[0] <= found[1] else None


class Found:
    """What is found of one input: what it must keep to, and, where that is nothing, what it is worth trying."""

    def __init__(self) -> None:
        self.must: Range | None = None
        self.may: tuple[int, int] | None = None

    def index(self, as_: AffineRange, size: int | str | None, *, negative: bool, low: int = 0) -> None:
        """It picks one of so many, counted from the front, or from the back as well."""
        if isinstance(size, str):
            if as_ == AffineRange():
                self._keep(Range(low, LARGEST, frozenset((size,))))
        elif size is not None and size > 0 and (ends := as_.ends(-size if negative else low, size - 1)) is not None:
            self._keep(Range(*ends))

    def between(self, as_: AffineRange, low: int, high: int) -> None:
        if (ends := as_.ends(low, high)) is not None:
            self._keep(Range(*ends))

    def shape(self) -> None:
        self._keep(Range(0, 0, copies=True))

    def compared(self, as_: AffineRange, constants: Any) -> None:
        """It is held against numbers, of which it should lie on both sides."""
        c = np.asarray(constants, np.float64)
        c = c[np.isfinite(c) & (np.abs(c) < LARGEST)]
        if c.size and (ends := as_.ends(float(c.min()), float(c.max()))) is not None:
            low, high = self.may or (0, 1)
            self.may = min(low, ends[0]), max(high, ends[1] + 1)

    def _keep(self, found: Range) -> None:
        self.must = found if self.must is None else self.must.and_(found)

    @property
    def range(self) -> Range | None:
        """None where nothing is known."""
        return self.must if self.must is not None else None if self.may is None else Range(*self.may)
