"""What is wrong with the parameters of an operator: shapes that don't fit its attributes, or each other, and scales and zero points.

ONNX's own inference looks at none of what quantises, and ONNX Runtime at some of it, and only when it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from bnfold.data.spec import shape_text
from bnfold.errors import ModelError

from ..graph.walk import all_nodes, is_standard, name_of, stored_tensor, whole

Dims = tuple[int, ...]
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
POOLS = ("MaxPool", "AveragePool", "LpPool")


def troubles(op_type: str, values: dict[str, Any], dims: list[Dims | None], version: int) -> Iterator[str]:
    """What is wrong with the parameters of an operator. dims: of the inputs that are constant, None for the others."""

    def shape(i: int) -> Dims | None:
        return dims[i] if i < len(dims) else None

    if op_type == "BatchNormalization":
        yield from _alike([shape(i) for i in range(1, 5)], ("scale", "bias", "mean", "variance"), spatial=bool(values.get("spatial", 1)))
        if values.get("training_mode", 0) not in (0, 1):  # runtimes disagree on what else says
            yield f"its training_mode is {values['training_mode']}, which is neither 0 nor 1"
    elif op_type == "InstanceNormalization" or (op_type == "GroupNormalization" and version >= 21):
        yield from _alike([shape(1), shape(2)], ("scale", "bias"), spatial=True)
    elif op_type in ("Conv", "ConvTranspose"):
        yield from _convolution(op_type, values, shape(1))
    elif op_type in POOLS:
        yield from _window(values, tuple(values.get("kernel_shape", ())))
    elif op_type == "Gemm":
        yield from (
            f"its matrix {name} has the shape {found}" for name, i in (("A", 0), ("B", 1)) if (found := shape(i)) and len(found) != 2
        )
        if (found := shape(2)) is not None and len(found) > 2:
            yield f"its C has the shape {found}, which is larger than a matrix"
        if found and (matrix := shape(1)) is not None and len(matrix) == 2:
            columns = matrix[0 if values.get("transB") else 1]
            if found[-1] not in (1, columns):
                yield f"its C has the shape {found}, and its product {columns} columns"
    elif op_type in GATES:
        yield from _recurrent(values, GATES[op_type], shape(1), shape(2), shape(3))
    elif op_type == "Transpose" and "perm" in values:
        if sorted(values["perm"]) != list(range(len(values["perm"]))):
            yield f"its perm {list(values['perm'])} is no order of axes"
    elif op_type in ("DepthToSpace", "SpaceToDepth"):
        if not 1 <= values.get("blocksize", 1) <= 1 << 16:  # ONNX Runtime divides by its square, which may come to 0
            yield f"its blocksize is {values['blocksize']}"
    elif op_type == "Einsum":
        left = values.get("equation", "").partition("->")[0]
        if len(left.split(",")) != len(dims):
            yield f"its equation '{values.get('equation', '')}' is not one of {len(dims)} operands"


def _alike(found: list[Dims | None], names: tuple[str, ...], *, spatial: bool) -> Iterator[str]:
    known = {name: dims for name, dims in zip(names, found, strict=True) if dims is not None}
    odd = next((f"{name} has the shape {dims}" for name, dims in known.items() if spatial and len(dims) != 1), "")
    if odd:
        yield f"its {odd}, where it must be a vector"
    if len(set(known.values())) > 1:
        yield "its parameters differ in shape: " + ", ".join(f"{name} {dims}" for name, dims in known.items())


def _convolution(op_type: str, values: dict[str, Any], weight: Dims | None) -> Iterator[str]:
    groups, kernel = values.get("group", 1), tuple(values.get("kernel_shape", ()))
    if groups < 1:
        yield f"it has {groups} groups"
    if weight is None:
        yield from _window(values, kernel)
        return
    if len(weight) < 3:
        yield f"its weight has the shape {weight}, which has no kernel"
    elif groups > 0 and weight[0] % groups:
        what = "output" if op_type == "Conv" else "input"
        yield f"its {weight[0]} {what} channels aren't divided by its {groups} groups"
    if kernel and kernel != weight[2:]:
        yield f"its kernel_shape {kernel} isn't that of its weight, {weight[2:]}"
    yield from _window(values, weight[2:])


def _window(values: dict[str, Any], kernel: Dims) -> Iterator[str]:
    if not kernel:
        return
    if min(kernel) < 1:
        yield f"its kernel {kernel} is empty"
    for name, count, least in (("strides", 1, 1), ("dilations", 1, 1), ("pads", 2, None), ("output_padding", 1, 0), ("output_shape", 1, 1)):
        found = values.get(name, ())
        if found and len(found) != count * len(kernel):
            yield f"its {name} are {len(found)} numbers, and its kernel has {len(kernel)} axes"
        if least is not None and found and min(found) < least:
            yield f"its {name} {tuple(found)} hold a number below {least}"


def _recurrent(values: dict[str, Any], gates: int, weight: Dims | None, again: Dims | None, bias: Dims | None) -> Iterator[str]:
    directions = 2 if values.get("direction") == "bidirectional" else 1
    for name, found, rank in (("input weight", weight, 3), ("recurrent weight", again, 3), ("bias", bias, 2)):
        if found is not None and (len(found) != rank or found[0] != directions):
            yield f"its {name} has the shape {found}, where it must have {rank} axes, the first for {directions} directions"
            return
    if weight is not None and again is not None and (weight[1] != again[1] or again[1] != gates * again[2]):
        yield f"its weights {weight} and {again} don't fit each other"
    if weight is not None and bias is not None and bias[1] != 2 * weight[1]:
        yield f"its bias {bias} doesn't fit its weight {weight}"
    if again is not None and values.get("hidden_size", again[2]) != again[2]:
        yield f"its hidden_size is {values['hidden_size']}, and its weights have {again[2]}"


SCALES = {"QuantizeLinear": (1,), "DequantizeLinear": (1,), "QLinearConv": (1, 4, 6), "QLinearMatMul": (1, 4, 6)}  # which inputs are scales


def check_quantisation(model: ir.Model) -> None:
    """Raises ModelError for what is stored wrong, in the model and its functions."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in all_nodes(graph):
            if node.op_type in SCALES and is_standard(node) and (trouble := next(_troubles(node), "")):
                raise ModelError(f"{node.op_type} '{name_of(node)}' is not valid: {trouble}; export the model again")


