"""Resize and Upsample of the float64 oracle, all versions (docs/Operators.md of the onnx repository, Resize).

Resizing is separable: along each axis the output is a matrix, [output size, input size], times the input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .registry import Array, operator


def _output_size(size: int, scale: float) -> int:
    """In float32, as ONNX Runtime does it: 10 elements scaled by float32(0.7) are 7, while in float64 they would be 6.99."""
    return int(np.float32(size) * np.float32(scale))


def _coordinates(size: int, out: int, scale: float, mode: str, roi: tuple[float, float], real: Any) -> Array:
    """Where each output element lies on the input axis, in the precision `real`."""
    i, scale = np.arange(out, dtype=real), real(scale)
    half = real(0.5)
    if mode == "half_pixel":
        return np.asarray((i + half) / scale - half)
    if mode == "half_pixel_symmetric":
        whole = scale * real(size)
        return np.asarray(real(size) / 2 * (1 - real(out) / whole) + (i + half) / scale - half)
    if mode == "pytorch_half_pixel":
        return np.asarray((i + half) / scale - half if out > 1 else np.zeros(1, real))
    if mode == "align_corners":
        return np.asarray(i * real(size - 1) / real(out - 1) if out > 1 else np.zeros(1, real))
    if mode == "asymmetric":
        return np.asarray(i / scale)
    if mode == "tf_half_pixel_for_nn":  # opset 11 and 12
        return np.asarray((i + half) / scale)
    if mode == "tf_crop_and_resize":
        start, end = map(real, roi)
        if out == 1:
            return np.full(1, real(0.5) * (start + end) * real(size - 1))
        return np.asarray(start * real(size - 1) + i * (end - start) * real(size - 1) / real(out - 1))
    raise NotImplementedError(f"coordinate_transformation_mode {mode}")


def _nearest(x: Array, mode: str) -> Array:
    if mode == "floor":
        return np.asarray(np.floor(x))
    if mode == "ceil":
        return np.asarray(np.ceil(x))
    return np.asarray(np.ceil(x - 0.5) if mode == "round_prefer_floor" else np.floor(x + 0.5))


def _cubic(t: Array, a: float) -> Array:
    """Keys' kernel (IEEE Trans. ASSP 29, 1981, eq. 4) with the free parameter `a`."""
    t = np.abs(t)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def _matrix(
    size: int,
    out: int,
    scale: float,
    roi: tuple[float, float],
    *,
    coordinates: str,
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    antialias: int = 0,
) -> tuple[Array, Array]:
    """The weights [out, size], and which outputs lie outside the input (for tf_crop_and_resize)."""
    if mode == "nearest":
        # A decision, so it is taken in float32 like ONNX Runtime's; at a tie float64 could fall on the other side.
        x = _coordinates(size, out, scale, coordinates, roi, np.float32)
        matrix = np.zeros((out, size))
        matrix[np.arange(out), np.clip(_nearest(x, nearest_mode), 0, size - 1).astype(int)] = 1
        return matrix, (x < 0) | (x > size - 1)
    x = _coordinates(size, out, scale, coordinates, roi, np.float64)
    stretch = min(1.0, scale) if antialias else 1.0
    reach = math.ceil((2 if mode == "cubic" else 1) / stretch)
    left = np.floor(x).astype(int)
    places = left[:, None] + np.arange(1 - reach, reach + 1)
    distance = (x[:, None] - places) * stretch
    weights = _cubic(distance, cubic_coeff_a) if mode == "cubic" else np.maximum(0, 1 - np.abs(distance))
    if exclude_outside or antialias:
        if exclude_outside:
            weights = np.where((places >= 0) & (places < size), weights, 0.0)
        weights = weights / weights.sum(1, keepdims=True)
    matrix = np.zeros((out, size))
    np.add.at(matrix, (np.arange(out)[:, None], np.clip(places, 0, size - 1)), weights)  # outside the edge repeats
    return matrix, (x < 0) | (x > size - 1)


