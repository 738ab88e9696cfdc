"""Write new means and variances into an ONNX model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from bnfold.text import unused

from ..graph.edit import is_read
from ..graph.walk import all_graphs, name_of


def name_values(model: ir.Model) -> None:
    """Every value gets a name: the stages know them by it."""
    taken = _names(model)
    for graph in all_graphs(model.graph):
        for value in chain.from_iterable(node.outputs for node in graph):
            if not value.name and (value.uses() or value.is_graph_output()):
                value.name = unused("value", taken)
                taken.add(value.name)


def replace(model: ir.Model, statistics: Iterable[tuple[Sequence[ir.Node], Sequence[npt.NDArray[Any]]]]) -> None:
    """Put means and variances in the places of the old, under the same name where nobody else reads the old ones.

    statistics: for each layer the nodes of its calls, and the arrays as they are stored.
    """
    taken = _names(model)
    old: dict[ir.Value | None, None] = {}
    for nodes, arrays in statistics:
        for index, array in zip((3, 4), arrays, strict=True):
            value = nodes[0].inputs[index]
            assert value is not None
            alone = value.is_initializer() and value.graph is model.graph and not value.is_graph_output()
            if alone and {(use.node, use.idx) for use in value.uses()} == {(node, index) for node in nodes}:
                value.const_value = ir.tensor(array, name=value.name)
                continue
            name = unused(f"{value.name or name_of(nodes[0])}_recalibrated", taken)
            taken.add(name)
            fresh = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            fresh.shape, fresh.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
            model.graph.register_initializer(fresh)
            if (model.ir_version or 4) < 4:  # there, every initializer is listed among the inputs
                model.graph.inputs.append(fresh)
            for node in nodes:
                old[node.inputs[index]] = None
                node.replace_input_with(index, fresh)
    for each in old:
        _drop_idle(model.graph, each)


def leave_training(node: ir.Node, opset: int) -> None:
    """An output of the model that was the running mean or variance of training is the one that is kept now."""
    for name in ("training_mode", "is_test"):
        node.attributes.pop(name, None)
    if opset < 7:
        node.attributes["is_test"] = ir.AttrInt64("is_test", 1)
    graph = node.graph
    assert graph is not None
    for output, source in zip(node.outputs[1:3], node.inputs[3:5], strict=False):
        if output.is_graph_output():
            made = ir.Node("", "Identity", [source], name=f"{name_of(node)}:{output.name}")
            made.outputs[0].name, output.name = output.name, None
            made.outputs[0].type, made.outputs[0].shape = output.type, output.shape
            graph.outputs[:] = [made.outputs[0] if each is output else each for each in graph.outputs]
            graph.insert_after(node, made)
    node.resize_outputs(1)


def _names(model: ir.Model) -> set[str]:
    graphs = list(all_graphs(model.graph))
    return {v.name for g in graphs for v in chain(g.inputs, g.initializers.values(), *(n.outputs for n in g)) if v.name}


def _drop_idle(graph: ir.Graph, value: ir.Value | None) -> None:
    """Take out what computed or stored a value that nobody reads any more."""
    if value is None or value.uses() or value.is_graph_output():
        return
    node = value.producer()
    if node is None:
        if value.is_initializer() and not value.is_graph_input():
            del graph.initializers[value.name or ""]
    elif node.graph is graph and not is_read(node):
        sources = list(node.inputs)
        graph.remove(node, safe=True)
        for source in sources:
            _drop_idle(graph, source)
