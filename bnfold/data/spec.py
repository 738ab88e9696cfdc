"""What a model's inputs take: names, types, shapes, and the range of integers where that is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Batch = dict[str, Array]  # by input name


@dataclass(frozen=True)
class Range:
    """The integers from low to high, both included. below: symbols of sizes under which they stay as well, as an index does.

    copies: it is a shape, in which 0 stands for the size that there is, and -1 for what is left.
    """

    low: int = 0
    high: int = 1
    below: frozenset[str] = frozenset()
    copies: bool = False

    def within(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        """The ends, once the sizes are known; of a size that isn't, no more is taken for granted than that it is 2."""
        high = min([self.high, *(sizes.get(name, 2) - 1 for name in self.below)])
        return min(self.low, high), high

    def and_(self, other: Range) -> Range:
        """What both take; this one where nothing is left."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        return replace(self, low=low, high=high, below=self.below | other.below) if low <= high else self


@dataclass(frozen=True)
class InputSpec:
    """A model's input; a dynamic axis is its symbol, or None when it has none. takes: which integers, where that is known."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]
    takes: Range | None = None

    def __str__(self) -> str:
        return f"{self.dtype} {shape_text(self.shape)}"


@dataclass(frozen=True)
class Port:
    """An input or output as the model states it. shape: None where even the rank is left open; None or a name for a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


def is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))  # ml_dtypes' types are of kind V


def shape_text(shape: Iterable[object]) -> str:
    return "(" + ", ".join("?" if d is None else str(d) for d in shape) + ")"
