"""Whether the numbers that quantise are what the standard asks for: scales other than 0, as many as there are places for, zeros of their
type.

ONNX's own inference looks at none of it, and ONNX Runtime at some of it, and only when it runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from bnfold.data.spec import shape_text
from bnfold.errors import ModelError

from ..graph.walk import all_nodes, is_standard, name_of, stored_tensor, whole

SCALES = {"QuantizeLinear": (1,), "DequantizeLinear": (1,), "QLinearConv": (1, 4, 6), "QLinearMatMul": (1, 4, 6)}  # which inputs are scales
Shape = tuple[int, ...]


def check_quantisation(model: ir.Model) -> None:
    """Raises ModelError for what is stored wrong, in the model and its functions."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in all_nodes(graph):
            if node.op_type in SCALES and is_standard(node) and (trouble := next(_troubles(node), "")):
                raise ModelError(f"{node.op_type} '{name_of(node)}' is not valid: {trouble}; export the model again")


def _troubles(node: ir.Node) -> Iterator[str]:
    for i in SCALES[node.op_type]:
        if (held := _held(node, i)) is not None:
            numbers = held.numpy().astype(np.float64).ravel()
            signed = node.op_type in ("QuantizeLinear", "DequantizeLinear")  # whose formulas ask for no sign, nor do runtimes
            bad = np.flatnonzero(~(np.isfinite(numbers) & ((numbers > 0) | (signed & (numbers < 0)))))
            if bad.size:
                where = f" at place {bad[0]}" if numbers.size > 1 else ""
                kind = "number other than 0" if signed else "positive number"
                yield f"a scale of it is {numbers[bad[0]]:g}{where}, where it must be a {kind}"
    scale, zero = _held(node, 1), _held(node, 2)
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return
    if zero is not None:
        code = _code(node)
        if code is not None and code != zero.dtype:
            yield f"its zero point is {zero.dtype.name.lower()}, and its integers are {code.name.lower()}"
        if scale is not None and _shape(scale) != _shape(zero) and (scale.size, zero.size) != (1, 1):
            yield f"its zero points have the shape {shape_text(_shape(zero))}, and its scales {shape_text(_shape(scale))}"
    if scale is not None and scale.size != 1:
        yield from _misplaced(node, _shape(scale), _sizes(node.inputs[0]))


def _misplaced(node: ir.Node, scales: Shape, sizes: list[int | None] | None) -> Iterator[str]:
    """Scales that don't lie along an axis, or in blocks along one. sizes: of what is quantised, as far as they are known."""
    axis, block = whole(node, "axis", 1), whole(node, "block_size", 0)
    if block < 0:
        yield f"its block_size is {block}"
    if not block and len(scales) != 1:
        yield f"its scales have the shape {shape_text(scales)}, where they must be one number, or one for each place along an axis"
    if sizes is None:
        return
    if not -len(sizes) <= axis < len(sizes):
        yield f"its axis is {axis}, and what it quantises has {len(sizes)} axes"
        return
    axis %= len(sizes)
    asked: list[int | None] = [sizes[axis]]
    if block:
        asked = [n if i != axis or n is None else -(-n // block) for i, n in enumerate(sizes)]
    if len(scales) != len(asked) or any(n is not None and n != given for n, given in zip(asked, scales, strict=True)):
        blocks = f" in blocks of {block}" if block else ""
        what = f"({', '.join('?' if n is None else str(n) for n in asked)})"
        yield f"its scales have the shape {shape_text(scales)}, where axis {axis}{blocks} asks for {what}"


def _code(node: ir.Node) -> ir.DataType | None:
    """The type of the integers, None where nothing states it."""
    if node.op_type == "QuantizeLinear":
        stated = whole(node, "output_dtype", 0)
        return ir.DataType(stated) if stated else None
    value = node.inputs[0]
    maker = None if value is None else value.producer()
    if maker is not None and maker.op_type == "QuantizeLinear" and is_standard(maker):
        zero = _held(maker, 2)
        return _code(maker) if zero is None else zero.dtype
    held = _held(node, 0)
    return held.dtype if held is not None else None


def _sizes(value: ir.Value | None) -> list[int | None] | None:
    """What is known of the sizes of what is quantised."""
    if value is None:
        return None
    if (held := stored_tensor(value)) is not None:
        return list(held.shape.numpy())
    maker = value.producer()
    if maker is not None and maker.op_type == "QuantizeLinear" and is_standard(maker):
        return _sizes(maker.inputs[0])
    return None if value.shape is None else [n if isinstance(n, int) and n > 0 else None for n in value.shape]


def _shape(tensor: ir.TensorProtocol) -> Shape:
    return tuple(tensor.shape.numpy())


def _held(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else stored_tensor(value)
