"""Operators of the float64 oracle that round to integer codes, and that multiply them.

Their sums are exact: float64 holds all integers that int32 does. Three ways of rounding stand in the attribute STEPS, which `state_steps`
puts on each operator that rounds: half to even, as the standard says; as many steps away by chance as integer kernels are (which keep a
bias in int32 steps, of which hundreds make one of an activation); or not at all, cut to the codes' range alone, which makes a continuous
function of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper

from ..graph.walk import MICROSOFT, is_standard
from ..graph.weights import constants
from .convolution import conv
from .registry import Array, operator
from .widen import all_nodes

STEPS = "steps"
ROUNDED, MOVED, CONTINUOUS = -1, 0, -2  # from MOVED on, seeds
REACH = 2.0**-8  # of a step: by how much what is rounded may be off
ROUNDING = {"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"}


def rounds(graph: onnx.GraphProto, held: Iterable[str]) -> Iterator[onnx.NodeProto]:
    """The operators that round activations. held: the arrays that are stored elsewhere."""
    found = [node for node in all_nodes(graph) if node.op_type in ROUNDING and is_standard(node)]
    constant = constants(graph, held) if found else set()
    yield from (node for node in found if node.input[0] not in constant)


def state_steps(nodes: Iterable[onnx.NodeProto], jitter: int | None) -> None:
    """Say at each operator that it doesn't round, or, with a seed, that it is off by chance."""
    for node in nodes:
        seed = CONTINUOUS if jitter is None else MOVED + zlib.crc32(f"{jitter} {node.output[0]}".encode())
        node.attribute.append(helper.make_attribute(STEPS, seed))


def _stepped(quotient: Array, steps: int) -> Array:
    """Codes, before they are cut."""
    if steps == CONTINUOUS:
        return quotient
    if steps >= MOVED:
        quotient = quotient + np.random.default_rng(steps).uniform(-REACH, REACH, quotient.shape)
    return np.asarray(np.rint(quotient))


def _coded(quotient: Array, zero: Array, kind: np.dtype[Any], steps: int) -> Array:
    """A quotient as codes of a type."""
    if kind.kind not in "iu" and not kind.name.lstrip("u").startswith("int"):  # float8 rounds by itself
        limit = float(ml_dtypes.finfo(kind).max)  # type: ignore[no-untyped-call]  # it comes without types
        cut: Array = np.clip(quotient, -limit, limit)
        return cut if steps == CONTINUOUS else cut.astype(kind)
    info: Any = ml_dtypes.iinfo(kind)  # type: ignore[no-untyped-call]  # the same
    codes: Array = np.clip(_stepped(quotient, steps) + zero.astype(np.float64), float(info.min), float(info.max))
    return codes if steps == CONTINUOUS else codes.astype(kind)


def spread(numbers: Array, x: Array, axis: int, block_size: int = 0) -> Array:
    """Scales or zero points, as they broadcast to what they belong to: one, one for each place along an axis, or for each block of it."""
    if numbers.size == 1 and numbers.ndim <= 1:
        return numbers.reshape(())
    if block_size:
        return np.repeat(numbers, block_size, axis).take(range(x.shape[axis]), axis)
    return numbers.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]) if numbers.ndim == 1 else numbers


@operator("QuantizeLinear", domain=MICROSOFT)
@operator("QuantizeLinear", since=10)
def quantize_linear(
    x: Array,
    scale: Array,
    zero: Array | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    saturate: int = 1,
    precision: int = 0,
    steps: int = ROUNDED,
) -> tuple[Array, ...]:
    """Codes of the zero point's type, else of the one stated, else uint8."""
    kind = np.dtype(helper.tensor_dtype_to_np_dtype(output_dtype or onnx.TensorProto.UINT8)) if zero is None else zero.dtype
    about = np.zeros(()) if zero is None else spread(zero, x, axis, block_size)
    return (_coded(np.asarray(x / spread(scale, x, axis, block_size)), np.asarray(about), kind, steps),)


@operator("DequantizeLinear", domain=MICROSOFT)
@operator("DequantizeLinear", since=10)
def dequantize_linear(
    x: Array, scale: Array, zero: Array | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> tuple[Array, ...]:
    """(x - zero) * scale in float64, where float32 would round an int32 bias."""
    offset = 0.0 if zero is None else spread(zero, x, axis, block_size).astype(np.float64)
    return ((x.astype(np.float64) - offset) * spread(scale, x, axis, block_size),)


@operator("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(x: Array, *, steps: int = ROUNDED) -> tuple[Array, ...]:
    """uint8 codes by the range of the data, which always holds 0: y, its scale and its zero point."""
    low, high = min(float(x.min(initial=0.0)), 0.0), max(float(x.max(initial=0.0)), 0.0)
    scale = (high - low) / 255 or 1.0
    zero = np.clip(_stepped(np.asarray(-low / scale), steps), 0.0, 255.0)
    codes = np.clip(_stepped(x / scale, steps) + zero, 0.0, 255.0)
    kind = np.float64 if steps == CONTINUOUS else np.uint8
    return codes.astype(kind), np.asarray(scale), np.asarray(zero).astype(kind)


def _from_zero(x: Array, zero: Array | None, axis: int) -> Array:
    return x.astype(np.float64) if zero is None else x.astype(np.float64) - spread(zero, x, axis).astype(np.float64)


@operator("ConvInteger", since=10)
def conv_integer(x: Array, w: Array, x_zero: Array | None = None, w_zero: Array | None = None, **attributes: Any) -> tuple[Array, ...]:
    """An int32 sum, in float64 where its input isn't rounded."""
    y = conv(_from_zero(x, x_zero, 1), _from_zero(w, w_zero, 0), **attributes)[0]
    return (y if x.dtype.kind == "f" else np.rint(y).astype(np.int32),)


@operator("MatMulInteger", since=10)
def matmul_integer(a: Array, b: Array, a_zero: Array | None = None, b_zero: Array | None = None) -> tuple[Array, ...]:
    """Zero points of a by row, of b by column."""
    y = _from_zero(a, a_zero, -2) @ _from_zero(b, b_zero, -1)
    return (y if a.dtype.kind == "f" else np.rint(y).astype(np.int32),)


@operator("QLinearConv", since=10)
def qlinear_conv(
    x: Array,
    x_scale: Array,
    x_zero: Array,
    w: Array,
    w_scale: Array,
    w_zero: Array,
    y_scale: Array,
    y_zero: Array,
    bias: Array | None = None,
    *,
    steps: int = ROUNDED,
    **attributes: Any,
) -> tuple[Array, ...]:
    """The bias counts in steps of x_scale * w_scale."""
    y = conv(_from_zero(x, x_zero, 1), _from_zero(w, w_zero, 0), None if bias is None else bias.astype(np.float64), **attributes)[0]
    return (_coded(y * (x_scale * spread(w_scale, y, 1)) / y_scale, y_zero, y_zero.dtype, steps),)


@operator("QLinearMatMul", since=10)
def qlinear_matmul(
    a: Array,
    a_scale: Array,
    a_zero: Array,
    b: Array,
    b_scale: Array,
    b_zero: Array,
    y_scale: Array,
    y_zero: Array,
    *,
    steps: int = ROUNDED,
) -> tuple[Array, ...]:
    y = _from_zero(a, a_zero, -2) @ _from_zero(b, b_zero, -1) * spread(a_scale, a, -2) * spread(b_scale, b, -1)
    return (_coded(y / spread(y_scale, y, -2), np.asarray(spread(y_zero, y, -2)), y_zero.dtype, steps),)
