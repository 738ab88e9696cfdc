"""Operators of the float64 oracle that aren't windows, recurrences or resizing: where the reference evaluator is wrong, or lacks one.

The evaluator of the onnx package takes the attribute defaults of the newest version of each operator, blends batch statistics into
the BatchNormalization of opsets 7 to 13, rounds Erf and DequantizeLinear to float32, loops LRN over the wrong axis, knows no
broadcasting of opset 6, and more. What stands here follows the operator specifications (github.com/onnx/onnx, docs/Operators.md
and docs/Changelog.md) version by version.

Every function takes the inputs in their order (None for an omitted one) and the node's attributes as keywords, and returns a tuple.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
Function = Callable[..., tuple[Any, ...]]

# By operator: (first opset, function), oldest first. None: from there on the evaluator's own implementation is right.
TABLE: dict[str, list[tuple[int, Function | None]]] = {}
COUNTS_OUTPUTS: set[Function] = set()


def operator(*names: str, since: int = 1, until: int | None = None, counts_outputs: bool = False) -> Callable[[Function], Function]:
    """Enter a function for operators `names` of opsets `since` to `until`. counts_outputs: it wants to be told how many are asked for."""

    def enter(function: Function) -> Function:
        for name in names:
            rows = TABLE.setdefault(name, [])
            rows[:] = [row for row in rows if row[0] != since]  # what closed an older range opens this one
            rows.append((since, function))
            if until is not None and all(row[0] != until + 1 for row in rows):
                rows.append((until + 1, None))
            rows.sort(key=lambda row: row[0])
        if counts_outputs:
            COUNTS_OUTPUTS.add(function)
        return function

    return enter


def find(name: str, opset: int) -> Function | None:
    """The function for an operator of the standard domain at this opset, or None for the evaluator's own."""
    found = None
    for since, function in TABLE.get(name, ()):
        if since <= opset:
            found = function
    return found


# ---- normalisation


def _channels(x: Array, *params: Array) -> list[Array]:
    """Parameters of shape [C] laid along axis 1; whole activations ([C, D1, ...], `spatial = 0`) as they are."""
    return [p.reshape(p.shape + (1,) * (x.ndim - 2)) if p.ndim <= 1 and x.ndim >= 2 else p for p in params]


def _normalised(x: Array, scale: Array, bias: Array, mean: Array, var: Array, epsilon: float) -> Array:
    scale, bias, mean, var = _channels(x, scale, bias, mean, var)
    y = np.asarray(x - mean)
    scale = scale / np.sqrt(var + epsilon)
    if np.broadcast_shapes(y.shape, scale.shape, bias.shape) != y.shape or y.dtype != np.float64:
        return np.asarray(y * scale + bias)
    y *= scale
    y += bias
    return y


def _batch_statistics(x: Array, of: Array) -> tuple[Array, Array]:
    """Mean and population variance over all axes along which a parameter shaped like `of` doesn't vary."""
    axes = (0,) if of.ndim > 1 else (0, *range(2, x.ndim))
    return x.mean(axes), x.var(axes)


@operator("BatchNormalization", since=1, until=13, counts_outputs=True)
def batch_normalization_1(
    x: Array,
    scale: Array,
    bias: Array,
    mean: Array,
    var: Array,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    is_test: int = 0,
    consumed_inputs: Any = None,
    outputs: int = 1,
) -> tuple[Array, ...]:
    """Opsets 1 to 13: one output is inference with the running statistics, more is training (operator text, "Output case #1, #2").

    `is_test` (before opset 7) says the same once more, and a set one wins. `spatial = 0` goes with parameters for whole activations;
    where they have one number per channel all the same, as some face networks were exported, only the usual reading makes sense.
    """
    if outputs == 1 or is_test:
        return (_normalised(x, scale, bias, mean, var, epsilon),)
    now_mean, now_var = _batch_statistics(x, scale)
    y = _normalised(x, scale, bias, now_mean, now_var, epsilon)
    running = (mean * momentum + now_mean * (1 - momentum), var * momentum + now_var * (1 - momentum))
    return (y, *running, now_mean, now_var)[:outputs]


@operator("BatchNormalization", since=14)
def batch_normalization_14(
    x: Array,
    scale: Array,
    bias: Array,
    mean: Array,
    var: Array,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> tuple[Array, ...]:
    """Opset 14 on: `training_mode` alone decides."""
    if not training_mode:
        return (_normalised(x, scale, bias, mean, var, epsilon),)
    now_mean, now_var = _batch_statistics(x, scale)
    running = (mean * momentum + now_mean * (1 - momentum), var * momentum + now_var * (1 - momentum))
    return (_normalised(x, scale, bias, now_mean, now_var, epsilon), *running)


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
    scale, bias = _channels(x, scale, bias)
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


# ---- activations


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


def erf(x: Array) -> Array:
    return np.fromiter(map(math.erf, x.ravel().tolist()), np.float64, x.size).reshape(x.shape)


@operator("Erf")
def erf_9(x: Array) -> tuple[Array, ...]:
    return (erf(x),)


@operator("Gelu", since=20)
def gelu(x: Array, *, approximate: str = "none") -> tuple[Array, ...]:
    if approximate == "tanh":
        return (0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),)
    return (0.5 * x * (1 + erf(x / math.sqrt(2))),)


