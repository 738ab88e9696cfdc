"""Convolution of the float64 oracle: exact for all attributes, fast through BLAS, and within a bounded workspace.

Shapes are [N, C, D1, ...] for 1 to 3 (or more) spatial axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .registry import CACHE, Array, operator
from .windows import Windows, pad, windows

WORKSPACE = 1 << 26  # bytes of unfolded input at a time
WIDE, TILE = 5, 16  # a kernel so wide, by itself on each channel, is faster as a product of matrices, for so many outputs of a row at most


def _shifted(y: Array, bias: Array | None) -> Array:
    return y if bias is None else np.add(y, bias.reshape((-1,) + (1,) * (y.ndim - 2)), out=y)


@operator("Conv", own=True)
def conv(
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> tuple[Array, ...]:
    """Weights [O, C/group, *kernel]. A depthwise one adds up tap by tap, or row by row; any other unfolds the input and multiplies."""
    at = windows(x.shape[2:], w.shape[2:], strides, dilations, pads, auto_pad)
    n, c = x.shape[:2]
    o, per_group = w.shape[:2]
    if c != per_group * group or o % group:
        raise ValueError(f"weights {w.shape} in {group} groups don't go with an input {x.shape}")
    y = np.empty((n, o, *at.out))
    if per_group == 1 and o == group:
        for image in range(n):
            padded = pad(x[image : image + 1], at, 0)[0]
            wide = at.kernel[-1] >= WIDE and at.strides[-1] == 1 and math.prod(at.kernel) * padded[0].nbytes < WORKSPACE
            (_banded if wide and np.isfinite(padded.sum()) else _depthwise)(w[:, 0], padded, at, y[image])
    else:
        weights = w.reshape(group, o // group, -1)
        for image in range(n):
            padded = pad(x[image : image + 1], at, 0)[0]
            _unfolded_product(
                weights, padded.reshape(group, per_group, *padded.shape[1:]), at, y[image].reshape(group, o // group, *at.out)
            )
    return (_shifted(y, b),)


def _depthwise(weights: Array, x: Array, at: Windows, y: Array) -> None:
    """y [C, *out], each channel of the padded x [C, *padded] by its own kernel [C, *kernel]: tap by tap, as many channels as a cache holds.

    Where windows step by one, a tap is a shift of the flat image: one run of numbers, of which those where rows wrap are left out.
    """
    padded, flat = x.shape[1:], set(at.strides) == {1}
    steps = [math.prod(padded[i + 1 :]) for i in range(len(padded))]
    length = 1 + sum((n - 1) * step for n, step in zip(at.out, steps, strict=True))
    rows: tuple[int, ...] = (length,) if flat else tuple(at.out)
    block = max(1, CACHE // (8 * max(1, math.prod(rows))))
    total, product = np.empty((block, *rows)), np.empty((block, *rows))
    for first in range(0, len(x), block):
        part = x[first : first + block]
        under = part.reshape(len(part), -1) if flat else part
        sum_, term = total[: len(part)], product[: len(part)]
        sum_[...] = 0
        for tap, place in at.taps():
            start = sum(slice_.start * step for slice_, step in zip(place, steps, strict=True))
            at_tap: Any = (slice(None), slice(start, start + length)) if flat else (slice(None), *place)
            kernel: Any = (slice(first, first + block), *tap)
            np.multiply(under[at_tap], weights[kernel].reshape(-1, *(1,) * len(rows)), out=term)
            sum_ += term
        strides = (sum_.strides[0], *(8 * step for step in steps)) if flat else sum_.strides
        y[first : first + block] = np.lib.stride_tricks.as_strided(sum_, (len(part), *at.out), strides, writeable=False)


def _banded(weights: Array, x: Array, at: Windows, y: Array) -> None:
    """As `_depthwise`, of finite x: each row of a kernel is a band in a matrix, by which stretches of the image's rows are multiplied."""
    *outer, width = at.out
    tiles, step = -(-width // TILE), at.dilations[-1]
    tile, taps = -(-width // tiles), math.prod(at.kernel[:-1])
    span = tile + (at.kernel[-1] - 1) * step
    missing = (tiles - 1) * tile + span - x.shape[-1]  # where the last stretch ends behind the image
    block = max(1, 2 * CACHE // (8 * math.prod(x.shape[1:-1]) * tiles * taps * tile))
    bands = np.zeros((block, span, taps, tile))
    channel, row, tap, column = bands.strides
    band = np.lib.stride_tricks.as_strided(bands, (block, taps, at.kernel[-1], tile), (channel, tap, row * step, row + column))
    rows = Windows(at.kernel[:-1], at.strides[:-1], at.dilations[:-1], (), (), tuple(outer))
    places: list[Any] = [(slice(None), *place, slice(None), k) for k, (_, place) in enumerate(rows.taps())]
    for first in range(0, len(x), block):
        part, kernels = x[first : first + block], weights[first : first + block].reshape(-1, taps, at.kernel[-1], 1)
        part = np.pad(part, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing > 0 else part
        pieces = np.lib.stride_tricks.sliding_window_view(part, span, -1)[..., : tiles * tile : tile, :]
        band[: len(part)] = kernels
        product = pieces.reshape(len(part), -1, span) @ bands[: len(part)].reshape(len(part), span, -1)
        product = product.reshape(*pieces.shape[:-1], taps, tile)
        total = sum(product[place] for place in places)
        y[first : first + block] = np.reshape(total, (len(part), *outer, -1))[..., :width]


def _unfolded_product(weights: Array, x: Array, at: Windows, y: Array) -> None:
    """y [G, O/G, *out] = weights [G, O/G, K] @ unfolded x [G, C/G, *padded], over as many output rows at a time as the workspace holds."""
    group, per_group = x.shape[:2]
    if math.prod(at.kernel) == 1 and set(at.strides) == {1}:
        np.matmul(weights, x.reshape(group, per_group, -1), out=y.reshape(group, y.shape[1], -1))
        return
    row_bytes = 8 * group * weights.shape[2] * math.prod(at.out[1:])
    rows = max(1, WORKSPACE // max(1, row_bytes))
    for first in range(0, at.out[0], rows):
        count = min(rows, at.out[0] - first)
        columns = np.empty((group, per_group, *at.kernel, count, *at.out[1:]))
        for tap, place in at.taps():
            start = place[0].start + first * at.strides[0]
            band = slice(start, start + (count - 1) * at.strides[0] + 1, at.strides[0])
            under: Any = (slice(None), slice(None), *tap)
            columns[under] = x[(slice(None), slice(None), band, *place[1:])]
        y[:, :, first : first + count] = (weights @ columns.reshape(group, weights.shape[2], -1)).reshape(group, -1, count, *at.out[1:])


@operator("ConvTranspose", own=True)
def conv_transpose(
    x: Array,
    w: Array,
    b: Array | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> tuple[Array, ...]:
    """Weights [C, O/group, *kernel]. Every input element adds its kernel to the output; then the padding is cut off."""
    n, c = x.shape[:2]
    kernel, spatial = w.shape[2:], x.ndim - 2
    strides, dilations = tuple(strides or (1,) * spatial), tuple(dilations or (1,) * spatial)
    extra = tuple(output_padding or (0,) * spatial)
    natural = [(i - 1) * s + (k - 1) * d + 1 for i, s, k, d in zip(x.shape[2:], strides, kernel, dilations, strict=True)]
    begins, out = [], []
    for i, (size, full, s) in enumerate(zip(x.shape[2:], natural, strides, strict=True)):
        if output_shape or auto_pad.startswith("SAME"):
            wanted = output_shape[i - spatial] if output_shape else size * s
            total = max(0, full + extra[i] - wanted)
            begins.append(total // 2 if auto_pad == "SAME_UPPER" else total - total // 2)
            out.append(wanted)
        else:
            begin, end = (pads[i], pads[spatial + i]) if pads and auto_pad != "VALID" else (0, 0)
            begins.append(begin)
            out.append(full + extra[i] - begin - end)
    if min(begins) < 0:
        raise NotImplementedError(f"negative padding {begins}")
    per_group = w.shape[1]
    weights = w.reshape(group, c // group, per_group, *kernel)
    y = np.empty((n, group * per_group, *out))
    at = Windows(tuple(kernel), strides, dilations, (), (), tuple(x.shape[2:]))
    canvas = [max(f, a + o) for f, a, o in zip(natural, begins, out, strict=True)]
    for image in range(n):
        full_image = np.zeros((group, per_group, *canvas))
        flat = x[image].reshape(group, c // group, -1)
        for tap, place in at.taps():
            one_tap: Any = (slice(None), slice(None), slice(None), *tap)
            product = weights[one_tap].transpose(0, 2, 1) @ flat
            full_image[(slice(None), slice(None), *place)] += product.reshape(group, per_group, *x.shape[2:])
        kept = full_image[(slice(None), slice(None), *(slice(a, a + o) for a, o in zip(begins, out, strict=True)))]
        y[image] = kept.reshape(-1, *out)
    return (_shifted(y, b),)


# --- a convolution whose taps are moved by data ------------------------------------------------------------------------------------


@operator("DeformConv", since=19)
def deform_conv(
    x: Array,
    w: Array,
    offset: Array,
    b: Array | None = None,
    mask: Array | None = None,
    *,
    dilations: Any = None,
    group: int = 1,
    kernel_shape: Any = None,
    offset_group: int = 1,
    pads: Any = None,
    strides: Any = None,
) -> tuple[Array, ...]:
    """In two dimensions: each tap is read between four elements, by weights that are linear in its place; beyond the border lie zeros."""
    if x.ndim != 4:
        raise NotImplementedError(f"DeformConv in {x.ndim - 2} dimensions")
    (count, channels, *_), (out, _, *kernel), size = x.shape, w.shape, offset.shape[2:]
    taps = int(np.prod(kernel))
    steps, spread, start = strides or (1, 1), dilations or (1, 1), (pads or (0, 0, 0, 0))[:2]
    moved = offset.reshape(count, offset_group, taps, 2, *size)
    weights = None if mask is None else mask.reshape(count, offset_group, taps, *size)
    places = []
    for axis in (0, 1):
        along = [-1 if i == axis else 1 for i in (0, 1)]
        at = (np.arange(size[axis]) * steps[axis] - start[axis]).reshape(along)
        tap = (np.indices(kernel)[axis] * spread[axis]).reshape(taps, 1, 1)
        places.append(at + tap + moved[:, :, :, axis])
    y = np.empty((count, out, *size))
    for n in range(count):
        parts = x[n].reshape(offset_group, channels // offset_group, *x.shape[2:])
        read = np.concatenate([_between(part, places[0][n, i], places[1][n, i]) for i, part in enumerate(parts)])
        if weights is not None:
            read *= np.repeat(weights[n], channels // offset_group, axis=0)
        y[n] = np.einsum("gcthw,goct->gohw", read.reshape(group, -1, taps, *size), w.reshape(group, out // group, -1, taps)).reshape(
            y[n].shape
        )
    return (y if b is None else y + b.reshape(-1, 1, 1),)


def _between(x: Array, rows: Array, columns: Array) -> Array:
    """[channels, ...] of an image [channels, height, width] at places between its elements."""
    found = np.zeros((len(x), *rows.shape))
    for step in itertools.product((0, 1), (0, 1)):
        share, inside, index = np.ones(rows.shape), np.ones(rows.shape, bool), []
        for place, up, size in zip((rows, columns), step, x.shape[1:], strict=True):
            near = np.floor(place) + up
            share = share * (1 - np.abs(place - near))
            inside &= (near >= 0) & (near < size)
            index.append(np.clip(near, 0, size - 1).astype(np.int64))
        found += np.where(inside, share, 0.0) * x[:, index[0], index[1]]
    return found
