"""Sequences of tensors, followed from where they are made to where their parts are taken out.

torch.export writes a chunk as SplitToSequence with one SequenceAt for each part. A part is a cut of a tensor, so to the rules each
SequenceAt is a move of that tensor, and the sequence itself is nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from .constants import Constants
from .shapes import Shapes
from .walk import all_nodes, attribute, is_standard, whole

MAKERS = {"SplitToSequence", "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "Identity"}
OPENERS = {"SequenceAt", "ConcatFromSequence"}
PARTS = "bnfold.parts"  # in a node's meta


@dataclass(frozen=True)
class Element:
    """A tensor of a sequence: input `index` of the node that put it there, cut along an axis from `start` to `stop` where it is split."""

    node: ir.Node
    index: int
    axis: int = 0
    start: int | None = None
    stop: int | None = None
    drops: bool = False  # whether the axis, then of size 1, goes

    @property
    def source(self) -> ir.Value:
        value = self.node.inputs[self.index]
        assert value is not None
        return value

    def cut(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self.start is None:
            return x
        if self.drops:
            dropped: npt.NDArray[Any] = np.take(x, self.start, self.axis)
            return dropped
        where = [slice(None)] * x.ndim
        where[self.axis] = slice(self.start, self.stop)
        return x[tuple(where)]


@dataclass(frozen=True)
class Sequence:
    """parts: None where their number isn't known; then each is `size` long along an axis of one tensor."""

    parts: tuple[Element, ...] | None
    split: Element | None = None
    size: int = 0

    def at(self, position: int) -> Element | None:
        if self.parts is not None:
            return self.parts[position] if -len(self.parts) <= position < len(self.parts) else None
        if self.split is None or position < 0:
            return None
        start = position * self.size
        return Element(self.split.node, 0, self.split.axis, start, start + self.size, self.split.drops)


class Sequences:
    """What every sequence of a model is made of, and which parts an operator takes out of it."""

    def __init__(self, model: ir.Model, constants: Constants, shapes: Shapes) -> None:
        self._constants, self._shapes = constants, shapes
        self._known: dict[ir.Value, Sequence] = {}
        self._opened: dict[ir.Node, tuple[Element, ...]] = {}
        self._followed: set[ir.Node] = set()
        nodes = [n for n in all_nodes(model.graph) if is_standard(n) and n.op_type in MAKERS | OPENERS and n.outputs]
        for node in nodes:
            if node.op_type in OPENERS:
                if (parts := self._open(node)) is not None:
                    self._opened[node] = parts
            elif (made := self._make(node)) is not None:
                self._known[node.outputs[0]] = made
        for node in reversed(nodes):
            if node.outputs[0] in self._known and not node.outputs[0].is_graph_output():
                users = [user for user, _ in node.outputs[0].uses()]
                if all(user in self._opened or user in self._followed or user.op_type == "SequenceLength" for user in users):
                    self._followed.add(node)

    def follows(self, node: ir.Node) -> bool:
        """Whether all that is done with the sequence that a node makes is taking its parts out again."""
        return node in self._followed

    def makes(self, node: ir.Node) -> bool:
        return bool(node.outputs) and node.outputs[0] in self._known

    def parts(self, node: ir.Node) -> tuple[Element, ...] | None:
        """What a SequenceAt or a ConcatFromSequence takes."""
        return self._opened.get(node)

    def note(self) -> None:
        """Tell each operator that takes parts which ones (see `parts_of`)."""
        for node, parts in self._opened.items():
            node.meta[PARTS] = parts

    @property
    def taken(self) -> dict[str, tuple[Element, ...]]:
        """The parts that are taken, by the value that they make."""
        return {node.outputs[0].name or "": parts for node, parts in self._opened.items()}

    def _sequence(self, value: ir.Value | None) -> Sequence | None:
        return None if value is None else self._known.get(value)

    def _integer(self, node: ir.Node, index: int) -> int | None:
        array = self._constants.get(node.inputs[index]) if index < len(node.inputs) else None
        return int(array.ravel()[0]) if array is not None and array.size == 1 else None

    def _open(self, node: ir.Node) -> tuple[Element, ...] | None:
        sequence = self._sequence(node.inputs[0])
        if sequence is None:
            return None
        if node.op_type == "ConcatFromSequence":
            return sequence.parts or None
        position = self._integer(node, 1)
        part = None if position is None else sequence.at(position)
        return None if part is None else (part,)

    def _make(self, node: ir.Node) -> Sequence | None:
        if node.op_type == "SplitToSequence":
            return self._split(node)
        if node.op_type == "SequenceConstruct":
            return Sequence(tuple(Element(node, i) for i in range(len(node.inputs))))
        if node.op_type == "SequenceEmpty":
            return Sequence(())
        before = self._sequence(node.inputs[0])
        if before is None or node.op_type == "Identity":
            return before
        if before.parts is None:
            return None
        parts, index = list(before.parts), 2 if node.op_type == "SequenceInsert" else 1
        given = index < len(node.inputs) and node.inputs[index] is not None
        position = self._integer(node, index) if given else len(parts) if node.op_type == "SequenceInsert" else -1
        if position is None or not -len(parts) <= position <= len(parts):
            return None
        if node.op_type == "SequenceInsert":
            parts.insert(position, Element(node, 1))
        elif position < len(parts):
            del parts[position]
        return Sequence(tuple(parts))

    def _split(self, node: ir.Node) -> Sequence | None:
        source = node.inputs[0]
        sizes = None if source is None else self._shapes.probes(source)
        axis = whole(node, "axis", 0)
        long = {dims[axis] for dims in sizes or () if -len(dims) <= axis < len(dims)}
        size = long.pop() if len(long) == 1 else None
        if len(node.inputs) < 2 or node.inputs[1] is None:
            each, drops = 1, not attribute(node, "keepdims", 1)
        else:
            split, drops = self._constants.get(node.inputs[1]), False
            if split is None or split.ndim > 1 or (split <= 0).any() or not split.size:
                return None
            if split.ndim:
                ends = np.cumsum(split).tolist()
                return Sequence(tuple(Element(node, 0, axis, end - n, end) for end, n in zip(ends, split.tolist(), strict=True)))
            each = int(split)
        if size is None:
            return Sequence(None, Element(node, 0, axis, drops=drops), each)
        return Sequence(tuple(Element(node, 0, axis, at, min(at + each, size), drops) for at in range(0, size, each)))


