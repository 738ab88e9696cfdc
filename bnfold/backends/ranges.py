"""Which integers an input takes, by what a network does with them: an index stays within its table, a length within its axis."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from bnfold.data.spec import Range

LARGEST = 1 << 31
LONGEST = 8  # of what is a size or a count
MOST = 10_000  # steps
V = TypeVar("V", bound=Hashable)


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


class RangeWalk(ABC, Generic[V]):
    """Where the integers of one input go; what they must keep to there, and, where that is nothing, what it is worth trying."""

    def __init__(self) -> None:
        self.must: Range | None = None
        self.may: tuple[int, int] | None = None

    @abstractmethod
    def steps(self, value: V, as_: AffineRange) -> Iterable[tuple[V, AffineRange]]:
        """The values behind the operators that read one, and what the numbers become there; what is asked of them is noted."""

    def follow(self, value: V) -> Range | None:
        """The range of an input; None where nothing is known."""
        stack = [(value, AffineRange())]
        seen: set[tuple[V, AffineRange]] = set()
        while stack and len(seen) < MOST:
            place = stack.pop()
            if place not in seen:
                seen.add(place)
                stack += self.steps(*place)
        return self.must if self.must is not None else None if self.may is None else Range(*self.may)

    @staticmethod
    def arithmetic(kind: str, as_: AffineRange, constant: Any, *, first: bool) -> list[AffineRange]:
        """Behind "add", "sub" or "mul" by a constant (None: one that isn't known). first: whether the numbers stand before it."""
        if constant is None:
            return []
        if kind == "mul":
            return [found] if (found := as_.times(constant)) is not None else []
        if kind == "add":
            return [as_.plus(constant)]
        return [as_.plus(-np.asarray(constant)) if first else AffineRange(-as_.factor, -as_.high, -as_.low).plus(constant)]

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

    def length(self, as_: AffineRange, size: int | str | None) -> None:
        """It is a length within an axis of that size."""
        if isinstance(size, int):
            self.between(as_, 1, size)
        else:
            self.index(as_, size, negative=False, low=1)

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
