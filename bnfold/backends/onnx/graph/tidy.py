"""Sizes that a graph works out although they are the same in every run become constants, and copies of values go.

An exporter writes how the sizes that a Reshape gives come about (Shape, Gather, Div, Concat), and where the batch is open a runtime works
them out in every run. A size is known here where ONNX's inference finds it with every open axis left open: then it holds whatever a caller
feeds. A Reshape copies sizes and finds one by itself, so that its batch may stay open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .shapes import proven
from .walk import is_standard

Initializer = Callable[[str, ir.TensorProtocol], ir.Value]
Uses = tuple[tuple[ir.Node, int], ...]  # who reads a value, and as which of its inputs
TAKERS = {"Reshape", "Expand", "Slice", "Tile", "Resize", "Pad", "ConstantOfShape", "Split"}  # of sizes


def tidy(model: ir.Model, initializer: Initializer) -> None:
    """Let readers of such sizes, and of copies, read constants, and what was copied. Nodes that nobody reads any more are left.

    initializer: makes one, whose name is like the one given.
    """
    for node in model.graph:
        if node.op_type == "Identity" and is_standard(node) and node.inputs[0] is not None and not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
    made: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
    for value, array, uses in _constants(model):
        key = (array.dtype.str, array.shape, array.tobytes())
        for node, i in uses:
            if key not in made:
                made[key] = initializer(value.name or "sizes", ir.Tensor(array))
            node.replace_input_with(i, made[key])


def _constants(model: ir.Model) -> Iterator[tuple[ir.Value, npt.NDArray[np.integer], Uses]]:
    """Values that nodes compute, what is known of them, and for whom."""
    nodes = list(model.graph)
    if not any(_is_computed(v) for node in nodes if node.op_type in TAKERS for v in node.inputs[node.op_type != "ConstantOfShape" :]):
        return
    known, targets = proven(model)
    for node in nodes:
        v = node.inputs[1] if node.op_type == "Reshape" and is_standard(node) else None
        if v is not None and _is_computed(v) and (target := targets.get(node.outputs[0].name or "")) is not None:
            yield v, target, ((node, 1),)
    for v in (v for node in nodes for v in node.outputs if _is_computed(v)):
        if (array := known.get(v.name or "")) is not None:
            others = (use for use in v.uses() if any(made.name not in known for made in use[0].outputs))
            yield v, array, tuple(others)


def _is_computed(v: ir.Value | None) -> bool:
    return v is not None and (node := v.producer()) is not None and node.op_type != "Constant"
