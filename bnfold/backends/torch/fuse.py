"""Fuse a PyTorch model: lower, plan, write."""

from __future__ import annotations

from torch import nn
from torch.export import ExportedProgram

from ...graph import Node
from ...merge import always
from ...plan import plan
from ...report import FuseReport
from .lower import Lowering
from .removal import may_merge, removals
from .trace import Traced, duplicate
from .write_module import write_module
from .write_program import copy_program, write_program


def fuse(traced: Traced, *, clone: bool = False) -> tuple[nn.Module | ExportedProgram, FuseReport]:
    """A folded copy of the model, and what became of each BatchNorm. Where nothing folds, an unchanged copy.

    clone: an operator that something else reads too may be doubled; a module's code can't be, so there it changes nothing.
    """
    ctx = Lowering(traced)
    graph = ctx.graph()
    module = None if isinstance(traced.model, ExportedProgram) else traced.model
    ways = {} if module is None else removals(ctx, graph.sites)
    planned = plan(graph, clone=clone and module is None, may=always if module is None else may_merge(ctx, ways))
    notes: dict[Node, str] = {}
    added = 0
    if not planned.changes:
        fused: nn.Module | ExportedProgram = copy_program(traced.program) if module is None else duplicate(module)
    elif module is None:
        fused, notes, added = write_program(ctx, graph, planned.removed, planned.merges)
    else:
        way_of = {node: (site, way) for site, way in ways.items() for node in site.nodes}  # a site that folds at last is another object
        folded = dict(way_of[site.nodes[0]] for site in planned.folded_sites if site.nodes[0] in way_of)
        fused, notes, added = write_module(ctx, module, graph, folded, planned.merges)
    return fused, planned.report(notes, bytes_added=added)
