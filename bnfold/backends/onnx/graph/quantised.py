"""Weights behind QuantizeLinear and DequantizeLinear, as the algebra knows them, and how these two operators are made anew."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bnfold.algebra.layouts import AS_STORED, Layout
from bnfold.algebra.quantised import ROUNDED, FloatSource, Quantised, Rescaled
from bnfold.algebra.rounding import rounded

from .codes import FLOATING, WHOLE, bounds, codes_of, grid_of, quotients
from .constants import FLOATS, Constants
from .walk import MICROSOFT, attribute, behind_identity, is_standard, stored_tensor, whole

ROUND = {"Round", "Floor", "Ceil", "Sign", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
AROUND = {"Clip", "Min", "Max", "Add", "Sub"}  # what stands between these and the scale: bounds, zero points, a way past the gradient
PACKED = {"BitwiseAnd", "BitwiseOr", "BitShift", "Concat", "Expand", "CastLike"}  # what takes several integers out of one
MOVING = {"Identity", "Cast", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}
# Of activations. What computes with codes gives codes, or floats whose scales it holds itself.
ROUNDS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"}
INNER = "it multiplies by integers and scales of its own, which aren't rewritten: fold before quantising"
HOLDS_SCALES = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "DynamicQuantizeLSTM"}
HOLDS_SCALES |= {"QAttention", "QEmbedLayerNormalization", "GatherBlockQuantized", "QMoE", "QOrderedMatMul"}


def rounding(name: str) -> str:
    """Why no map crosses an operator that computes with integer codes; "" of any other. name: with its domain."""
    domain, _, op = name.rpartition("::")
    if domain == MICROSOFT and op in HOLDS_SCALES:
        return INNER
    codes = op in ROUNDS or (domain == MICROSOFT and op.startswith(("QLinear", "QGemm", "QuantizeBFP", "QOrdered")))
    return ROUNDED if codes and domain in ("", MICROSOFT) else ""


# --- what stands in a file -------------------------------------------------------------------------------------------------------------


def dequantised(value: ir.Value) -> tuple[ir.Node | None, list[ir.Node]]:
    """The DequantizeLinear that makes a constant, or the Mul that scales its integers, None where there is neither, and what lays it out
    anew behind that, the last first."""
    between: list[ir.Node] = []
    while (node := value.producer()) is not None and is_standard(node) and node.op_type in MOVING and node.inputs[0] is not None:
        between.append(node)
        value = node.inputs[0]
    known = node is not None and (dequantises(node) or integers(node) is not None)
    return (node, between) if known else (None, [])


def dequantises(node: ir.Node) -> bool:
    """Whether it is a DequantizeLinear."""
    return node.op_type == "DequantizeLinear" and is_standard(node)


def integers(node: ir.Node) -> int | None:
    """Which input of a Mul are integers, that the other one scales: rounded in the graph, or stored; None where neither, or both."""
    found = [i for i, value in enumerate(node.inputs) if _are_whole(value)] if node.op_type == "Mul" and is_standard(node) else []
    return found[0] if len(found) == 1 else None


def _are_whole(value: ir.Value | None) -> bool:
    while value is not None and (node := value.producer()) is not None and node.op_type != "Constant":
        if not is_standard(node) or (place := _whole_from(node)) is None:
            return is_standard(node) and (node.op_type in ROUND or _chooses(node))
        value = node.inputs[place]
    stored = None if value is None else stored_tensor(value)
    return stored is not None and stored.dtype not in FLOATS


def _whole_from(node: ir.Node) -> int | None:
    """Which input of an operator are integers where its output is: the packed ones, those that are multiplied by one number, or the codes
    that are looked up in a list of what each stands for."""
    tensors = [_stored(value) for value in node.inputs]
    if node.op_type in ("Gather", "GatherND"):
        return 1 if (table := tensors[0]) is not None and len(table.shape) == 1 else None
    if node.op_type in ("Mul", "Div"):
        single = [i for i, tensor in enumerate(tensors) if tensor is not None and tensor.size == 1]
        return 0 if 1 in single else 1 if 0 in single and node.op_type == "Mul" else None
    return 0 if node.op_type in MOVING | AROUND | PACKED else None


def _chooses(node: ir.Node) -> bool:
    """Whether all that comes out is one of two numbers."""
    tensors = map(_stored, node.inputs[1:])
    return node.op_type == "Where" and all(tensor is not None and tensor.size == 1 for tensor in tensors)


def _stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that a value is a copy, a cast or another layout of."""
    while value is not None and (node := value.producer()) is not None and is_standard(node) and node.op_type in MOVING:
        value = node.inputs[0]
    return None if value is None else stored_tensor(value)


