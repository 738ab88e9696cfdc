"""Pooling of the float64 oracle; sizes as in `windows`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .registry import Array, operator
from .windows import Windows, pad, windows


@operator("AveragePool")
def average_pool(
    x: Array,
    *,
    kernel_shape: Sequence[int],
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    auto_pad: str = "NOTSET",
    pads: Sequence[int] | None = None,
    **steps: Any,
) -> tuple[Array, ...]:
    """The divisor counts the elements of the window that lie on the input, or with `count_include_pad` on the input and its stated padding;
    what `ceil_mode` adds at the end never counts."""
    at, stated = (windows(x.shape[2:], kernel_shape, auto_pad=auto_pad, pads=pads, ceil_mode=mode, **steps) for mode in (ceil_mode, 0))
    total = _summed(x, at)
    count: Array = np.ones(())
    for i, size in enumerate(x.shape[2:]):
        first, last = (-at.before[i], size + _stated_end(stated, i, pads, auto_pad)) if count_include_pad else (0, size)
        places = np.arange(at.out[i])[:, None] * at.strides[i] - at.before[i] + np.arange(at.kernel[i]) * at.dilations[i]
        count = np.multiply.outer(count, ((places >= first) & (places < last)).sum(1))
    return (total / count,)


def _stated_end(at: Windows, axis: int, pads: Sequence[int] | None, auto_pad: str) -> int:
    """The padding at the end that the node asks for, be it in numbers or as SAME."""
    if auto_pad.startswith("SAME"):
        return at.after[axis]
    return pads[len(at.out) + axis] if pads and auto_pad != "VALID" else 0


def _summed(x: Array, at: Windows) -> Array:
    padded = pad(x, at, 0)
    total = np.zeros((*x.shape[:2], *at.out))
    for _, place in at.taps():
        total += padded[(slice(None), slice(None), *place)]
    return total


@operator("LpPool", since=2)
def lp_pool(x: Array, *, kernel_shape: Sequence[int], p: int = 2, **stated: Any) -> tuple[Array, ...]:
    at = windows(x.shape[2:], kernel_shape, **stated)
    return (_summed(np.abs(x) ** p, at) ** (1.0 / p),)


@operator("MaxPool", counts_outputs=True)
def max_pool(x: Array, *, kernel_shape: Sequence[int], storage_order: int = 0, outputs: int = 1, **stated: Any) -> tuple[Array, ...]:
    """Second output: where each maximum (its first, in order of the taps) lies in the flattened input, of the unpadded size."""
    at = windows(x.shape[2:], kernel_shape, **stated)
    padded = pad(x, at, -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min)
    y: Array | None = None
    where = np.zeros((*x.shape[:2], *at.out), np.int64)
    if outputs > 1:
        numbers = np.arange(math.prod(x.shape[2:])).reshape(x.shape[2:], order="F" if storage_order else "C")
        numbers = pad(numbers[None, None], at, 0)[0, 0]
        images = np.arange(math.prod(x.shape[:2])).reshape(*x.shape[:2], *(1,) * len(at.out)) * math.prod(x.shape[2:])
    for _, place in at.taps():
        seen = padded[(slice(None), slice(None), *place)]
        if outputs > 1:
            better = np.ones(seen.shape, bool) if y is None else seen > y
            where = np.where(better, images + numbers[place], where)
        y = seen.copy() if y is None else np.maximum(y, seen, out=y)
    assert y is not None
    return (y, where)[:outputs]


@operator("GlobalMaxPool")
def global_max_pool(x: Array) -> tuple[Array, ...]:
    return (x.max(tuple(range(2, x.ndim)), keepdims=True),)


@operator("GlobalAveragePool")
def global_average_pool(x: Array) -> tuple[Array, ...]:
    return (x.mean(tuple(range(2, x.ndim)), keepdims=True),)


@operator("GlobalLpPool")
def global_lp_pool(x: Array, *, p: int = 2) -> tuple[Array, ...]:
    return ((np.abs(x) ** p).sum(tuple(range(2, x.ndim)), keepdims=True) ** (1.0 / p),)
