"""Small helpers to walk an onnx_ir model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from bnfold.errors import ModelError

HOLDING = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def subgraphs(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """The graphs that a control-flow node holds, by attribute name."""
    for name, attribute in node.attributes.data.items():  # the dict behind it, since every walk comes by here
        if attribute.type not in HOLDING or attribute.is_ref():
            continue
        for graph in [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs():
            yield name, graph


def all_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Every node in topological order; those of a subgraph stand before the node that holds it."""
    for node in graph:
        for _, inner in subgraphs(node):
            yield from all_nodes(inner)
        yield node


def all_graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """The graph and all that its nodes hold, outermost first."""
    yield graph
    for node in graph:
        for _, inner in subgraphs(node):
            yield from all_graphs(inner)


def attribute(node: ir.Node, name: str, default: object = None) -> object:
    """The value of an attribute, or the default."""
    found = node.attributes.data.get(name)
    return default if found is None or found.is_ref() else found.value


def whole(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    found = attribute(node, name, default)
    if not isinstance(found, int):
        raise _odd(node, name, "integer")
    return found


def number(node: ir.Node, name: str, default: float) -> float:
    """A float attribute."""
    found = attribute(node, name, default)
    if not isinstance(found, (int, float)):
        raise _odd(node, name, "number")
    return float(found)


def _odd(node: ir.Node, name: str, wanted: str) -> ModelError:
    return ModelError(f"{node.op_type} {name_of(node)} has an attribute '{name}' that is no {wanted}; export the model again")


def wholes(node: ir.Node, name: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
    """An attribute that is a list of integers."""
    found = attribute(node, name, default)
    if not isinstance(found, (list, tuple)) or not all(isinstance(n, int) for n in found):
        raise _odd(node, name, "list of integers")
    return tuple(found)


def arg(node: ir.Node, index: int = 0) -> ir.Value:
    """An input that the specification requires."""
    found = node.inputs[index]
    if found is None:
        raise ModelError(f"{node.op_type} {name_of(node)} lacks its input number {index}, which the specification requires")
    return found


MICROSOFT = "com.microsoft"  # the domain of the operators that ONNX Runtime adds to the standard
ALIKE = {"QuantizeLinear", "DequantizeLinear"}  # those of them that do what the standard's newest of this name does


def is_standard(node: ir.Node | onnx.NodeProto) -> bool:
    """Whether the standard says what the operator does."""
    return node.domain in ("", "ai.onnx") or (node.domain == MICROSOFT and node.op_type in ALIKE)


WEIGHTED = {"BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul"}  # what a layer of PyTorch's becomes, beside others
SCOPES, LAYERS = "pkg.torch.onnx.name_scopes", "bnfold.layers"  # keys of a node's metadata, and of a graph's


def name_of(node: ir.Node) -> str:
    """The node's name, or that of the layer of PyTorch's that the exporter says it is; a nameless one goes by its first output."""
    if SCOPES in node.metadata_props and (layer := _layer(node)) and node.graph is not None:
        if LAYERS not in node.graph.meta:
            node.graph.meta[LAYERS] = Counter(filter(None, map(_layer, node.graph)))
        if node.graph.meta[LAYERS][layer] == 1:
            return layer
    return node.name or next((value.name for value in node.outputs if value.name), None) or node.op_type


def _layer(node: ir.Node) -> str:
    """The path of the module in whose code the operator was called, "" where that is the network itself or isn't known."""
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get(SCOPES, "")) if node.op_type in WEIGHTED else []
    return scopes[-2] if len(scopes) > 1 else ""


def open_axis(size: int, axis: int) -> bool:
    """Whether a stated size stands for any: old exporters write -1 for an open axis, and 0 for an open batch."""
    return size < 0 or (size == 0 and axis == 0)


def axes(value: ir.Value) -> tuple[int | str | None, ...] | None:
    """The axes of a value as its file states them: a size, a name, or None for one that is open and has no name."""
    if value.shape is None:
        return None
    sizes = [d if isinstance(d, int) else d.value for d in value.shape]
    return tuple(_stated(size, axis) for axis, size in enumerate(sizes))


def _stated(size: int | str | None, axis: int) -> int | str | None:
    if isinstance(size, str):
        return size if any(c.isalpha() for c in size) else None  # "", "?" and "-1" are no names: two of them needn't agree
    return None if size is None or open_axis(size, axis) else size


def open_axes(graph: onnx.GraphProto) -> None:
    """State the open axes of a graph's values in the standard's way."""
    for info in (*graph.input, *graph.output, *graph.value_info):
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            size = dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
            if _stated(size, axis) is None:
                dim.ClearField("value")


def opset(model: ir.Model) -> int:
    """The version of the standard's operators."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))


def is_batchnorm(node: ir.Node) -> bool:
    return node.op_type == "BatchNormalization" and is_standard(node)


def in_training(node: ir.Node, opset: int) -> bool:
    """Whether a BatchNormalization normalises each batch by itself: by is_test (opsets to 6), by stating further outputs, whether they are
    read or not (7 to 13), or by training_mode (from 14 on)."""
    if opset < 7:
        return not attribute(node, "is_test", 0)
    if opset < 14:
        return any(value.name for value in node.outputs[1:])
    return bool(attribute(node, "training_mode", 0))


def batchnorms(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Every BatchNormalization node that the model holds, and why nobody may have met it: it stands in a body, or in a function.

    The calls of functions are written out before (`write.inlined`), so what is left of them is not called.
    """
    for node in model.graph:
        if is_batchnorm(node):
            yield node, "nothing reads its output"
        for _, body in subgraphs(node):
            for inner in filter(is_batchnorm, all_nodes(body)):
                yield inner, f"it is inside the body of {node.op_type} {name_of(node)}, which runs as a whole"
    for function in model.functions.values():
        for inner in filter(is_batchnorm, all_nodes(function.graph)):
            yield inner, f"it stands in the function {function.name}, which nothing calls"


def held_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor that an initializer or a Constant node holds. (onnx_ir's own helper would rename it, in the caller's model too.)"""
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or not is_standard(node):
        return None
    for name, kind in (
        ("value", None),
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if (found := attribute(node, name)) is not None:
            return found if kind is None else ir.Tensor(np.asarray(found, kind))  # type: ignore[return-value]
    return None


def stored_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor that holds this constant, seen through Constant nodes and Identity."""
    return held_tensor(behind_identity(value))


def behind_identity(value: ir.Value) -> ir.Value:
    """The value itself, or what it is a copy of."""
    while (node := value.producer()) is not None and node.op_type == "Identity" and is_standard(node) and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def nbytes(tensor: ir.TensorProtocol) -> int:
    """The bytes of a tensor's numbers; text, whose length onnx_ir doesn't tell, counts as none."""
    return 0 if tensor.dtype == ir.DataType.STRING else tensor.nbytes
