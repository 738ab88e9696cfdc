"""Fuse an ONNX model: lower, plan, write."""

from __future__ import annotations

import onnx_ir as ir

from ...fold import Outcome, fold
from ...report import Counts, FuseReport, Layer
from .lower import lower
from .walk import batchnorms
from .write import inlined, stored_bytes, write


def fuse(model: ir.Model, *, clone: bool = False) -> tuple[ir.Model, FuseReport]:
    """A folded copy of the model, and what became of each BatchNorm. Where nothing folds, an unchanged copy."""
    fused = inlined(model)
    before = batchnorms(fused)
    graph = lower(fused)
    affine = {node: node for site in graph.sites for node in site.nodes}
    outcomes = fold(graph)
    folded = [o for o in outcomes if o.folded]
    notes = {}
    if folded:
        left = set(graph.nodes)
        notes = write(fused, graph, [node for node in affine if node not in left])
    else:
        fused = model.clone()
    layers = tuple(_layer(o, notes) for o in outcomes if o.site.is_batchnorm or o.folded)
    report = FuseReport(
        batchnorms=Counts(before, batchnorms(fused)),
        layers=layers,
        bytes_added=max(0, stored_bytes(fused) - stored_bytes(model)),
    )
    return fused, report


def _layer(outcome: Outcome, notes: dict) -> Layer:
    site = outcome.site
    said = [notes[node] for node in outcome.into if node in notes]
    if dead := site.nodes[0].attrs.get("dead"):
        said.append(f"{dead} of its {site.channels} channels are dead (gamma is 0)")
    if len(site.nodes) > 1:
        said.append(f"called {len(site.nodes)} times")
    if not site.is_batchnorm:
        said.append(f"a constant {site.nodes[0].label}, not a BatchNorm")
    into = tuple(dict.fromkeys(node.name for node in outcome.into))
    return Layer(site.name, site.channels, "folded" if outcome.folded else "kept", into, "" if outcome.folded else outcome.reason, tuple(said))
