"""Fuse a PyTorch model: lower, plan, write."""

from __future__ import annotations

from torch import nn
from torch.export import ExportedProgram

from ...census import kept
from ...graph import Node
from ...merge import always
from ...plan import plan
from ...report import FuseReport
from .census import computed, held, of_constants, operators
from .lower import Lowering
from .regions import has_regions
from .removal import may_merge, removals
from .trace import Traced, duplicate
from .write_module import write_module
from .write_program import copy_program, write_program

WRITTEN_OUT = "the program's regions (torch.no_grad(), torch.autocast, checkpoints) are written out: it computes the same without them"


def fuse(traced: Traced, *, clone: bool = False) -> tuple[nn.Module | ExportedProgram, FuseReport]:
    """A folded copy of the model, and what became of each BatchNorm. Where nothing folds, an unchanged copy.

    clone: an operator that something else reads too may be doubled; a module's code can't be, so there it changes nothing.
    """
    ctx = Lowering(traced)
    graph = ctx.graph()
    met = operators(site for site in graph.sites if site.is_batchnorm)
    others = kept(held(ctx, met), met)
    module = None if isinstance(traced.model, ExportedProgram) else traced.model
    ways = {} if module is None else removals(ctx, graph.sites)
    planned = plan(graph, clone=clone and module is None, may=always if module is None else may_merge(ctx, ways))
    notes: dict[Node, str] = {}
    said: tuple[str, ...] = ()
    added = 0
    fused: nn.Module | ExportedProgram
    if isinstance(traced.model, ExportedProgram):
        constants = of_constants(ctx)
        others = [*map(computed, constants), *others]
        if planned.changes or constants:
            fused, notes, added = write_program(ctx, graph, planned.removed, planned.merges, constants)
            said = (WRITTEN_OUT,) * has_regions(traced.model)
        else:
            fused = copy_program(traced.model)
    elif planned.changes:
        way_of = {node: (site, way) for site, way in ways.items() for node in site.nodes}  # a site that folds at last is another object
        folded = dict(way_of[site.nodes[0]] for site in planned.folded_sites if site.nodes[0] in way_of)
        fused, notes, added = write_module(ctx, traced.model, graph, folded, planned.merges)
    else:
        fused = duplicate(traced.model)
    return fused, planned.report(notes, bytes_added=added, others=others, said=said)
