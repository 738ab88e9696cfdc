"""What is constant in an ONNX graph, and its value in float64.

A constant is an initializer that no caller can override, a Constant node, or anything deterministic computed from constants
alone. Weights are often computed (weight normalisation, a cast, the zero bias that an exporter writes): they are evaluated with
the float64 oracle, so that what is folded is the function that the file states, not its rounding on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .shapes import Shapes
from .walk import is_standard, stored_tensor, subgraphs, whole

RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
CONTROL = {"If", "Loop", "Scan", "SequenceMap"}
MOST = 1 << 26  # numbers that a constant may be computed to, unless there are stored ones of such a size
INTEGERS = {ir.DataType.INT32, ir.DataType.INT64}
FLOATS = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE}


class Constants:
    def __init__(self, model: ir.Model, shapes: Shapes) -> None:
        self._model = model
        self._shapes = shapes
        self._known: dict[ir.Value, bool] = {}
        self._values: dict[ir.Value, npt.NDArray[Any]] = {}
        self._most = max(MOST, 4 * sum(t.size for v in model.graph.initializers.values() if (t := v.const_value) is not None))

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether the value is the same in every run, whatever the caller feeds."""
        if value is None:
            return False
        if value not in self._known:
            self._known[value] = self._decide(value)
        return self._known[value]

    def _decide(self, value: ir.Value) -> bool:
        stack = [value]  # depth first without recursion: constant chains can be long
        while stack:
            current = stack[-1]
            if current in self._known:
                stack.pop()
                continue
            node = current.producer()
            if node is None:
                overridable = current.is_graph_input() and (self._model.ir_version or 0) >= 4
                self._known[current] = current.is_initializer() and current.const_value is not None and not overridable
                continue
            if self._sizes(current) is not None:
                self._known[current] = True
                continue
            if not is_standard(node) or node.op_type in RANDOM | CONTROL or any(subgraphs(node)):
                self._known[current] = False
                continue
            needed = [v for v in value_inputs(node) if v is not None]
            unknown = [v for v in needed if v not in self._known]
            if unknown:
                stack.extend(unknown)
                continue
            same = all(self._known[v] for v in needed) and (node.op_type != "CastLike" or self._like(node) is not None)
            self._known[current] = same and self._size(current) <= self._most
        return self._known[value]

    def _sizes(self, value: ir.Value) -> npt.NDArray[Any] | None:
        """Integers made of the sizes of tensors that depend on the data, where they are the same in every run."""
        node = value.producer()
        source = node.inputs[0] if node is not None and node.op_type == "Shape" and is_standard(node) and node.inputs else None
        probes = None if node is None or source is None else self._shapes.probes(source)
        if node is not None and probes:
            part = slice(*(None if name not in node.attributes else whole(node, name, 0) for name in ("start", "end")))
            found = [shape[part] for shape in probes]
            if all(sizes == found[0] for sizes in found) and None not in found[0]:
                return np.array(found[0], np.int64)
        within = node is not None and node.graph is self._model.graph and self._shapes.dtype(value) in INTEGERS
        return self._shapes.integers.get(value.name or "") if within else None

    def _size(self, value: ir.Value) -> int:
        """How many numbers it has, as far as that is known."""
        return max((math.prod(n or 1 for n in dims) for dims in self._shapes.probes(value) or ()), default=0)

    def _like(self, node: ir.Node) -> ir.DataType | None:
        return self._shapes.dtype(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None

    def get(self, value: ir.Value | None) -> npt.NDArray[Any] | None:
        """The constant's array, floats in float64; None where the value isn't constant."""
        if value is None or not self.is_constant(value):
            return None
        stored = self.stored(value)
        if stored is not None:
            array = stored.numpy()
            return array.astype(np.float64) if stored.dtype in FLOATS else array
        if value not in self._values:
            self._values[value] = self._evaluate(value)
        return self._values[value]

    stored = staticmethod(stored_tensor)

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The type in which the constant is stored or computed."""
        stored = self.stored(value)
        return self._shapes.dtype(value) if stored is None else stored.dtype

    def _evaluate(self, value: ir.Value) -> npt.NDArray[Any]:
        from ..oracle.evaluator import Oracle

        nodes: list[ir.Node] = []
        seen: set[ir.Node] = set()
        leaves: dict[ir.Value, ir.Value] = {}

        stack = [(value, False)]  # depth first without recursion, as above; whether all that it reads is known
        while stack:
            v, known = stack.pop()
            node = v.producer()
            if node is not None and known:
                nodes.append(node)
            elif node is not None and (sizes := self._sizes(v)) is not None:
                tensor = ir.Tensor(sizes, name=v.name)
                leaves.setdefault(v, ir.Value(name=v.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape))
            elif node is None:
                leaves.setdefault(v, ir.Value(name=v.name, const_value=v.const_value, type=v.type, shape=v.shape))
            elif node not in seen:
                seen.add(node)
                stack += [(v, True), *((source, False) for source in value_inputs(node) if source is not None)]
        made: dict[ir.Value, ir.Value] = dict(leaves)
        copies = []
        for node in nodes:
            attributes = list(node.attributes.values())
            inputs = [None if v is None else made.get(v) for v in node.inputs]
            op_type = node.op_type
            if op_type == "CastLike":  # all that it takes from its second input is a type
                kind = self._like(node)
                assert kind is not None
                op_type, inputs, attributes = "Cast", inputs[:1], [ir.AttrInt64("to", int(kind))]
            copy = ir.Node("", op_type, inputs, attributes, num_outputs=len(node.outputs), name=node.name)
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.name = old.name
                made[old] = new
            copies.append(copy)
        opsets = {"": self._model.opset_imports.get("", self._model.opset_imports.get("ai.onnx", 1))}
        result = made[value]
        if result.type is None:
            kind = self._shapes.dtype(value)
            result.type = ir.TensorType(kind if kind is not None else ir.DataType.FLOAT)
        graph = ir.Graph([], [result], nodes=copies, initializers=list(leaves.values()), opset_imports=opsets, name="constant")
        oracle = Oracle(ir.Model(graph, ir_version=max(self._model.ir_version or 8, 4)), most=self._most)
        return np.asarray(next(iter(oracle.run({}).values())))


def value_inputs(node: ir.Node) -> list[ir.Value | None]:
    """The inputs whose values the node reads: CastLike takes only the type of its second."""
    return list(node.inputs[:1]) if node.op_type == "CastLike" else list(node.inputs)


def is_made(v: ir.Value, by: Callable[[ir.Node], bool]) -> bool:
    """Whether such an operator takes part in the making of a constant."""
    stack, seen = [v], {v}
    while stack:
        node = stack.pop().producer()
        if node is None or node.op_type in ("Shape", "Size"):  # which tell none of its numbers
            continue
        if by(node):
            return True
        for x in value_inputs(node):
            if x is not None and x not in seen:
                seen.add(x)
                stack.append(x)
    return False
