"""One rounding from float64 to the type in which a coefficient is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .affine import Array

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def limits(dtype: Any) -> Any:
    """`numpy.finfo` of a floating-point type, of ml_dtypes' too."""
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]  # it comes without types


def rounded(array: Array, dtype: np.dtype[Any], *, flush: bool = False) -> npt.NDArray[Any]:
    """The array rounded once, to nearest even. flush: what is below the type's smallest normal number becomes 0 of its sign."""
    exact: npt.NDArray[Any] = np.ascontiguousarray(array).reshape(np.shape(array))
    if dtype == BFLOAT16:  # ml_dtypes goes there through float32, which would round twice
        exact = _to_odd(exact)
    with np.errstate(over="ignore"):
        made = np.asarray(exact.astype(dtype))
    return np.where(np.abs(made) < limits(dtype).tiny, np.copysign(dtype.type(0), made), made) if flush else made


def narrowed(statistics: tuple[Array, Array], dtypes: Sequence[np.dtype[Any]]) -> list[npt.NDArray[Any]] | str:
    """A mean and a variance, [channels], in the types in which they are stored; or, where a type can't hold one, why not."""
    found = []
    for exact, dtype, role in zip(statistics, dtypes, ("mean", "variance"), strict=True):
        array = rounded(exact, dtype)
        over = np.flatnonzero(~np.isfinite(array.astype(np.float64)))
        if over.size:
            return f"its new {role} of channel {over[0]} is {exact[over[0]]:.3g}, more than {array.dtype} can hold"
        found.append(array)
    return found


def _to_odd(exact: Array) -> npt.NDArray[np.float32]:
    """Float64 to float32 rounded to odd, after which a rounding to fewer bits is right (Boldo & Melquiond 2008, theorem 2)."""
    with np.errstate(over="ignore"):
        near = exact.astype(np.float32)
    inexact = (near.astype(np.float64) != exact) & np.isfinite(near)
    toward_zero = np.where(np.abs(near.astype(np.float64)) > np.abs(exact), np.nextafter(near, np.float32(0)), near)
    odd = (np.ascontiguousarray(toward_zero).view(np.uint32) | np.uint32(1)).view(np.float32)
    return np.where(inexact, odd, near)


def lost(exact: Array, stored: npt.NDArray[Any]) -> int:
    """How many coefficients fell below the normal range of their type, where it keeps fewer bits of them, or none."""
    tiny = limits(stored.dtype).tiny
    small = np.flatnonzero((stored < tiny) & (stored > -tiny))
    if not small.size:
        return 0
    exact, stored = np.ravel(exact)[small], np.ravel(stored)[small]
    return int((np.abs(stored.astype(np.float64) - exact) > 2.0**-7 * np.abs(exact)).sum())


def too_small(count: int, of: int, name: str, dtype: np.dtype[Any], *, flush: bool) -> str:
    """What is said of these."""
    return f"{count} of the {of} coefficients of {name} are too small for {dtype}{' and became 0' if flush else ''}"


def told(exact: Array, dtype: np.dtype[Any]) -> str:
    """How many coefficients are beyond a type, or too small for it, in a clause; "" where none is."""
    array = rounded(exact, dtype)
    over = int((~np.isfinite(array.astype(np.float64)) & np.isfinite(exact)).sum())
    tiny = lost(exact, array)
    parts = [f"{over} beyond the largest number of {dtype}"] * (over > 0) + [f"{tiny} too small for it to keep their digits"] * (tiny > 0)
    return f"{' and '.join(parts)}, of {exact.size}" if parts else ""


def roundoff(dtype: np.dtype[Any]) -> float:
    """Unit roundoff of a floating-point type: half the distance from 1 to the next number."""
    return float(limits(dtype).eps) / 2
