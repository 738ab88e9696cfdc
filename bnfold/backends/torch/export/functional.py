"""Exported programs without operators that write into their arguments, whose order would matter."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.export import ExportedProgram
from torch.fx import Node as Op
from torch.fx import map_arg

from bnfold.capture import quiet

from .constants import ProgramConstants
from .walk import is_float, mutates, storage_of, viewed, written


def graph_copy(program: ExportedProgram) -> tuple[torch.fx.GraphModule, dict[Op, Op]]:
    """A copy of the graph, and for each operator its own copy."""
    with quiet():
        module = copy.deepcopy(program.graph_module)
    copies = dict(zip(program.graph.nodes, module.graph.nodes, strict=True))
    for old, new in copies.items():
        new.name = old.name  # fx renames in a copy what Python has a name for, such as `input`
    module.recompile()
    return module, copies


def with_graph(program: ExportedProgram, module: torch.fx.GraphModule, signature: Any = None, **tensors: dict[str, Any]) -> ExportedProgram:
    """The same program with another graph, and the signature, state_dict and constants that go with it."""
    module.recompile()
    with quiet():
        found: ExportedProgram = program._update(module, signature or program.graph_signature, **tensors)
    return found


def functional(program: ExportedProgram) -> ExportedProgram:
    """The same program without operators that write into their arguments. Nobody may change it: while nothing of the program is another,
    it is the same object, since torch takes its time."""
    held = (*program.state_dict.values(), *program.constants.values())
    state = str(program.graph), held
    known = _known.get(program)
    if known is not None and known[0][0] == state[0] and len(held) == len(known[0][1]) and all(map(operator.is_, held, known[0][1])):
        return known[1]
    with quiet():
        found: ExportedProgram = program.run_decompositions({})
    _known[program] = state, found
    return found


_known: WeakKeyDictionary[ExportedProgram, tuple[tuple[str, tuple[Any, ...]], ExportedProgram]] = WeakKeyDictionary()


def entangled(program: ExportedProgram) -> bool:
    """Whether a tensor is read under another name after its storage was written to: then the data flow isn't the graph's edges."""
    if not any(mutates(op) for op in program.graph.nodes):
        return False
    root: dict[Op, Op] = {}
    place = {op: i for i, op in enumerate(program.graph.nodes)}
    members: dict[Op, list[Op]] = {}
    for op in program.graph.nodes:
        source = viewed(op)
        root[op] = root[source] if source is not None else op
        members.setdefault(root[op], []).append(op)
    for op in program.graph.nodes:
        for target in written(op) if mutates(op) else ():
            if root[target].op == "placeholder" and is_float(target):
                return True
            for other in members[root[target]]:
                if other is target or place[other] >= place[op]:
                    continue
                if any(place[user] > place[op] for user in other.users):
                    return True
    return False


def without_writing(program: ExportedProgram) -> ExportedProgram:
    """The same program with `relu` for `relu_`: who reads a tensor after it was written to reads what was written.

    By renaming where the data flow shows all readers, which costs nothing; else by torch's own functionalisation.
    """
    if not any(mutates(op) for op in program.graph.nodes):
        return program
    if entangled(program):
        return functional(program)
    module, copies = graph_copy(program)
    writers = [op for op in copies.values() if mutates(op)]
    if any(_functional(op) is None for op in writers):
        return functional(program)
    for op in writers:
        _rewrite(op)
    return with_graph(program, module)


def settled(program: ExportedProgram) -> ExportedProgram:
    """The same program without writing into what is computed from its weights alone, such as `(variance + epsilon).rsqrt_()`.

    So that these are constants too. What somebody writes into a stored tensor stays: the next call reads it.
    """
    if not any(mutates(op) for op in program.graph.nodes) or entangled(program):
        return program
    module: torch.fx.GraphModule | None = None
    found = program
    while ops := list(_on_constants(found)):
        if module is None:
            module, copies = graph_copy(program)
            ops = [copies[op] for op in ops]
        for op in ops:
            _rewrite(op)
        found = with_graph(program, module)
    return found


def with_known_sizes(program: ExportedProgram) -> ExportedProgram:
    """The same program with numbers for the sizes that the trace has fixed, though it computes them."""
    known = {op: number for op in program.graph.nodes if op.op == "call_function" and (number := _fixed(op.meta.get("val"))) is not None}
    if not any(op.users for op in known):
        return program
    module, copies = graph_copy(program)
    numbers = {copies[op]: number for op, number in known.items()}
    for op in module.graph.nodes:
        if not numbers.keys().isdisjoint(op.all_input_nodes) and op not in numbers:
            op.args, op.kwargs = map_arg((op.args, op.kwargs), lambda each: numbers.get(each, each))
    return with_graph(program, module)


def _fixed(size: Any) -> int | None:
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size.node.expr)
    return size if type(size) is int else None


def _on_constants(program: ExportedProgram) -> Iterator[Op]:
    """The operators that write into what is computed from weights alone, by what is too."""
    constants = ProgramConstants(program, written_to=False)
    for op in program.graph.nodes:
        if not mutates(op) or not all(map(constants.is_constant, op.all_input_nodes)) or _functional(op) is None:
            continue
        root = storage_of(op.args[0])
        if constants.stored(root) is None and root.op == "call_function":
            yield op


def _rewrite(op: Op) -> None:
    """Let an operator that writes into its first argument give a new tensor, which all behind it read."""
    other = _functional(op)
    assert other is not None
    behind = set(itertools.takewhile(lambda each: each is not op, reversed(op.graph.nodes)))
    target = op.args[0]
    assert isinstance(target, Op)
    target.replace_all_uses_with(op, delete_user_cb=behind.__contains__)
    op.target = other


def _functional(op: Op) -> torch._ops.OpOverload | None:
    """The form of an operator that writes into its first argument, and nowhere else, that gives a new tensor."""
    target = op.target
    assert isinstance(target, torch._ops.OpOverload)
    if written(op) != [op.args[0]]:
        return None
    packet = getattr(torch.ops.aten, target._schema.name.partition("::")[2].removesuffix("_"), None)
    forms = (
        [] if packet is None else [getattr(packet, name) for name in (target._overloadname, *packet.overloads()) if hasattr(packet, name)]
    )
    taken = [(a.name, str(a.type)) for a in target._schema.arguments]  # pow.Scalar takes other arguments than pow_.Scalar
    return next((form for form in forms if [(a.name, str(a.type)) for a in form._schema.arguments] == taken), None)
