"""Fuse an ONNX model: lower, plan, write."""

from __future__ import annotations

import onnx_ir as ir

from ...fold import Outcome, fold
from ...graph import Graph, Node, Site
from ...merge import Merge, merge
from ...report import Counts, FuseReport, Layer, Merged
from .lower import Lowering
from .walk import batchnorms, name_of
from .write import inlined, write


def fuse(model: ir.Model, *, clone: bool = False) -> tuple[ir.Model, FuseReport]:
    """A folded copy of the model, and what became of each BatchNorm. Where nothing folds, an unchanged copy."""
    fused = inlined(model)
    before = batchnorms(fused)
    lowering = Lowering(fused)
    graph = lowering.graph()
    affine = [node for site in graph.sites for node in site.nodes]
    outcomes = fold(graph, clone=clone)
    merges = merge(graph) if before else []
    into_host = {m.branch: m.host for m in merges if m.branch is not None}
    if merges:
        outcomes = _after_merging(graph, outcomes, into_host, clone)
    notes: dict[Node, str] = {}
    added = 0
    values = {node: (lowering.constants.get(node.outputs[0]), lowering.shapes.dtype(node.outputs[0])) for node in lowering.computed}
    if values or merges or any(o.folded for o in outcomes):
        left = set(graph.nodes)
        notes, added = write(fused, graph, [node for node in affine if node not in left and node not in into_host], merges, values)
    else:
        fused = model.clone()
    report = FuseReport(
        batchnorms=Counts(before, batchnorms(fused)),
        layers=(*map(_computed_layer, values), *(_layer(o, notes) for o in outcomes if o.site.is_batchnorm or o.folded)),
        merged=tuple(Merged(host.name, branches) for host, branches in _by_host(merges).items()),
        bytes_added=added,
    )
    return fused, report


def _after_merging(graph: Graph, outcomes: list[Outcome], into_host: dict[Node, Node], clone: bool) -> list[Outcome]:
    """The outcomes, now that some BatchNorms went into the host of their branch, and some sums that were in the way are gone."""
    found: list[Outcome] = []
    for outcome in outcomes:
        site = outcome.site
        if outcome.folded or site.refusal is not None:
            found.append(outcome)
            continue
        left = [node for node in site.nodes if node not in into_host]
        for node in (node for node in site.nodes if node in into_host):
            found.append(Outcome(Site(node.name, [node], site.channels, site.is_batchnorm, note=site.note), True, (into_host[node],)))
        if left:
            name = site.name if len(left) == len(site.nodes) else left[0].name
            graph.sites = [Site(name, left, site.channels, site.is_batchnorm, site.separable, note=site.note)]
            found += fold(graph, clone=clone)
    return found


def _by_host(merges: list[Merge]) -> dict[Node, tuple[str, ...]]:
    """For each operator that is left, the names of all branches that ended in it."""
    into: dict[Node, list[str]] = {}
    for m in merges:
        names = into.pop(m.branch, []) if m.branch is not None else []
        into.setdefault(m.host, [m.host.name]).extend([m.branch.name if m.branch is not None else "identity", *names[1:]])
    return {host: tuple(names) for host, names in into.items()}


def _computed_layer(node: ir.Node) -> Layer:
    channels = node.inputs[1].shape if node.inputs[1] is not None else None
    size = channels[0] if channels else 0
    count = size if isinstance(size, int) else 0
    return Layer(name_of(node), count, "folded", (), "", ("it normalises constants alone, so it was computed once",))


def _layer(outcome: Outcome, notes: dict[Node, str]) -> Layer:
    site = outcome.site
    said = [notes[node] for node in outcome.into if node in notes]
    if dead := site.nodes[0].attrs.get("dead"):
        said.append(f"{dead} of its {site.channels} channels are dead (gamma is 0)")
    if len(site.nodes) > 1:
        said.append(f"called {len(site.nodes)} times")
    if site.note:
        said.append(site.note)
    if outcome.note:
        said.append(outcome.note)
    if not site.is_batchnorm:
        said.append(f"a constant {site.nodes[0].label}, not a BatchNorm")
    into = tuple(dict.fromkeys(node.name for node in outcome.into))
    return Layer(
        site.name, site.channels, "folded" if outcome.folded else "kept", into, "" if outcome.folded else outcome.reason, tuple(said)
    )