def _resize(
    x: Array,
    out: Sequence[int],
    scales: Sequence[float],
    roi: Array | None,
    *,
    coordinates: str,
    extrapolation_value: float = 0.0,
    **how: Any,
) -> Array:
    y = x.astype(np.float64) if x.dtype.kind != "f" else x
    outside: list[tuple[int, Array]] = []
    for axis, (size, target, scale) in enumerate(zip(x.shape, out, scales, strict=True)):
        region = (0.0, 1.0) if roi is None else (float(roi[axis]), float(roi[x.ndim + axis]))
        if size == target and scale == 1 and region == (0.0, 1.0):
            continue
        matrix, beyond = _matrix(size, target, scale, region, coordinates=coordinates, **how)
        y = np.moveaxis(np.tensordot(matrix, y, (1, axis)), 0, axis)
        outside.append((axis, beyond))
    if coordinates == "tf_crop_and_resize":
        for axis, beyond in outside:
            y = np.where(beyond.reshape([-1 if i == axis else 1 for i in range(x.ndim)]), extrapolation_value, y)
    if x.dtype.kind in "iu":
        limits = np.iinfo(x.dtype)
        y = np.clip(np.trunc(y), limits.min, limits.max)
    return y.astype(x.dtype)


@operator("Resize", since=11)
def resize(
    x: Array,
    roi: Array | None = None,
    scales: Array | None = None,
    sizes: Array | None = None,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    axes: Sequence[int] | None = None,
    keep_aspect_ratio_policy: str = "stretch",
    **how: Any,
) -> tuple[Array, ...]:
    listed = [a % x.ndim for a in axes] if axes is not None else list(range(x.ndim))
    out, factors = list(x.shape), [1.0] * x.ndim
    if sizes is not None and sizes.size:
        ratios = [float(n) / x.shape[a] for a, n in zip(listed, sizes, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            ratio = (min if keep_aspect_ratio_policy == "not_larger" else max)(ratios)
            ratios = [ratio] * len(listed)
            sizes = np.array([math.floor(ratio * x.shape[a] + 0.5) for a in listed])
        for a, n, ratio in zip(listed, sizes, ratios, strict=True):
            out[a], factors[a] = int(n), ratio
    elif scales is not None and scales.size:
        for a, scale in zip(listed, scales, strict=True):
            out[a], factors[a] = _output_size(x.shape[a], float(scale)), float(scale)
    else:
        raise ValueError("Resize has neither scales nor sizes")
    region: Array | None = None
    if coordinate_transformation_mode == "tf_crop_and_resize" and roi is not None and roi.size:
        region = np.array([0.0] * x.ndim + [1.0] * x.ndim)
        for i, a in enumerate(listed):
            region[a], region[x.ndim + a] = roi[i], roi[len(listed) + i]
    return (_resize(x, out, factors, region, coordinates=coordinate_transformation_mode, **how),)


@operator("Upsample", since=7)
@operator("Resize", since=10, until=10)
def upsample_7(
    x: Array, scales_given: Array | None = None, *, mode: str = "nearest", scales: Sequence[float] | None = None
) -> tuple[Array, ...]:
    """Upsample (scales are an attribute in opset 7, an input from 9 on) and Resize of opset 10: plain x / scale, and floor."""
    given = scales if scales_given is None else scales_given
    if given is None:
        raise ValueError("Upsample has no scales")
    factors = [float(s) for s in given]
    out = [_output_size(n, s) for n, s in zip(x.shape, factors, strict=True)]
    mode = "linear" if mode in ("linear", "bilinear") else "nearest"
    return (_resize(x, out, factors, None, coordinates="asymmetric", mode=mode, nearest_mode="floor"),)


@operator("Upsample", until=6)
def upsample_1(x: Array, *, height_scale: float, width_scale: float, mode: str = "nearest") -> tuple[Array, ...]:
    return upsample_7(x, mode=mode, scales=(1.0, 1.0, float(height_scale), float(width_scale)))
