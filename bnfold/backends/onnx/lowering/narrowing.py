"""Which ONNX operators can do with fewer channels, and what those that work element by element make of numbers."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Elementwise, Node

from ..graph.constants import Constants
from ..graph.walk import is_standard, stored_tensor

# fmt: off
ELEMENTWISE = {
    "Abs", "Add", "Cast", "Ceil", "Celu", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
    "LeakyRelu", "Log", "Max", "Mean", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Shrink",
    "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu",
}
# fmt: on
POOLS = {"AveragePool", "GlobalAveragePool", "MaxPool", "GlobalMaxPool", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "Pad"}
MOVES = {"Concat", "Flatten", "Squeeze", "Transpose", "Unsqueeze"}
FLEXIBLE = ELEMENTWISE | POOLS | MOVES | {"Conv", "Dropout", "Einsum", "Gemm", "Identity", "MatMul"}


def elementwise(constants: Constants, opset: int, node: Node) -> Elementwise | None:
    """See `Lowering.elementwise`."""
    op, positions = node.native.node, node.native.positions
    others = [v for i, v in enumerate(op.inputs) if v is not None and i not in positions]
    if op.op_type not in ELEMENTWISE or not is_standard(op) or any((c := constants.get(v)) is None or c.size > 1 for v in others):
        return None
    return partial(_evaluated, constants, opset, op, positions)


def _evaluated(constants: Constants, opset: int, op: ir.Node, positions: list[int], arrays: list[Array]) -> Array:
    """By the float64 oracle."""
    from ..oracle.evaluator import Oracle

    given = dict(zip(positions, arrays, strict=True))
    inputs: list[ir.Value | None] = []
    for i, v in enumerate(op.inputs):
        array = given[i] if i in given else constants.get(v)
        tensor = None if array is None else ir.Tensor(np.asarray(array), name=f"x{i}")
        inputs.append(None if tensor is None else ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype)))
    copy = ir.Node("", op.op_type, inputs, op.attributes.values(), num_outputs=1)
    copy.outputs[0].name, copy.outputs[0].type = "y", ir.TensorType(ir.DataType.DOUBLE)
    leaves = [v for v in inputs if v is not None]
    graph = ir.Graph([], copy.outputs, nodes=[copy], initializers=leaves, opset_imports={"": opset}, name="constants")
    return np.asarray(Oracle(ir.Model(graph, ir_version=8)).run({})["y"], np.float64)


def rigid(constants: Constants, node: Node) -> str:
    """See `Graph.rigid`."""
    op: ir.Node = node.native.node
    if not is_standard(op):
        return "it isn't known what it does with fewer channels"
    if op.op_type == "Reshape":
        return "" if target(constants, op) is not None else "the sizes that it gives are computed"
    if op.op_type in ("Resize", "Upsample"):
        return "it states the sizes that it gives" if len(op.inputs) > 3 and op.inputs[3] is not None else ""
    if op.op_type == "ConvTranspose":
        return "it states the sizes that it gives" if "output_shape" in op.attributes else ""
    return "" if op.op_type in FLEXIBLE else "its sizes or places are fixed"


def target(constants: Constants, op: ir.Node) -> list[int] | None:
    """The sizes that a Reshape states; None where these are computed, but for a first one and a rest that follows from the others."""
    shape = op.inputs[1] if len(op.inputs) > 1 else None
    if shape is None:
        return None
    if (known := constants.get(shape)) is not None:
        return [int(n) for n in known.ravel()] if constants.stored(shape) is not None else None
    maker = shape.producer()
    parts = [] if maker is None or maker.op_type != "Concat" else [constants.get(v) for v in maker.inputs[1:]]
    rest = [int(n) for part in parts if part is not None for n in part.ravel()]
    return [0, *rest] if rest == [-1] and len(parts) == 1 else None


def reads_channels(op: ir.Node) -> bool:
    """Whether an operator that gives the sizes of a tensor is read for more than the first of them."""
    firsts = (user.op_type == "Gather" and _is_zero(user.inputs[1]) for user, _ in op.outputs[0].uses())
    return op.op_type == "Size" or not all(firsts)


def _is_zero(v: ir.Value | None) -> bool:
    tensor = None if v is None else stored_tensor(v)
    return tensor is not None and not tensor.numpy().any()
