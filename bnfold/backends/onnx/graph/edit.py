"""Edits of a graph: what a change leaves behind, local functions put in the places of their calls, and a part as a model of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy.typing as npt
import onnx
import onnx_ir as ir

from bnfold.errors import UnsupportedError

from .constants import Constants
from .shapes import Shapes
from .walk import all_graphs, all_nodes


def drop_void_biases(model: ir.Model) -> None:
    """Take out biases of zeros that aren't vectors, which runtimes refuse: torch's exporter makes them for a Conv3d without bias."""
    constants = Constants(model, Shapes(model))
    for node in list(model.graph):
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) > 2 else None
        array = None if bias is None else constants.get(bias)
        if array is not None and array.ndim != 1 and not array.any():
            node.resize_inputs(2)
    for node in reversed(model.graph):
        if not is_read(node):
            model.graph.remove(node, safe=True)


def idle(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that no output of the model needs."""
    found: set[ir.Node] = set()
    for inner in inner_first(graph):
        for node in reversed(inner):
            if not any(v.is_graph_output() or any(user not in found for user, _ in v.uses()) for v in node.outputs):
                found.add(node)
    return found


def is_read(node: ir.Node) -> bool:
    return any(v.uses() or v.is_graph_output() for v in node.outputs)


def inner_first(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield from reversed(list(all_graphs(graph)))


def inlined(model: ir.Model) -> ir.Model:
    """A copy of the model; local functions are put in the places of their calls, where there are any.

    Raises UnsupportedError where that can't be done.
    """
    copy = model.clone()
    if copy.functions:
        from onnx_ir.passes.common import InlinePass

        for function in copy.functions.values():
            for value in (v for node in all_nodes(function.graph) for v in node.outputs):
                value.const_value = None  # the pass renames values, and a name would reach the tensor that the caller's model holds too
        try:
            copy = InlinePass()(copy).model
        except ValueError as error:  # of what the pass doesn't do, such as graphs that a call hands to a function
            raise UnsupportedError(
                f"the model's functions can't be put in the places of their calls ({error}); export it without them"
            ) from None
    return copy


def extract(model: onnx.ModelProto, inputs: Mapping[str, npt.NDArray[Any]], outputs: list[str]) -> onnx.ModelProto:
    """The nodes between some values and others, as a model of their own. Raises UnsupportedError where more goes into them."""
    graph = model.graph
    made = {name: i for i, node in enumerate(graph.node) for name in node.output}
    weights = {t.name: t for t in graph.initializer}
    sparse = {t.values.name: t for t in graph.sparse_initializer}
    chosen: set[int] = set()
    used: set[str] = set()
    seen: set[str] = set()
    stack = list(outputs)
    while stack:
        name = stack.pop()
        if not name or name in seen or name in inputs:
            continue
        seen.add(name)
        if name in weights or name in sparse:
            used.add(name)
        elif name not in made:
            raise UnsupportedError(f"value {name!r} of the model comes from outside the part")
        elif made[name] not in chosen:
            chosen.add(made[name])
            stack.extend(reads(graph.node[made[name]]))
    infos = {v.name: v for v in (*graph.input, *graph.output, *graph.value_info)}
    part = onnx.ModelProto()
    part.CopyFrom(model)
    for each in ("node", "initializer", "sparse_initializer", "input", "output", "value_info", "quantization_annotation"):
        part.graph.ClearField(each)
    part.graph.node.extend(node for i, node in enumerate(graph.node) if i in chosen)
    part.graph.initializer.extend(t for name, t in weights.items() if name in used)
    part.graph.sparse_initializer.extend(t for name, t in sparse.items() if name in used)
    for name, array in inputs.items():
        part.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape))
    if (part.ir_version or 8) < 4:
        for tensor in part.graph.initializer:
            part.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    for name in dict.fromkeys(outputs):
        info = onnx.ValueInfoProto(name=name)
        if name in infos and infos[name].type.HasField("tensor_type"):
            info.type.tensor_type.elem_type = infos[name].type.tensor_type.elem_type
        elif name in weights:
            info = onnx.helper.make_tensor_value_info(name, weights[name].data_type, list(weights[name].dims))
        part.graph.output.append(info)
    return part


def reads(node: onnx.NodeProto) -> set[str]:
    """What a node reads from around it, its subgraphs included."""
    names = set(node.input)
    for attribute in node.attribute:
        for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            own = {i.name for i in body.input} | {t.name for t in body.initializer} | {o for n in body.node for o in n.output}
            names |= set().union(*(reads(n) for n in body.node)) - own
            names |= {o.name for o in body.output} - own
    return names
