"""Which integers the inputs of an ONNX model take (see `bnfold.backends.ranges`): where they go, and what is done with them there."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from bnfold.backends.ranges import AffineRange, Found
from bnfold.data.spec import Range

from .shapes import symbolic
from .walk import attribute, held_tensor, is_standard, whole

# By operator, the inputs whose numbers come out as they went in.
THROUGH: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Cast", "CastLike", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Expand", "Tile"), (0,)),
    **dict.fromkeys(("Slice", "Gather", "GatherElements", "GatherND", "Split", "Pad", "Neg", "Add", "Sub", "Mul"), (0, 1)),
    **dict.fromkeys(("Concat", "Where", "Max", "Min"), tuple(range(64))),
}
COMPARISONS = {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"}
RECURRENT = {"LSTM", "GRU", "RNN"}
MOST = 10_000  # steps


def taken(model: ir.Model) -> dict[str, Range]:
    """By name, of the inputs of integers of which something is known."""
    found = {}
    for value in model.graph.inputs:
        kind = None if value.dtype is None else np.dtype(value.dtype.numpy())
        if value.name and kind is not None and kind.kind in "iu" and value.name not in model.graph.initializers:
            known = _Walk(model).follow(value)
            if known is not None:
                found[value.name] = known
    return found


class _Walk:
    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._found = Found()

    def follow(self, value: ir.Value) -> Range | None:
        stack: list[tuple[ir.Value, AffineRange]] = [(value, AffineRange())]
        seen: set[tuple[ir.Value, AffineRange]] = set()
        while stack and len(seen) < MOST:
            v, as_ = stack.pop()
            if (v, as_) in seen:
                continue
            seen.add((v, as_))
            for node, index in v.uses():
                if is_standard(node):
                    stack += [(out, became) for became in self._step(node, index, as_) for out in node.outputs]
        return self._found.range

    def _step(self, node: ir.Node, index: int, as_: AffineRange) -> list[AffineRange]:
        """What the numbers become behind an operator; what it asks of them is noted."""
        op, found = node.op_type, self._found
        if (op == "Gather" and index == 1) or (op in ("GatherElements", "ScatterElements", "Scatter") and index == 1):
            found.index(as_, self._size(node, 0, whole(node, "axis", 0)), negative=True)
        elif op in ("GatherND", "ScatterND") and index == 1:
            first, sizes = whole(node, "batch_dims", 0), self._shape(node.inputs[0]) or ()
            width = (self._shape(node.inputs[1]) or (None,))[-1]
            for size in sizes[first : first + width] if isinstance(width, int) else ():
                found.index(as_, size, negative=True)
        elif op == "OneHot" and index < 2:
            depth = self._constant(node, 1)
            if index == 1:
                found.between(as_, 2, 8)
            elif depth is not None:
                found.index(as_, int(depth.ravel()[0]), negative=True)
        elif op in RECURRENT and index == 4:
            self._length(as_, self._size(node, 0, 1 if attribute(node, "layout", 0) else 0))
        elif op == "ReverseSequence" and index == 1:
            self._length(as_, self._size(node, 0, whole(node, "time_axis", 0)))
        elif op == "Slice" and index == 2:
            found.between(as_, 1, LONGEST)
        elif op == "TopK" and index == 1:
            self._length(as_, self._size(node, 0, whole(node, "axis", -1)))
        elif op == "Reshape" and index == 1:
            found.shape()
        elif (op, index) in SMALL:
            found.between(as_, *SMALL[op, index])
        elif op in COMPARISONS:
            if (other := self._constant(node, 1 - index)) is not None:
                found.compared(as_, other)
        elif op in ("Mod", "Clip") and index == 0:
            bounds = [c for i in (1, 2) if (c := self._constant(node, i)) is not None]
            found.compared(as_, np.concatenate([np.zeros(1), *(np.ravel(c) for c in bounds)]) - (op == "Mod"))
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
        if op == "Neg":
            return [each] if (each := as_.times(-1)) is not None else []
        if op not in ("Add", "Sub", "Mul"):
            return [as_]
        other = self._constant(node, 1 - index)
        if other is None:
            return []
        if op == "Mul":
            return [each] if (each := as_.times(other)) is not None else []
        if op == "Add":
            return [as_.plus(other)]
        turned = as_ if index == 0 else as_.times(-1)
        return [] if turned is None else [turned.plus(-other if index == 0 else other)]

    def _length(self, as_: AffineRange, size: int | str | None) -> None:
        if isinstance(size, int):
            self._found.between(as_, 1, size)
        else:
            self._found.index(as_, size, negative=False, low=1)

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


LONGEST = 8
# By operator and input, small numbers that it takes for a size, a count or a shape that broadcasts.
SMALL = {
    ("Expand", 1): (1, 1),
    ("Tile", 1): (1, 2),
    ("ConstantOfShape", 0): (1, 3),
    ("Range", 1): (1, 8),
    ("Range", 2): (1, 1),
    ("Loop", 0): (1, 3),
}
