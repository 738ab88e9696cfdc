"""Which values an ONNX model's inputs take: their types and shapes, and which integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from bnfold.backends.ranges import LONGEST, AffineRange, RangeWalk
from bnfold.data import Batch, InputSpec
from bnfold.data.spec import Range
from bnfold.errors import UnsupportedError

from .shapes import Shapes, symbolic
from .walk import attribute, axes, held_tensor, is_standard, whole

# By operator, the inputs whose numbers come out as they went in.
THROUGH: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Cast", "CastLike", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Expand", "Tile"), (0,)),
    **dict.fromkeys(("Slice", "Gather", "GatherElements", "GatherND", "Split", "Pad", "Neg", "Add", "Sub", "Mul"), (0, 1)),
    **dict.fromkeys(("Concat", "Where", "Max", "Min"), tuple(range(64))),
}
COMPARISONS = {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"}
RECURRENT = {"LSTM", "GRU", "RNN"}


def integer_ranges(model: ir.Model) -> dict[str, Range]:
    """By name, of the inputs of integers of which something is known."""
    found = {}
    for value in model.graph.inputs:
        kind = None if value.dtype is None else np.dtype(value.dtype.numpy())
        if value.name and kind is not None and kind.kind in "iu" and value.name not in model.graph.initializers:
            known = _Walk(model).follow(value)
            if known is not None:
                found[value.name] = known
    return found


class _Walk(RangeWalk[ir.Value]):
    def __init__(self, model: ir.Model) -> None:
        super().__init__()
        self._model = model

    def steps(self, value: ir.Value, as_: AffineRange) -> Iterator[tuple[ir.Value, AffineRange]]:
        for node, index in value.uses():
            if is_standard(node):
                yield from ((out, became) for became in self._step(node, index, as_) for out in node.outputs)

    def _step(self, node: ir.Node, index: int, as_: AffineRange) -> list[AffineRange]:
        """What the numbers become behind an operator; what it asks of them is noted."""
        op = node.op_type
        if (op == "Gather" and index == 1) or (op in ("GatherElements", "ScatterElements", "Scatter") and index == 1):
            self.index(as_, self._size(node, 0, whole(node, "axis", 0)), negative=True)
        elif op in ("GatherND", "ScatterND") and index == 1:
            first, sizes = whole(node, "batch_dims", 0), self._shape(node.inputs[0]) or ()
            width = (self._shape(node.inputs[1]) or (None,))[-1]
            for size in sizes[first : first + width] if isinstance(width, int) else ():
                self.index(as_, size, negative=True)
        elif op == "OneHot" and index < 2:
            depth = self._constant(node, 1)
            if index == 1:
                self.between(as_, 2, 8)
            elif depth is not None:
                self.index(as_, int(depth.ravel()[0]), negative=True)
        elif op in RECURRENT and index == 4:
            self.length(as_, self._size(node, 0, 1 if attribute(node, "layout", 0) else 0))
        elif op == "ReverseSequence" and index == 1:
            self.length(as_, self._size(node, 0, whole(node, "time_axis", 0)))
        elif op == "Slice" and index == 2:
            self.between(as_, 1, LONGEST)
        elif op == "TopK" and index == 1:
            self.length(as_, self._size(node, 0, whole(node, "axis", -1)))
        elif op == "Reshape" and index == 1:
            self.shape()
        elif (op, index) in SMALL:
            self.between(as_, *SMALL[op, index])
        elif op in COMPARISONS:
            if (other := self._constant(node, 1 - index)) is not None:
                self.compared(as_, other)
        elif op in ("Mod", "Clip") and index == 0:
            bounds = [c for i in (1, 2) if (c := self._constant(node, i)) is not None]
            self.compared(as_, np.concatenate([np.zeros(1), *(np.ravel(c) for c in bounds)]) - (op == "Mod"))
        elif index in THROUGH.get(op, ()):
            return self._through(node, index, as_)
        return []

    def _through(self, node: ir.Node, index: int, as_: AffineRange) -> list[AffineRange]:
        op = node.op_type
        if op in ("Slice", "Gather", "GatherElements", "GatherND", "Split", "Pad", "Expand", "Tile") and index:
            return []
        if op == "Cast" and attribute(node, "to") == int(ir.DataType.BOOL):
            return []
        if op == "Where" and index == 0:
            return []
        if op in ("Neg", "Add", "Sub", "Mul"):
            kind, other = ("mul", -1) if op == "Neg" else (op.lower(), self._constant(node, 1 - index))
            return self.arithmetic(kind, as_, other, first=index == 0)
        return [as_]

    def _constant(self, node: ir.Node, index: int) -> Any:
        v = node.inputs[index] if index < len(node.inputs) else None
        tensor = None if v is None else held_tensor(v)
        return None if tensor is None or (v is not None and v.is_graph_input()) else tensor.numpy()

    def _size(self, node: ir.Node, index: int, axis: int) -> int | str | None:
        shape = self._shape(node.inputs[index])
        return None if not shape or not -len(shape) <= axis < len(shape) else shape[axis]

    def _shape(self, value: ir.Value | None) -> tuple[int | str | None, ...] | None:
        if value is None:
            return None
        if (tensor := held_tensor(value)) is not None:
            return tuple(tensor.shape.numpy())
        if value.shape is not None and all(isinstance(d, int) or d.value for d in value.shape):
            return tuple(d if isinstance(d, int) else d.value for d in value.shape)
        return self._inferred.get(value.name or "")

    @cached_property
    def _inferred(self) -> dict[str, tuple[int | str | None, ...]]:
        return symbolic(self._model)


# By operator and input, small numbers that it takes for a size, a count or a shape that broadcasts.
SMALL = {
    ("Expand", 1): (1, 1),
    ("Tile", 1): (1, 2),
    ("ConstantOfShape", 0): (1, 3),
    ("Range", 1): (1, 8),
    ("Range", 2): (1, 1),
    ("Loop", 0): (1, 3),
}


def inputs(model: ir.Model, feeds: Batch | None = None) -> list[InputSpec]:
    """What the caller feeds: the graph's inputs without those that an initializer already fills, in their order.

    An input that doesn't state its rank takes that of its data in `feeds`, or else what its operators tell; where they don't, it is refused
    (UnsupportedError).
    """
    specs = []
    for value in model.graph.inputs:
        if value.name is None or value.name in model.graph.initializers:
            continue
        dtype = _numpy_dtype(value)
        given = None if feeds is None else feeds.get(value.name)
        shape = (None,) * given.ndim if value.shape is None and given is not None else _axes(value, model)
        specs.append(InputSpec(value.name, dtype, shape))
    known = integer_ranges(model) if any(spec.dtype.kind in "iu" for spec in specs) else {}
    return [replace(spec, takes=known.get(spec.name)) for spec in specs]


def _axes(value: ir.Value, model: ir.Model) -> tuple[int | str | None, ...]:
    if (stated := axes(value)) is not None:
        return stated
    if isinstance(value.type, ir.TensorType) and (probes := Shapes(model).probes(value)) is not None:
        return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*probes, strict=True))
    raise UnsupportedError(f"input {value.name!r} doesn't state its rank; write the model again with a shape for it")


def _numpy_dtype(value: ir.Value) -> np.dtype[Any]:
    if value.dtype is None or not isinstance(value.type, ir.TensorType):
        raise UnsupportedError(f"input {value.name!r} is no tensor ({value.type}); bnfold feeds tensors only")
    if value.dtype == ir.DataType.UNDEFINED:
        raise UnsupportedError(f"input {value.name!r} doesn't state its type; write the model again with one")
    return np.dtype(value.dtype.numpy())
