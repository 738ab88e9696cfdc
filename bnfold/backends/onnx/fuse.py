"""Fuse an ONNX model: lower, plan, write."""

from __future__ import annotations

import onnx_ir as ir

from ...graph import Node
from ...merge import always
from ...plan import plan
from ...report import Counts, FuseReport, Layer
from .lower import Lowering
from .walk import batchnorms, name_of
from .write import inlined, write


def fuse(model: ir.Model, *, clone: bool = False) -> tuple[ir.Model, FuseReport]:
    """A folded copy of the model, and what became of each BatchNorm. Where nothing folds, an unchanged copy."""
    fused = inlined(model)
    before = batchnorms(fused)
    lowering = Lowering(fused)
    graph = lowering.graph()
    planned = plan(graph, clone=clone, may=always if before else None)
    notes: dict[Node, str] = {}
    added = 0
    values = {node: (lowering.constants.get(node.outputs[0]), lowering.shapes.dtype(node.outputs[0])) for node in lowering.computed}
    if values or planned.changes:
        notes, added = write(fused, graph, planned.removed, planned.merges, values)
    else:
        fused = model.clone()
    counts = Counts(before, batchnorms(fused))
    return fused, planned.report(notes, bytes_added=added, counts=counts, computed=map(_computed_layer, values))


def _computed_layer(node: ir.Node) -> Layer:
    channels = node.inputs[1].shape if node.inputs[1] is not None else None
    size = channels[0] if channels else 0
    count = size if isinstance(size, int) else 0
    return Layer(name_of(node), count, "folded", (), "", ("it normalises constants alone, so it was computed once",))
