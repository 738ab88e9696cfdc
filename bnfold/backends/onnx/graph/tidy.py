"""Sizes that a graph works out although they are the same in every run become constants; copies go, and reshapes that undo others.

An exporter writes how the sizes that a Reshape gives come about (Shape, Gather, Div, Concat), and where the batch is open a runtime works
them out in every run. A size is known here where ONNX's inference finds it with every open axis left open: then it holds whatever a caller
feeds. A Reshape copies sizes and finds one by itself, so that its batch may stay open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .integers import Ints
from .shapes import fixes, proven
from .walk import is_standard

Initializer = Callable[[str, ir.TensorProtocol], ir.Value]
Uses = tuple[tuple[ir.Node, int], ...]  # who reads a value, and as which of its inputs
RESHAPING = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}
TAKERS = {"Reshape", "Expand", "Slice", "Tile", "Resize", "Pad", "ConstantOfShape", "Split"}  # of sizes


def tidy(model: ir.Model, initializer: Initializer) -> None:
    """Let readers of such sizes read constants, and those of copies, and of what was reshaped back, the value itself. Nodes that nobody
    reads any more are left.

    initializer: makes one, whose name is like the one given.
    """
    nodes = [node for node in model.graph if is_standard(node)]
    for node in (node for node in nodes if node.op_type == "Identity"):
        _pass_over(node, node.inputs[0])
    computes = any(_is_computed(v) for node in nodes if node.op_type in TAKERS for v in node.inputs[node.op_type != "ConstantOfShape" :])
    if not computes and not any(_reshaped(node.inputs[0]) for node in nodes if node.op_type in RESHAPING and node.inputs):
        return
    known, targets, shapes = proven(model)
    for node in (node for node in nodes if node.op_type in RESHAPING and node.inputs):
        dims, source = shapes.get(node.outputs[0].name or "", (None, None)), _reshaped(node.outputs[0])
        while source is not None and fixes(dims):
            if shapes.get(source.name or "") == dims:
                _pass_over(node, source)
                break
            source = _reshaped(source)
    made: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
    for value, array, uses in _constants(nodes, known, targets):
        key = (array.dtype.str, array.shape, array.tobytes())
        for node, i in uses:
            if key not in made:
                made[key] = initializer(value.name or "sizes", ir.Tensor(array))
            node.replace_input_with(i, made[key])


def _pass_over(node: ir.Node, source: ir.Value | None) -> None:
    """Let all who read a node's output read another value, unless it is one of the model's."""
    if source is not None and not node.outputs[0].is_graph_output():
        ir.convenience.replace_all_uses_with(node.outputs[0], source)


def _reshaped(v: ir.Value | None) -> ir.Value | None:
    """What a value is in another shape; None where it is of its own."""
    node = None if v is None else v.producer()
    return node.inputs[0] if node is not None and node.op_type in RESHAPING and is_standard(node) and node.inputs else None


def _constants(nodes: list[ir.Node], known: Ints, targets: Ints) -> Iterator[tuple[ir.Value, npt.NDArray[np.integer], Uses]]:
    """Values that nodes compute, what is known of them, and for whom."""
    for node in nodes:
        v = node.inputs[1] if node.op_type == "Reshape" and len(node.inputs) > 1 else None
        if v is not None and _is_computed(v) and (target := targets.get(node.outputs[0].name or "")) is not None:
            yield v, target, ((node, 1),)
    for v in (v for node in nodes for v in node.outputs if _is_computed(v)):
        if (array := known.get(v.name or "")) is not None:
            others = (use for use in v.uses() if any(made.name not in known for made in use[0].outputs))
            yield v, array, tuple(others)


def _is_computed(v: ir.Value | None) -> bool:
    return v is not None and (node := v.producer()) is not None and node.op_type != "Constant"
