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
from .windows import Windows, pad, phases, windows

WORKSPACE = 1 << 26  # bytes of unfolded input at a time
PLENTY = 256  # outputs of an image, for which a product of matrices costs no less where it takes several images at a time
# A kernel so wide, by itself on each channel, is faster as a product of matrices, for so many outputs of a row at most; any on short rows.
WIDE, TILE, NARROW = 5, 16, 32


def _shifted(y: Array, bias: Array | None) -> Array:
    return y if bias is None else np.add(y, bias.reshape((-1,) + (1,) * (y.ndim - 2)), out=y)


@operator("Conv", own=True)
def conv(
    x: Array, w: Array, b: Array | None = None, *, group: int = 1, kernel_shape: Sequence[int] | None = None, **stated: Any
) -> tuple[Array, ...]:
    """Weights [O, C/group, *kernel]. A depthwise one adds up tap by tap, or row by row; any other unfolds the input and multiplies, or
    multiplies and adds up tap by tap."""
    at = windows(x.shape[2:], w.shape[2:], **stated)
    n, c = x.shape[:2]
    o, per_group = w.shape[:2]
    if c != per_group * group or o % group:
        raise ValueError(f"weights {w.shape} in {group} groups don't go with an input {x.shape}")
    y = np.empty((n, o, *at.out))
    images = max(1, WORKSPACE // max(1, 8 * c * math.prod(at.kernel) * math.prod(at.out)))  # at a time
    if per_group == 1 and o == group:
        for first in range(0, n, images):
            part, made = x[first : first + images], y[first : first + images]
            _depthwise(np.concatenate([w[:, 0]] * len(part)), part.reshape(-1, *x.shape[2:]), at, made.reshape(-1, *at.out))
        return (_shifted(y, b),)
    made = y.reshape(n, group, o // group, *at.out)

    def padded(part: Array) -> Array:
        whole = pad(part, at, 0)
        return whole.reshape(-1, group, per_group, *whole.shape[2:])

    if set(at.strides) == {1} and 2 * o <= c and max(at.kernel) > 1:
        by_tap = np.ascontiguousarray(np.moveaxis(w.reshape(group, o // group, per_group, -1), -1, 0))
        for image in range(n):
            _shifted_products(by_tap, padded(x[image : image + 1])[0], at, made[image])
    else:
        weights = w.reshape(group, o // group, -1)
        for first in range(0, n, images):
            _unfolded_product(weights, padded(x[first : first + images]), at, made[first : first + images])
    return (_shifted(y, b),)


def _depthwise(weights: Array, x: Array, at: Windows, y: Array) -> None:
    """y [C, *out], each channel of x [C, *in] by its own kernel [C, *kernel], as many channels at a time, with their padding, as a cache
    holds."""
    sides = list(zip(at.before, at.after, x.shape[1:], strict=True))
    size = [-(-(before + n + after) // step) * step for (before, after, n), step in zip(sides, at.strides, strict=True)]
    width, tiles = at.out[-1], -(-at.out[-1] // TILE)
    wide = at.strides[-1] == 1 and at.kernel[-1] >= (WIDE if width > NARROW else 2)
    wide &= math.prod(at.kernel) * 8 * math.prod(size) < WORKSPACE
    if wide:  # the last stretch of a row may end behind it
        size[-1] = max(size[-1], tiles * -(-width // tiles) + (at.kernel[-1] - 1) * at.dilations[-1])
    cost = 8 * math.prod(size)
    block = max(1, 2 * CACHE // (cost * math.prod(at.kernel[:-1])) if wide else CACHE // cost)
    canvas = np.zeros((min(block, len(x)), *size))
    seen: Any = (slice(None), *(slice(max(0, -before), n - max(0, -after)) for before, after, n in sides))
    inside: Any = (slice(None), *(slice(max(0, before), max(0, before) + n + min(0, before) + min(0, after)) for before, after, n in sides))
    for first in range(0, len(x), block):
        under: Any = slice(first, first + block)
        part = x[under][seen]
        laid = canvas[: len(part)]
        laid[inside] = part
        (_banded if wide and np.isfinite(laid.sum()) else _tapped)(weights[under], laid, at, y[under])


def _tapped(weights: Array, x: Array, at: Windows, y: Array) -> None:
    """y [C, *out] of the padded x, tap by tap, of which each sees one stretch of the flat image."""
    flat, grid = phases(x, at.strides)
    length, taps = at.shifts(grid)
    total, term = np.empty((len(x), length)), np.empty((len(x), length))
    for k, (tap, start) in enumerate(taps):
        kernel: Any = (slice(None), *tap, None)
        np.multiply(flat[:, start : start + length], weights[kernel], out=term if k else total)
        if k:
            total += term
    y[...] = at.placed(total, grid)


def _banded(weights: Array, x: Array, at: Windows, y: Array) -> None:
    """As `_tapped`, of finite x: each row of a kernel is a band in a matrix, by which stretches of the image's rows are multiplied."""
    *outer, width = at.out
    tiles, step, rows = -(-width // TILE), at.dilations[-1], at.kernel[:-1]
    tile = -(-width // tiles)
    span = tile + (at.kernel[-1] - 1) * step
    bands = np.zeros((len(x), *rows, span, tile))
    *others, row, column = bands.strides
    band = np.lib.stride_tricks.as_strided(bands, (len(x), *rows, at.kernel[-1], tile), (*others, row * step, row + column))
    band[...] = weights[..., None]
    channel, *steps, element = x.strides
    apart = [n * by for n, by in zip(steps, at.strides, strict=False)]
    within = [n * by for n, by in zip(steps, at.dilations, strict=False)]
    strides = (channel, *apart, tile * element, *within, element)
    pieces = np.lib.stride_tricks.as_strided(x, (len(x), *outer, tiles, *rows, span), strides, writeable=False)
    product = pieces.reshape(len(x), math.prod(outer) * tiles, -1) @ bands.reshape(len(x), -1, tile)
    y[...] = product.reshape(len(x), *outer, -1)[..., :width]


def _shifted_products(weights: Array, x: Array, at: Windows, y: Array) -> None:
    """y [G, O/G, *out] of the padded x [G, C/G, *padded], tap by tap: its weights [taps, G, O/G, C/G] times a stretch of the flat image,
    which nobody copies.

    What is added up are outputs: this is for convolutions that have fewer of them than inputs.
    """
    group, out, grid = *weights.shape[1:3], x.shape[2:]
    flat = x.reshape(*x.shape[:2], -1)
    length, taps = at.shifts(grid)
    total, block = np.empty((group, out, length)), max(64, 2 * CACHE // (8 * group * out))
    for first in range(0, length, block):
        sum_ = total[..., first : first + block]
        term = np.empty(sum_.shape)
        for k, (_, start) in enumerate(taps):
            seen = flat[..., first + start : first + start + sum_.shape[-1]]
            np.matmul(weights[k], seen, out=term if k else sum_)
            if k:
                sum_ += term
    y[...] = at.placed(total, grid)


def _unfolded_product(weights: Array, x: Array, at: Windows, y: Array) -> None:
    """y [N, G, O/G, *out] = weights [G, O/G, K] @ unfolded x [N, G, C/G, *padded], over as many output rows at a time as the workspace
    holds."""
    images, group, per_group = x.shape[:3]
    if math.prod(at.kernel) == 1 and set(at.strides) == {1} and (images == 1 or math.prod(at.out) >= PLENTY):
        np.matmul(weights, x.reshape(images, group, per_group, -1), out=y.reshape(images, group, y.shape[2], -1))
        return
    row_bytes = 8 * images * group * weights.shape[2] * math.prod(at.out[1:])
    rows = max(1, WORKSPACE // max(1, row_bytes))
    x, y = np.moveaxis(x, 0, 2), np.moveaxis(y, 0, 2)
    for first in range(0, at.out[0], rows):
        count = min(rows, at.out[0] - first)
        columns = np.empty((group, per_group, *at.kernel, images, count, *at.out[1:]))
        for tap, place in at.taps():
            start = place[0].start + first * at.strides[0]
            band = slice(start, start + (count - 1) * at.strides[0] + 1, at.strides[0])
            under: Any = (slice(None), slice(None), *tap)
            columns[under] = x[(slice(None), slice(None), slice(None), band, *place[1:])]
        product = weights @ columns.reshape(group, weights.shape[2], -1)
        y[:, :, :, first : first + count] = product.reshape(group, -1, images, count, *at.out[1:])


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
