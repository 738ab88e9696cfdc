"""Operators of the float64 oracle that lay elements or bits elsewhere, or hand them on: Pad, Scatter, BitCast, optional values, maps."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.helper import tensor_dtype_to_np_dtype

from bnfold.algebra.rounding import rounded

from .registry import Array, operator


@operator("Pad", since=2, until=10)
def pad_2(x: Array, *, pads: Any, mode: str = "constant", value: float = 0.0) -> tuple[Array, ...]:
    """Opsets 2 to 10: the settings are attributes."""
    return pad_11(x, np.asarray(pads), np.asarray(value), mode=mode)


@operator("Pad", since=11)
def pad_11(x: Array, pads: Array, value: Array | None = None, axes: Array | None = None, *, mode: str = "constant") -> tuple[Array, ...]:
    """A negative number of pads crops; the crop comes first, as ONNX Runtime does it."""
    widths = [(0, 0)] * x.ndim
    half = len(pads) // 2
    for axis, low, high in zip(range(x.ndim) if axes is None else axes, pads[:half], pads[half:], strict=True):
        widths[int(axis)] = (int(low), int(high))
    x = x[tuple(slice(max(-low, 0), min(high, 0) or None) for low, high in widths)]
    grown = [(max(low, 0), max(high, 0)) for low, high in widths]
    if mode == "constant":
        return (np.pad(x, grown, constant_values=0 if value is None else np.asarray(value).item()),)
    return (np.pad(x, grown, mode=mode),)  # type: ignore[call-overload]


@operator("Scatter", since=9)
def scatter(data: Array, indices: Array, updates: Array, *, axis: int = 0) -> tuple[Array, ...]:
    y = data.copy()
    np.put_along_axis(y, indices % data.shape[axis], updates, axis)
    return (y,)


@operator("Optional", since=15)
def optional(value: Any = None, **_: Any) -> tuple[Any, ...]:
    """The value itself, None where there is none. (The evaluator wraps it, and doesn't unwrap it again.)"""
    return (value,)


@operator("OptionalGetElement", since=15)
def optional_element(value: Any) -> tuple[Any, ...]:
    return (value,)


@operator("OptionalHasElement", since=15)
def has_element(value: Any = None) -> tuple[Array, ...]:
    return (np.asarray(value is not None),)


@operator("ZipMap", domain="ai.onnx.ml")
def zip_map(x: Array, *, classlabels_int64s: Any = (), classlabels_strings: Any = ()) -> tuple[Any, ...]:
    """A map for each row, from class to score."""
    classes = list(classlabels_int64s) or list(classlabels_strings)
    return ([dict(zip(classes, row, strict=True)) for row in np.atleast_2d(x)],)


@operator("BitCast", since=26)
def bit_cast(x: Array, *, to: int, stored: int) -> tuple[Array, ...]:
    """stored: the type of the input in the file (see `widen.state_bits`)."""
    kind = tensor_dtype_to_np_dtype(stored)
    return ((rounded(x, kind) if x.dtype == np.float64 else x.astype(kind)).view(tensor_dtype_to_np_dtype(to)),)


@operator("Unsqueeze", since=1, until=12)
def unsqueeze_1(x: Array, *, axes: Any) -> tuple[Array, ...]:
    """The axes are those of the output, all of them at once. (The evaluator adds one after the other.)"""
    return (np.expand_dims(x, tuple(axes)),)


@operator("Unsqueeze", since=13)
def unsqueeze_13(x: Array, axes: Array) -> tuple[Array, ...]:
    return (np.expand_dims(x, tuple(int(axis) for axis in axes.ravel())),)


@operator("Squeeze", since=1, until=12)
def squeeze_1(x: Array, *, axes: Any = None) -> tuple[Array, ...]:
    """The axes are those of the input, all of them at once."""
    return (np.squeeze(x, None if axes is None else tuple(axes)),)


@operator("Squeeze", since=13)
def squeeze_13(x: Array, axes: Array | None = None) -> tuple[Array, ...]:
    return (np.squeeze(x, None if axes is None else tuple(int(axis) for axis in axes.ravel())),)
