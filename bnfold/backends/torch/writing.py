"""Exported programs without operators that write into their arguments, whose order would matter."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Node as Op

from .lower import entangled, functional
from .trace import quiet
from .walk import mutates, written
from .write_program import graph_copy


def without_writing(program: ExportedProgram) -> ExportedProgram:
    """The same program with `relu` for `relu_`: who reads a tensor after it was written to reads what was written.

    By renaming where the data flow shows all readers, which costs nothing; else by torch's own functionalisation.
    """
    if not any(mutates(op) for op in program.graph.nodes):
        return program
    if entangled(program):
        return functional(program)
    module, copies = graph_copy(program)
    place = {op: i for i, op in enumerate(module.graph.nodes)}
    for op in copies.values():
        if not mutates(op):
            continue
        other = _functional(op)
        if other is None:
            return functional(program)
        for target in written(op):
            at = place[op]
            target.replace_all_uses_with(op, delete_user_cb=lambda user, at=at: place[user] > at)  # type: ignore[misc]
        op.target = other
    module.recompile()
    with quiet():
        found: ExportedProgram = program._update(module, program.graph_signature)
    return found


def _functional(op: Op) -> torch._ops.OpOverload | None:
    """The form of an operator that writes into its first argument, and nowhere else, that gives a new tensor."""
    target = op.target
    assert isinstance(target, torch._ops.OpOverload)
    if written(op) != [op.args[0]]:
        return None
    packet = getattr(torch.ops.aten, target._schema.name.partition("::")[2].removesuffix("_"), None)
    found: torch._ops.OpOverload | None = getattr(packet, target._overloadname, None)
    return found