def parts_of(node: ir.Node) -> tuple[Element, ...]:
    """The parts that an operator was told to take; none for all others."""
    parts: tuple[Element, ...] = node.meta.get(PARTS, ())
    return parts


def without_sequences(graph: onnx.GraphProto, taken: Mapping[str, tuple[Element, ...]], opset: int) -> None:
    """Write the taking of parts with Slice, Gather, Unsqueeze and Concat, whose shapes ONNX's inference knows."""
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        found = taken.get(node.output[0]) if node.op_type in OPENERS and node.output else None
        if found is None:
            graph.node.append(node)
            continue
        if node.op_type == "SequenceAt":
            graph.node.append(_cut(graph, found[0], node.output[0]))
            continue
        settings = {a.name: a.i for a in node.attribute}
        names = [f"{node.output[0]}:part{i}" for i in range(len(found))]
        graph.node.extend(_cut(graph, part, name) for name, part in zip(names, found, strict=True))
        if settings.get("new_axis", 0):
            where = f"{node.output[0]}:axis"
            graph.initializer.append(numpy_helper.from_array(np.array([settings["axis"]]), where))
            old: dict[str, Any] = {"axes": [settings["axis"]]} if opset < 13 else {}
            thin = [helper.make_node("Unsqueeze", [name, where][: 1 if old else 2], [f"{name}:thin"], **old) for name in names]
            graph.node.extend(thin)
            names = [each.output[0] for each in thin]
        graph.node.append(helper.make_node("Concat", names, [node.output[0]], axis=settings["axis"]))


def _cut(graph: onnx.GraphProto, part: Element, name: str) -> onnx.NodeProto:
    source = part.source.name or ""
    if part.start is None:
        return helper.make_node("Identity", [source], [name])
    if part.drops:
        graph.initializer.append(numpy_helper.from_array(np.array(part.start), f"{name}:place"))
        return helper.make_node("Gather", [source, f"{name}:place"], [name], axis=part.axis)
    numbers = {"start": part.start, "stop": part.stop, "axis": part.axis}
    graph.initializer.extend(numpy_helper.from_array(np.array([n]), f"{name}:{key}") for key, n in numbers.items())
    return helper.make_node("Slice", [source, *(f"{name}:{key}" for key in numbers)], [name])
