"""The integers that a graph computes from its tensors' sizes, where ONNX's own shape inference gives up on them.

An exporter writes the shape for a Reshape as it finds it: Shape, Squeeze, Reshape to a vector, Concat. The inference doesn't follow all of
these, and then doesn't know what comes out of the Reshape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Ints = dict[str, npt.NDArray[Any]]
# Operators whose shape is decided by an input of integers.
DECIDED = ("Reshape", "Expand", "Slice", "Tile", "Resize", "Pad", "ConstantOfShape", "Range", "Split", "Squeeze", "Unsqueeze")
COUNTS = ("NonZero", "Unique", "Compress", "NonMaxSuppression", "OneHot", "TopK", "Trilu", "StringSplit", "Multinomial", "SequenceAt")
LARGEST = 64  # elements
OPEN = 2**16 - 2**31  # in the place of a size that isn't known, and the numbers below it of those that have a name
INTEGERS = {onnx.TensorProto.INT64: np.int64, onnx.TensorProto.INT32: np.int32}
ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Min", "Max"}


def settle(proto: onnx.ModelProto, infer: Callable[[onnx.ModelProto], onnx.ModelProto]) -> onnx.ModelProto:
    """The model with inferred shapes, as far as `infer` and the integers worked out here take it."""
    inferred = infer(proto)
    integers = None
    while _incomplete(inferred.graph):
        integers = integers or Integers(proto.graph)
        integers.follow(inferred.graph)
        if not integers.put():
            break
        inferred = infer(proto)
    return inferred


def sized_by_data(graph: onnx.GraphProto) -> set[str]:
    """The values whose sizes may depend on the data, and not on the sizes of the inputs alone."""
    data, sized = {info.name for info in graph.input}, set[str]()
    for node in graph.node:
        known = node.domain in ("", "ai.onnx") and all(a.type not in (a.GRAPH, a.GRAPHS) for a in node.attribute)
        steers = node.input[0 if node.op_type in ("ConstantOfShape", "Range") else 1 :] if node.op_type in DECIDED else ()
        if not known or node.op_type in COUNTS or not data.isdisjoint(steers) or not sized.isdisjoint(node.input):
            sized.update(node.output)
        if not sized.isdisjoint(node.output) or (node.op_type not in ("Shape", "Size") and not data.isdisjoint(node.input)):
            data.update(node.output)
    return sized


def _incomplete(graph: onnx.GraphProto) -> bool:
    known = {v.name: v for v in (*graph.value_info, *graph.output) if v.type.tensor_type.HasField("shape")}
    for node in graph.node:
        for name in node.output:
            if name and (name not in known or any(not d.HasField("dim_value") for d in known[name].type.tensor_type.shape.dim)):
                return True
    return False


class Integers:
    """Every small integer tensor of a graph that follows from the sizes known so far. known: by name, shapes:
    of all values; see OPEN."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        integers = [t for t in graph.initializer if t.data_type in INTEGERS and np.prod(t.dims) <= LARGEST]
        self.known: Ints = {tensor.name: numpy_helper.to_array(tensor) for tensor in integers}
        self._given = {tensor.name for tensor in graph.initializer}
        self._given.update(name for node in graph.node if node.op_type == "Constant" for name in node.output)
        followed = [node for node in graph.node if node.op_type in ("Constant", "Shape", *OPERATORS) and node.domain in ("", "ai.onnx")]
        self._symbols: dict[str, int] = {}
        self.shapes: dict[str, list[int]] = {}
        self._left = [(node, {a.name: helper.get_attribute_value(a) for a in node.attribute}) for node in followed]

    def follow(self, inferred: onnx.GraphProto) -> None:
        """Work out what the shapes of the same graph tell."""
        infos = (*inferred.input, *inferred.value_info, *inferred.output)
        dims = {v.name: v.type.tensor_type.shape.dim for v in infos if v.type.tensor_type.HasField("shape")}
        self.shapes = {name: [self._size(each) for each in sizes] for name, sizes in dims.items()}
        left = []
        for node, attributes in self._left:
            try:
                value = _value(node, attributes, self.known, self.shapes)
            except (ValueError, IndexError, KeyError, ZeroDivisionError, TypeError):
                left.append((node, attributes))  # one of its inputs isn't known, or it isn't of this kind
                continue
            if value is not None and value.dtype.kind == "i" and value.size <= LARGEST:
                self.known[node.output[0]] = value
                if is_open(value).any():
                    left.append((node, attributes))
        self._left = left

    def _size(self, dim: onnx.TensorShapeProto.Dimension) -> int:
        if dim.HasField("dim_value"):
            return int(dim.dim_value)
        return OPEN - 1 - self._symbols.setdefault(dim.dim_param, len(self._symbols)) if dim.dim_param else OPEN

    def put(self) -> bool:
        """Give the operators what is known now; whether any of it is new."""
        changed = False
        for node in self._graph.node:
            if node.op_type not in DECIDED:
                continue
            for i, name in enumerate(node.input):
                if i == 0 and node.op_type not in ("ConstantOfShape", "Range"):
                    continue
                if name in self.known and name not in self._given and (value := self._taken(node, self.known[name])) is not None:
                    settled = f"{node.output[0]}.{name}.settled" if is_open(self.known[name]).any() else f"{name}.settled"
                    if settled not in self._given:
                        self._graph.initializer.append(numpy_helper.from_array(value, settled))
                        self.known[settled] = value
                        self._given.add(settled)
                    node.input[i] = settled
                    changed = True
        return changed

    def _taken(self, node: onnx.NodeProto, value: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        """What an operator may take for a value: a Reshape copies sizes (0), and finds one by itself (-1)."""
        if not is_open(value).any():
            return value
        if node.op_type != "Reshape" or value.ndim != 1 or any(a.name == "allowzero" and a.i for a in node.attribute):
            return None
        own = self.shapes.get(node.input[0], [])[: len(value)]
        copied = (value < OPEN) & (value == np.array([*own, *[0] * (len(value) - len(own))]))
        found = np.where(copied, 0, np.where(is_open(value), -1, value))
        return found if (found == -1).sum() <= 1 and (copied | (value != 0)).all() else None


def is_open(value: npt.NDArray[Any] | int) -> npt.NDArray[np.bool_]:
    return np.asarray(value) <= OPEN


def _value(node: onnx.NodeProto, attributes: dict[str, Any], known: Ints, shapes: dict[str, Any]) -> npt.NDArray[Any] | None:
    if node.op_type == "Constant":
        if "value" in attributes:
            return numpy_helper.to_array(attributes["value"])
        given = attributes.get("value_ints", attributes.get("value_int"))
        return None if given is None else np.array(given, np.int64)
    if node.op_type == "Shape":
        return np.array(shapes[node.input[0]][attributes.get("start") : attributes.get("end")], np.int64)
    run = OPERATORS.get(node.op_type)
    if run is None:
        return None
    inputs = [known[name] for name in node.input if name]
    if any(is_open(each).any() for each in (inputs if node.op_type in ARITHMETIC else inputs[1:] if node.op_type != "Concat" else ())):
        raise KeyError(node.name)
    return np.asarray(run(inputs, attributes))


def _axes(inputs: list[npt.NDArray[Any]], attributes: dict[str, Any]) -> tuple[int, ...] | None:
    if "axes" in attributes:
        return tuple(attributes["axes"])
    return tuple(int(n) for n in inputs[1]) if len(inputs) > 1 else None


def _slice(inputs: list[npt.NDArray[Any]], attributes: dict[str, Any]) -> npt.NDArray[Any]:
    """Of a vector, with the bounds as inputs."""
    start, end = int(inputs[1][0]), int(inputs[2][0])
    step = int(inputs[4][0]) if len(inputs) > 4 else 1
    if inputs[0].ndim != 1 or step < 1:
        raise ValueError
    return inputs[0][start:end:step]


OPERATORS: dict[str, Callable[[list[npt.NDArray[Any]], dict[str, Any]], Any]] = {
    "Identity": lambda x, a: x[0],
    "Cast": lambda x, a: x[0].astype(INTEGERS[a["to"]]),
    "Squeeze": lambda x, a: np.squeeze(x[0], _axes(x, a)),
    "Unsqueeze": lambda x, a: np.expand_dims(x[0], _axes(x, a) or ()),
    "Reshape": lambda x, a: x[0].reshape([int(n) for n in x[1]]),
    "Concat": lambda x, a: np.concatenate(x, a["axis"]),
    "Gather": lambda x, a: np.take(x[0], x[1], a.get("axis", 0)),
    "Slice": _slice,
    "Add": lambda x, a: x[0] + x[1],
    "Sub": lambda x, a: x[0] - x[1],
    "Mul": lambda x, a: x[0] * x[1],
    "Div": lambda x, a: np.trunc(x[0] / x[1]).astype(x[0].dtype),
    "Min": lambda x, a: np.minimum.reduce(x),
    "Max": lambda x, a: np.maximum.reduce(x),
}