def _troubles(node: ir.Node) -> Iterator[str]:
    for i in SCALES[node.op_type]:
        if (stored := _stored(node, i)) is not None:
            numbers = stored.numpy().astype(np.float64).ravel()
            signed = node.op_type in ("QuantizeLinear", "DequantizeLinear")  # whose formulas ask for no sign, nor do runtimes
            bad = np.flatnonzero(~(np.isfinite(numbers) & ((numbers > 0) | (signed & (numbers < 0)))))
            if bad.size:
                where = f" at place {bad[0]}" if numbers.size > 1 else ""
                kind = "number other than 0" if signed else "positive number"
                yield f"a scale of it is {numbers[bad[0]]:g}{where}, where it must be a {kind}"
    scale, zero = _stored(node, 1), _stored(node, 2)
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


def _misplaced(node: ir.Node, scales: Dims, sizes: list[int | None] | None) -> Iterator[str]:
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
    expected: list[int | None] = [sizes[axis]]
    if block:
        expected = [n if i != axis or n is None else -(-n // block) for i, n in enumerate(sizes)]
    if len(scales) != len(expected) or any(n is not None and n != given for n, given in zip(expected, scales, strict=True)):
        blocks = f" in blocks of {block}" if block else ""
        what = f"({', '.join('?' if n is None else str(n) for n in expected)})"
        yield f"its scales have the shape {shape_text(scales)}, where axis {axis}{blocks} asks for {what}"


def _code(node: ir.Node) -> ir.DataType | None:
    """The type of the integers, None where nothing states it."""
    if node.op_type == "QuantizeLinear":
        stated = whole(node, "output_dtype", 0)
        return ir.DataType(stated) if stated else None
    value = node.inputs[0]
    maker = None if value is None else value.producer()
    if maker is not None and maker.op_type == "QuantizeLinear" and is_standard(maker):
        zero = _stored(maker, 2)
        return _code(maker) if zero is None else zero.dtype
    stored = _stored(node, 0)
    return stored.dtype if stored is not None else None


def _sizes(value: ir.Value | None) -> list[int | None] | None:
    """What is known of the sizes of what is quantised."""
    if value is None:
        return None
    if (stored := stored_tensor(value)) is not None:
        return list(stored.shape.numpy())
    maker = value.producer()
    if maker is not None and maker.op_type == "QuantizeLinear" and is_standard(maker):
        return _sizes(maker.inputs[0])
    return None if value.shape is None else [n if isinstance(n, int) and n > 0 else None for n in value.shape]


def _shape(tensor: ir.TensorProtocol) -> Dims:
    return tuple(tensor.shape.numpy())


def _stored(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else stored_tensor(value)