def makes_whole(node: ir.Node) -> bool:
    """Whether an operator rounds to integers, or makes floats of stored ones, of more than one."""
    casts = node.op_type == "CastLike" or (node.op_type == "Cast" and ir.DataType(whole(node, "to", 0)) in FLOATS)
    stored = _stored(node.inputs[0]) if casts else None
    several = casts and (stored is None or stored.size > 1)
    return is_standard(node) and (node.op_type in ROUND or _chooses(node) or (several and _are_whole(node.inputs[0])))


def stored_name(value: ir.Value) -> str:
    """What a constant is called in its file: one that is dequantised, or rounded before, as what is stored."""
    node, way = value.producer(), {"DequantizeLinear", "QuantizeLinear", "Identity"}
    if node is not None and (place := integers(node)) is not None:
        value, way = node.inputs[place] or value, MOVING | AROUND | ROUND | {"Div"}
        node = value.producer()
    while node is not None and node.op_type in way and node.inputs[0] is not None:
        value, node = node.inputs[0], node.inputs[0].producer()
    return value.name or ""


def relaid(between: list[ir.Node], shape: Callable[[ir.Value], tuple[int, ...]]) -> Layout:
    """What operators that lay out anew make of an array."""
    found = AS_STORED
    for node in reversed(between):
        made = shape(node.outputs[0])
        if node.op_type == "Transpose":
            given: Any = attribute(node, "perm", None)
            found = _transposed(tuple(given or range(len(made))[::-1])).after(found)
        elif node.op_type not in ("Identity", "Cast"):
            assert node.inputs[0] is not None
            found = _reshaped(shape(node.inputs[0]), made).after(found)
    return found


def _transposed(perm: tuple[int, ...]) -> Layout:
    back = tuple(np.argsort(perm).tolist())
    return Layout(f"transposed {perm}", lambda w: w.transpose(perm), lambda w: w.transpose(back))


def _reshaped(stored: tuple[int, ...], made: tuple[int, ...]) -> Layout:
    return Layout(f"{stored} as {made}", lambda w: w.reshape(made), lambda w: w.reshape(stored))


