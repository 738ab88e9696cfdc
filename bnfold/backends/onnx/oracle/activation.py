"""Activations of the float64 oracle, with Softmax and its kin, and Dropout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .normalisation import per_channel
from .registry import Array, operator, place


def _softmax_of_log(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """exp(x - max) and its sum over the axes."""
    if not x.size:
        return x, x.sum(axes, keepdims=True)
    shifted = x - x.max(axes, keepdims=True)
    return shifted, np.exp(shifted).sum(axes, keepdims=True)


def _coerced_axes(x: Array, axis: int) -> tuple[int, ...]:
    """Before opset 13 the operator sees a matrix whose rows are all axes from `axis` on."""
    return tuple(range(axis % x.ndim if axis < 0 else axis, x.ndim))


@operator("Softmax", until=12)
def softmax_1(x: Array, *, axis: int = 1) -> tuple[Array, ...]:
    shifted, total = _softmax_of_log(x, _coerced_axes(x, axis))
    return (np.exp(shifted) / total,)


@operator("Softmax", since=13)
def softmax_13(x: Array, *, axis: int = -1) -> tuple[Array, ...]:
    shifted, total = _softmax_of_log(x, (axis,))
    return (np.exp(shifted) / total,)


@operator("LogSoftmax", until=12)
def log_softmax_1(x: Array, *, axis: int = 1) -> tuple[Array, ...]:
    shifted, total = _softmax_of_log(x, _coerced_axes(x, axis))
    return (shifted - np.log(total),)


@operator("LogSoftmax", since=13)
def log_softmax_13(x: Array, *, axis: int = -1) -> tuple[Array, ...]:
    shifted, total = _softmax_of_log(x, (axis,))
    return (shifted - np.log(total),)


@operator("Hardmax", until=12)
def hardmax_1(x: Array, *, axis: int = 1) -> tuple[Array, ...]:
    rows = x.reshape(math.prod(x.shape[: axis % x.ndim if axis < 0 else axis]), -1)
    y = np.zeros_like(rows)
    y[np.arange(len(rows)), rows.argmax(1)] = 1
    return (y.reshape(x.shape),)


def _erf(x: Array) -> Array:
    return np.fromiter(map(math.erf, x.ravel().tolist()), np.float64, x.size).reshape(x.shape)


@operator("Erf")
def erf(x: Array) -> tuple[Array, ...]:
    return (_erf(x),)


@operator("Gelu", since=20)
def gelu(x: Array, *, approximate: str = "none") -> tuple[Array, ...]:
    if approximate == "tanh":
        return (0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),)
    return (0.5 * x * (1 + _erf(x / math.sqrt(2))),)


@operator("Relu", own=True)
def relu(x: Array, *, consumed_inputs: Any = None, out: Array | None = None) -> tuple[Array, ...]:
    return (np.asarray(np.maximum(x, x.dtype.type(0), out=place(out, x))),)


@operator("Clip", since=11, own=True)
def clip(x: Array, low: Array | None = None, high: Array | None = None, *, out: Array | None = None) -> tuple[Array, ...]:
    """Where the bounds cross, the upper one wins."""
    if low is None and high is None:
        return (x.copy(),)
    bounds = [each for each in (low, high) if each is not None]
    return (np.asarray(np.clip(x, low, high, out=place(out, x, *bounds))),)


@operator("HardSwish", since=14, own=True)
def hard_swish(x: Array) -> tuple[Array, ...]:
    y = np.asarray(x / 6)
    y += 0.5
    np.clip(y, 0, 1, out=y)
    y *= x
    return (y,)


@operator("Softplus")
def softplus(x: Array) -> tuple[Array, ...]:
    return (np.logaddexp(x, 0),)


@operator("Mish", since=18)
def mish(x: Array) -> tuple[Array, ...]:
    return (x * np.tanh(np.logaddexp(x, 0)),)


@operator("Sigmoid", own=True)
def sigmoid(x: Array, *, out: Array | None = None) -> tuple[Array, ...]:
    """1 / (1 + exp(-x)), which has all its digits on both sides, and is 0 where exp(x) is less than the smallest normal number."""
    y = np.asarray(np.negative(x, out=place(out, x)))
    np.exp(y, out=y)
    y += 1
    return (np.reciprocal(y, out=y),)


@operator("PRelu", until=6)
def prelu_1(x: Array, slope: Array) -> tuple[Array, ...]:
    """Before opset 7 a slope of C numbers is one per channel."""
    if slope.size == 1:
        slope = slope.reshape(())
    elif slope.ndim == 1 and x.ndim > 1:
        (slope,) = per_channel(x, slope)
    return (np.where(x > 0, x, x * slope),)


@operator("Dropout", until=6, counts_outputs=True)
def dropout_1(x: Array, *, ratio: float = 0.5, is_test: int = 0, consumed_inputs: Any = None, outputs: int = 1) -> tuple[Array, ...]:
    """Inference, whatever `is_test` says: exporters left it out of models that were trained and done."""
    return (x, np.ones_like(x))[:outputs]
