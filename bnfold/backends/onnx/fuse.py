"""Fuse an ONNX model: lower, plan, write."""

from __future__ import annotations

import onnx_ir as ir

from bnfold.algebra.graph import Node
from bnfold.folding.branches import always
from bnfold.folding.options import PLAIN, FoldOptions
from bnfold.folding.plan import Listed, kept, plan
from bnfold.report import FuseReport, Layer

from .graph.edit import inlined
from .graph.walk import batchnorms, name_of
from .lowering.table import lowering as lowering_of
from .write import write


def fuse(model: ir.Model, options: FoldOptions = PLAIN) -> tuple[ir.Model, FuseReport]:
    """A folded copy of the model, and what became of each BatchNorm. Where nothing folds, an unchanged copy."""
    fused = inlined(model)
    held = list(batchnorms(fused))
    lowering = lowering_of(fused)
    graph = lowering.graph()
    met = {node.native.node for site in graph.sites for node in site.nodes} | set(lowering.computed)
    others = kept([Listed(node, name_of(node), _channels(node), why) for node, why in held], met)
    planned = plan(graph, options, always if held else None)
    notes: dict[Node, str] = {}
    added = 0
    values = {node: (lowering.constants.get(node.outputs[0]), lowering.shapes.dtype(node.outputs[0])) for node in lowering.computed}
    if values or planned.changes:
        notes, added = write(fused, graph, planned, values, constants=lowering.constants)
    others = [*map(_computed_layer, values), *others]
    if not planned.changes and all(layer.verdict == "kept" for layer in others):
        fused = model.clone()
    return fused, planned.report(notes, bytes_added=added, others=others)


def _computed_layer(node: ir.Node) -> Layer:
    """A BatchNorm of constants alone. It stays where its value can't be told, or is an output of the model."""
    if node.graph is not None:
        return Layer(name_of(node), _channels(node), "kept", (), "it normalises constants alone, but its output can't be put in its place")
    return Layer(name_of(node), _channels(node), "folded", (), "", ("it normalises constants alone, so it was computed once",))


def _channels(node: ir.Node) -> int:
    """By the first of its parameters whose size is known; 0 where none is."""
    shapes = (v.shape for v in node.inputs[1:5] if v is not None and v.shape)
    return next((size for shape in shapes if isinstance(size := shape[0], int)), 0)