@operator("HardSwish", since=14)
def hard_swish(x: Array) -> tuple[Array, ...]:
    return (x * np.clip(x / 6 + 0.5, 0, 1),)


@operator("Softplus")
def softplus(x: Array) -> tuple[Array, ...]:
    return (np.logaddexp(x, 0),)


@operator("Mish", since=18)
def mish(x: Array) -> tuple[Array, ...]:
    return (x * np.tanh(np.logaddexp(x, 0)),)


@operator("Sigmoid")
def sigmoid(x: Array) -> tuple[Array, ...]:
    return (np.exp(-np.logaddexp(0, -x)),)


@operator("PRelu", until=6)
def prelu_1(x: Array, slope: Array) -> tuple[Array, ...]:
    """Before opset 7 a slope of C numbers is one per channel."""
    if slope.size == 1:
        slope = slope.reshape(())
    elif slope.ndim == 1 and x.ndim > 1:
        (slope,) = _channels(x, slope)
    return (np.where(x > 0, x, x * slope),)


@operator("Dropout", until=6, counts_outputs=True)
def dropout_1(x: Array, *, ratio: float = 0.5, is_test: int = 0, consumed_inputs: Any = None, outputs: int = 1) -> tuple[Array, ...]:
    """Inference, whatever `is_test` says: exporters left it out of models that were trained and done."""
    return (x, np.ones_like(x))[:outputs]


# ---- arithmetic with the broadcasting of opset 6


def _legacy(compute: Callable[[Array, Array], Array]) -> Function:
    """`b` lies along consecutive axes of `a`, from `axis` on, or at its end (docs/Changelog.md, Add-6)."""

    def run(a: Array, b: Array, *, axis: int | None = None, broadcast: int = 0, consumed_inputs: Any = None) -> tuple[Array, ...]:
        if broadcast and axis is not None and b.ndim and b.size > 1:
            b = b.reshape(b.shape + (1,) * (a.ndim - axis % a.ndim - b.ndim))
        return (np.asarray(compute(a, b)).astype(a.dtype if compute not in _COMPARISONS else bool),)

    return run


def _quotient(a: Array, b: Array) -> Array:
    """Integers are cut towards zero, as in C."""
    return np.asarray(a / b if a.dtype.kind == "f" else np.trunc(a / b))


_COMPARISONS: tuple[Any, ...] = (np.equal, np.less, np.greater, np.logical_and, np.logical_or, np.logical_xor)
_ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": _quotient,
    "Pow": np.power,
    "Equal": np.equal,
    "Less": np.less,
    "Greater": np.greater,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Xor": np.logical_xor,
}
for _name, _compute in _ARITHMETIC.items():
    operator(_name, until=6)(_legacy(_compute))


@operator("Gemm")
def gemm(
    a: Array,
    b: Array,
    c: Array | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    broadcast: int = 1,
) -> tuple[Array, ...]:
    """All opsets: `broadcast` of opset 6 only forbids what later ones allow."""
    y = (a.T if transA else a) @ (b.T if transB else b) * alpha
    return ((y if c is None else y + beta * c).astype(a.dtype),)


# ---- the rest


@operator("DequantizeLinear", since=10)
def dequantize_linear(
    x: Array, scale: Array, zero: Array | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> tuple[Array, ...]:
    """Per tensor, per axis, or in blocks along the axis; (x - zero) * scale in float64, where float32 would round an int32 bias."""

    def spread(p: Array) -> Array:
        if p.size == 1 and p.ndim <= 1:
            return p.reshape(())
        if p.ndim == 1 and not block_size:
            return p.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
        return np.repeat(p, block_size, axis).take(range(x.shape[axis]), axis) if block_size else p

    offset = 0.0 if zero is None else spread(zero).astype(np.float64)
    return ((x.astype(np.float64) - offset) * spread(scale),)


@operator("GlobalMaxPool")
def global_max_pool(x: Array) -> tuple[Array, ...]:
    return (x.max(tuple(range(2, x.ndim)), keepdims=True),)


@operator("GlobalAveragePool")
def global_average_pool(x: Array) -> tuple[Array, ...]:
    return (x.mean(tuple(range(2, x.ndim)), keepdims=True),)


@operator("GlobalLpPool")
def global_lp_pool(x: Array, *, p: int = 2) -> tuple[Array, ...]:
    return ((np.abs(x) ** p).sum(tuple(range(2, x.ndim)), keepdims=True) ** (1.0 / p),)


@operator("Scatter", since=9)
def scatter(data: Array, indices: Array, updates: Array, *, axis: int = 0) -> tuple[Array, ...]:
    y = data.copy()
    np.put_along_axis(y, indices % data.shape[axis], updates, axis)
    return (y,)


# ---- where the evaluator lacks broadcasting, or cropping


@operator("Mean")
def mean(*inputs: Array) -> tuple[Array, ...]:
    """The evaluator adds up in place, which can't broadcast the first input."""
    total = inputs[0]
    for x in inputs[1:]:
        total = total + x
    return (np.asarray(total / len(inputs)),)


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
