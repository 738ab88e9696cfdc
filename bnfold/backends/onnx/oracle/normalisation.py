"""Normalisations of the float64 oracle, in the versions of all opsets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .registry import CACHE, Array, operator, place


def per_channel(x: Array, *params: Array) -> list[Array]:
    """Parameters of shape [C] laid along axis 1; whole activations ([C, D1, ...], `spatial = 0`) as they are."""
    return [p.reshape(p.shape + (1,) * (x.ndim - 2)) if p.ndim <= 1 and x.ndim >= 2 else p for p in params]


def _normalised(x: Array, scale: Array, bias: Array, mean: Array, var: Array, *, epsilon: float, out: Array | None = None) -> Array:
    scale, bias, mean, var = per_channel(x, scale, bias, mean, var)
    scale = scale / np.sqrt(var + epsilon)
    params = (mean, scale, bias)
    if x.dtype != np.float64 or x.ndim < 3 or {p.shape for p in params} != {(x.shape[1], *(1,) * (x.ndim - 2))}:
        return np.asarray((x - mean) * scale + bias)
    y = place(out, x)
    y = np.empty(x.shape) if y is None else y
    block = max(1, CACHE // (8 * max(1, math.prod(x.shape[2:]))))
    for image in range(len(x)):  # and as many channels as a cache holds
        for first in range(0, x.shape[1], block):
            mean, scale, bias = (p[first : first + block] for p in params)
            part = np.subtract(x[image, first : first + block], mean, out=y[image, first : first + block])
            part *= scale
            part += bias
    return y


def _trained(
    x: Array, scale: Array, bias: Array, mean: Array, var: Array, *, epsilon: float, momentum: float
) -> tuple[Array, Array, Array, Array, Array]:
    """y by the batch's own statistics, the running ones moved towards them, and the batch's."""
    axes = (0,) if scale.ndim > 1 else (0, *range(2, x.ndim))  # all along which a parameter doesn't vary
    now_mean, now_var = x.mean(axes), x.var(axes)
    y = _normalised(x, scale, bias, now_mean, now_var, epsilon=epsilon)
    return y, mean * momentum + now_mean * (1 - momentum), var * momentum + now_var * (1 - momentum), now_mean, now_var


@operator("BatchNormalization", since=1, until=13, counts_outputs=True, own=True)
def batch_normalization_1(
    *arrays: Array,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    is_test: int = 0,
    consumed_inputs: Any = None,
    outputs: int = 1,
    out: Array | None = None,
) -> tuple[Array, ...]:
    """Opsets 1 to 13: one output is inference with the running statistics, more is training (operator text, "Output case #1, #2").

    arrays: x, scale, bias, running mean and variance. `is_test` (before opset 7) says the same once more, and a set one wins.
    `spatial = 0` goes with parameters for whole activations; where they have one number per channel all the same, as some face networks
    were exported, only the usual reading makes sense.
    """
    if outputs == 1 or is_test:
        return (_normalised(*arrays, epsilon=epsilon, out=out),)
    return _trained(*arrays, epsilon=epsilon, momentum=momentum)[:outputs]


@operator("BatchNormalization", since=14, own=True)
def batch_normalization_14(
    *arrays: Array, epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int = 0, out: Array | None = None
) -> tuple[Array, ...]:
    """Opset 14 on: `training_mode` alone decides."""
    if not training_mode:
        return (_normalised(*arrays, epsilon=epsilon, out=out),)
    return _trained(*arrays, epsilon=epsilon, momentum=momentum)[:3]


@operator("LayerNormalization", since=17)
def layer_normalization(
    x: Array, scale: Array, bias: Array | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Array, ...]:
    axes = tuple(range(axis % x.ndim, x.ndim))
    mean = x.mean(axes, keepdims=True)
    inverse = 1 / np.sqrt(x.var(axes, keepdims=True) + epsilon)
    y = (x - mean) * inverse * scale
    return y if bias is None else y + bias, mean, inverse


@operator("RMSNormalization", since=23)
def rms_normalization(x: Array, scale: Array, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> tuple[Array, ...]:
    axes = tuple(range(axis % x.ndim, x.ndim))
    return (x / np.sqrt(np.mean(x * x, axes, keepdims=True) + epsilon) * scale,)


@operator("GroupNormalization", since=18)
def group_normalization(
    x: Array, scale: Array, bias: Array, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Array, ...]:
    """Scale and bias are per group in opset 18 and per channel from 21 on; the lengths tell them apart."""
    n, c = x.shape[:2]
    grouped = x.reshape(n, num_groups, -1)
    spread = np.sqrt(grouped.var(2, keepdims=True) + epsilon)
    y = ((grouped - grouped.mean(2, keepdims=True)) / spread).reshape(x.shape)
    scale, bias = (np.repeat(p, c // p.size) for p in (scale, bias))
    scale, bias = per_channel(x, scale, bias)
    return (y * scale + bias,)


@operator("MeanVarianceNormalization", since=9)
def mean_variance_normalization(x: Array, *, axes: Any = (0, 2, 3)) -> tuple[Array, ...]:
    """The 1e-9 is the specification's own (function body of the operator)."""
    centred = x - x.mean(tuple(axes), keepdims=True)
    return (centred / (np.sqrt(np.mean(centred * centred, tuple(axes), keepdims=True)) + 1e-9),)


@operator("LRN")
def lrn(x: Array, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> tuple[Array, ...]:
    squares, total = x * x, np.zeros_like(x)
    for shift in range(-((size - 1) // 2), math.ceil((size - 1) / 2) + 1):
        here = slice(max(0, -shift), x.shape[1] - max(0, shift))
        there = slice(max(0, shift), x.shape[1] + min(0, shift))
        if here.start < here.stop:
            total[:, here] += squares[:, there]
    return (x / (bias + alpha / size * total) ** beta,)
