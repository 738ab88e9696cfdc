"""What QuantizeLinear and DequantizeLinear compute with: codes of a type, scales and zeros of blocks, and the rounding of what is stored.

Specification: github.com/onnx/onnx, docs/Operators.md and docs/Changelog.md: one scale (opset 10), one for each place along an axis (13),
one for each block along an axis (21).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bnfold.algebra.affine import Array
from bnfold.algebra.quantised import Blocks, spread
from bnfold.algebra.rounding import BFLOAT16, limits

from .walk import behind_identity, is_standard, stored_tensor, whole

STORED = {np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)}
KINDS = ("float4_e2m1fn", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
FLOATING = {np.dtype(getattr(ml_dtypes, kind)) for kind in KINDS if hasattr(ml_dtypes, kind)}
WHOLE = {np.dtype(kind) for kind in (np.int8, np.uint8, np.int16, np.uint16, np.int32)}
WHOLE |= {np.dtype(getattr(ml_dtypes, kind)) for kind in ("int2", "uint2", "int4", "uint4")}


def grid_of(node: ir.Node, shape: tuple[int, ...], numbers: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], Blocks]:
    """The scales or zeros of an array, in its rank, and the sizes of their blocks."""
    if numbers.size == 1:
        return numbers.reshape((1,) * len(shape)), shape
    axis, size = whole(node, "axis", 1) % len(shape), whole(node, "block_size", 0)
    if size:
        return numbers, tuple(size if i == axis else 1 for i in range(len(shape)))
    return numbers.reshape([-1 if i == axis else 1 for i in range(len(shape))]), tuple(1 if i == axis else n for i, n in enumerate(shape))


def quotients(kind: np.dtype[Any]) -> list[np.dtype[Any]]:
    """The types in which runtimes divide by a scale: ONNX Runtime in float32 at least, the standard in the stored type."""
    return [np.dtype(np.float32), kind] if kind.itemsize < 4 else [kind]


def codes_of(
    array: npt.NDArray[Any], scale: npt.NDArray[Any], zero: Array, *, bounds: tuple[float, float], kind: np.dtype[Any]
) -> npt.NDArray[np.float64]:
    """What QuantizeLinear makes of an array: half to even, cut at the bounds of the codes. kind: the type in which it divides."""
    with np.errstate(all="ignore"):
        quotient = array.astype(kind) / scale.astype(kind)
    found: npt.NDArray[np.float64] = np.clip(np.rint(quotient.astype(np.float64)) + zero, *bounds)
    return found


def stored_codes(model: ir.Model) -> dict[str, npt.NDArray[Any]]:
    """The outputs of every QuantizeLinear that rounds a stored array with stored scales, as runtimes compute them."""
    found = {}
    for node in model.graph:
        if node.op_type != "QuantizeLinear" or not is_standard(node):
            continue
        array, scale, zero = (*map(_held, node.inputs), None)[:3]
        if array is None or scale is None or array.dtype not in STORED or (zero is None and len(node.inputs) > 2):
            continue
        codes = np.dtype(ir.DataType(whole(node, "output_dtype", 0) or ir.DataType.UINT8).numpy()) if zero is None else zero.dtype
        if codes not in WHOLE:
            continue
        about = np.zeros(()) if zero is None else zero.astype(np.float64)
        scales, zeros = (spread(*grid_of(node, array.shape, each), array.shape) for each in (scale, about))
        made = codes_of(array, scales, zeros, bounds=bounds(codes), kind=quotients(array.dtype)[0])
        found[str(node.outputs[0].name)] = made.astype(codes)
    return found


def _held(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The array of a constant that is stored, or cast from one that is, in the type in which it is read."""
    if value is None:
        return None
    if (tensor := stored_tensor(value)) is not None:
        return tensor.numpy()
    node = behind_identity(value).producer()
    array = _held(node.inputs[0]) if node is not None and node.op_type == "Cast" and is_standard(node) else None
    return None if node is None or array is None else array.astype(ir.DataType(whole(node, "to", 0)).numpy())


def bounds(kind: np.dtype[Any]) -> tuple[float, float]:
    """The lowest and the highest code of a type."""
    if kind in FLOATING:
        return -float(limits(kind).max), float(limits(kind).max)
    info: Any = ml_dtypes.iinfo(kind)  # type: ignore[no-untyped-call]  # it comes without types
    return float(info.min), float(info.max)