def quantised(constants: Constants, opset: int, node: ir.Node) -> Quantised | str:
    """How the constant that a DequantizeLinear makes is stored; where it may not change, a clause that says why."""
    if (place := integers(node)) is not None:
        return _multiplied(constants, node, place)
    codes, scale, zero = (*map(constants.get, node.inputs), None)[:3]
    kind = None if node.inputs[1] is None else constants.dtype(node.inputs[1])
    if codes is None or scale is None or kind is None or kind not in FLOATS:
        return "is quantised, and its scales aren't of a type of which any multiple can be stored"
    if codes.dtype not in FLOATING | WHOLE:
        return f"is quantised as {codes.dtype}, whose scales aren't changed"
    if codes.dtype in FLOATING and rounds_to(node) is not None:
        return f"is rounded to {codes.dtype} when the model runs"
    grid, blocks = grid_of(node, codes.shape, scale.astype(np.float64))
    zeros = np.zeros((1,) * codes.ndim) if zero is None else grid_of(node, codes.shape, zero.astype(np.float64))[0]
    most = [-(-n // block) if n else 0 for n, block in zip(codes.shape, blocks, strict=True)]
    if any(each.ndim != codes.ndim or any(n not in (1, m) for n, m in zip(each.shape, most, strict=True)) for each in (grid, zeros)):
        return "is quantised, and its scales and zero points aren't as many as it has places for"
    if not (np.isfinite(grid) & (grid != 0)).all():
        return "is quantised, and a scale of it is computed to be 0, or no number"
    return Quantised(
        lambda: codes.astype(np.float64),
        codes.shape,
        grid,
        zeros,
        blocks,
        codes.dtype,
        *bounds(codes.dtype),
        np.dtype(kind.numpy()),
        one_scale=f"opset {opset} has no scale for each channel" if opset < 13 and node.domain != MICROSOFT else "",
        one_zero=f"{codes.dtype} codes have no zero point" if codes.dtype in FLOATING or codes.dtype == np.int32 else "",
        small=codes.ndim == 1,  # a bias
        source=_source(constants, node, codes.dtype),
    )


def _multiplied(constants: Constants, node: ir.Node, place: int) -> Quantised | str:
    """The same of a Mul of integers by a scale; "" where that isn't how it is stored: its scale has more axes, or no type that is known."""
    codes, scale = (constants.get(node.inputs[i]) for i in (place, 1 - place))
    other = node.inputs[1 - place]
    kind = None if other is None else constants.dtype(other)
    if codes is None or scale is None or kind is None or kind not in FLOATS or codes.ndim < max(2, scale.ndim):
        return ""
    if np.broadcast_shapes(codes.shape, scale.shape) != codes.shape:
        return ""
    grid = scale.astype(np.float64).reshape((1,) * (codes.ndim - scale.ndim) + scale.shape)
    blocks = tuple(n if size == 1 else 1 for n, size in zip(codes.shape, grid.shape, strict=True))
    none, code = np.zeros((1,) * codes.ndim), np.dtype(np.float64)
    return Quantised(lambda: codes, codes.shape, grid, none, blocks, code, -np.inf, np.inf, np.dtype(kind.numpy()), apart=True)


def rounds_to(node: ir.Node) -> ir.Node | None:
    """The QuantizeLinear before a DequantizeLinear."""
    maker = None if node.inputs[0] is None else behind_identity(node.inputs[0]).producer()
    return maker if maker is not None and is_standard(maker) and maker.op_type == "QuantizeLinear" else None


def _source(constants: Constants, node: ir.Node, codes: np.dtype[Any]) -> FloatSource | None:
    """The array that a QuantizeLinear of the same scales rounds; None where there is none."""
    maker = rounds_to(node)
    value = None if maker is None else maker.inputs[0]
    kind = None if value is None else constants.dtype(value)
    if maker is None or kind is None or kind not in FLOATS:
        return None
    for one, other in zip((*maker.inputs, None)[1:3], (*node.inputs, None)[1:3], strict=True):
        mine, theirs = (constants.get(v) for v in (one, other))
        if not np.array_equal(0 if mine is None else mine, 0 if theirs is None else theirs):
            return None
    if any(whole(maker, name, default) != whole(node, name, default) for name, default in (("axis", 1), ("block_size", 0))):
        return None
    stored = np.dtype(kind.numpy())

    def read() -> npt.NDArray[Any]:
        array = constants.get(value)
        assert array is not None
        return rounded(array, stored)

    return FloatSource(read, [partial(codes_of, bounds=bounds(codes), kind=each) for each in quotients(stored)])


# --- what is written -------------------------------------------------------------------------------------------------------------------


def remade(node: ir.Node, made: Rescaled, code: np.dtype[Any], add: Callable[..., ir.Value], insert: Callable[..., ir.Node]) -> ir.Node:
    """A DequantizeLinear, or a Mul, like one, with new numbers, behind a QuantizeLinear where one rounds its array.

    code: the type of the codes. add: makes an initializer of a role and an array, in the place of a value whose name it gets if that goes.
    insert: makes a node like one, of inputs and attributes.
    """
    if (place := integers(node)) is not None:
        inputs = list(node.inputs)
        inputs[1 - place] = add("scale", made.scale, inputs[1 - place])
        return insert(node, inputs, node.attributes)
    maker = rounds_to(node) if made.source is not None else None
    first, old_scale, zero = (*node.inputs, None)[:3]
    blocked = whole(node, "block_size", 0) and made.scale.size > 1
    shape = () if made.scale.size == 1 else made.scale.shape if blocked else (made.scale.size,)
    scale = add("scale", made.scale.reshape(shape), old_scale)
    if zero is not None or made.zero.any():
        zero = add("zero_point", np.broadcast_to(made.zero, made.scale.shape).reshape(shape).astype(code), zero)
    more = [scale] if zero is None else [scale, zero]
    changed = {} if made.axis is None else {"axis": ir.AttrInt64("axis", made.axis)}
    if maker is not None:
        source = add("weight", made.source, maker.inputs[0])
        first = insert(maker, [source, *more], {**maker.attributes, **changed}).outputs[0]
    elif made.codes is not None:
        first = add("integers", made.codes.astype(code), first)
    return insert(node, [first, *more], {**node.attributes, **changed})
