"""Regions of an exported program: what torch.export puts into graphs of their own.

`torch.no_grad()`, `torch.autocast(...)` and checkpointing only wrap the operators that stand in them: these are written out into the graph
around, so that all else here sees one flat graph. Branches and loops (`torch.cond`, `while_loop`, `scan`, `map`) run as a whole, and stay.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.fx import GraphModule
from torch.fx import Node as Op
from torch.utils import _pytree as pytree

from .functional import entangled, functional, graph_copy, with_graph

WRAPPERS = {
    *("wrap", "wrap_with_set_grad_enabled", "wrap_with_autocast", "wrap_activation_checkpoint", "tag_activation_checkpoint"),
    *("invoke_subgraph", "strict_mode", "hints_wrapper"),
}
AUTOCAST = "bnfold_autocast"  # of an operator in a region that is under autocast: the arguments of torch.autocast
Autocast = tuple[str, torch.dtype, bool, bool]  # device, type, whether it is enabled, whether casts are cached


class Inner(NamedTuple):
    """An operator in the graph of a branch or a loop. holder: the operator of the outermost graph; outer: who stands for whom outside."""

    op: Op
    holder: Op
    outer: dict[Op, Op]


def kind_of(op: Op) -> str:
    """The name of a higher-order operator ("cond", "scan"); "" for any other."""
    return str(op.target) if op.op == "call_function" and isinstance(op.target, torch._ops.HigherOrderOperator) else ""


def under(op: Op) -> AbstractContextManager[Any]:
    """How an operator computes in its stored types: under the autocast of the region that it stood in."""
    found: Autocast | None = op.meta.get(AUTOCAST)
    return nullcontext() if found is None else torch.autocast(found[0], found[1], found[2], found[3])


def has_regions(program: ExportedProgram) -> bool:
    return any(kind_of(op) in WRAPPERS for op in program.graph.nodes)


def written_out(program: ExportedProgram, *, casts: bool) -> ExportedProgram:
    """The program with the operators of all regions that only wrap in the graph itself; the same object where there are none.

    casts: whether what autocast casts is said by operators, so that the program computes by itself what it did; else each operator
    remembers its region (see `under`).
    """
    if any(map(_is_transform, program.graph.nodes)):
        return functional(program)
    if not has_regions(program):
        return program
    flat = _flat(program)
    if any(AUTOCAST in op.meta for op in flat.graph.nodes) and (casts or entangled(flat)):
        try:
            return functional(program)
        except Exception:  # torch fails on some of its own programs; what is under autocast stays a region there
            return _flat(program, autocast=False)
    return flat


def _is_transform(op: Op) -> bool:
    """Whether an operator opens or closes a region of torch.vmap, whose operators mean nothing elsewhere."""
    return op.op == "call_function" and str(getattr(op.target, "__module__", "")).startswith("torch._functorch.")


def _writable(op: Op, autocast: bool) -> bool:
    """Whether a region only wraps. autocast: whether one counts that is under autocast."""
    return kind_of(op) in WRAPPERS and (autocast or kind_of(op) != "wrap_with_autocast" or not op.args[2])


def _flat(program: ExportedProgram, *, autocast: bool = True) -> ExportedProgram:
    module = graph_copy(program)[0]
    signature = copy.deepcopy(program.graph_signature)
    renamed: dict[str, str] = {}
    stack = [op for op in module.graph.nodes if _writable(op, autocast)]
    while stack:
        op = stack.pop()
        new, results = _inline(module, op)
        stack += [each for each in new if _writable(each, autocast)]
        renamed.update(results)
    for spec in signature.output_specs:
        if isinstance(spec.arg, TensorArgument):
            name = spec.arg.name
            while name in renamed:
                name = renamed[name]
            spec.arg = TensorArgument(name)
    module.delete_all_unused_submodules()
    module.graph.lint()
    return with_graph(program, module, signature)


def _inline(module: GraphModule, op: Op) -> tuple[list[Op], dict[str, str]]:
    """Put the operators of a region in its place. Gives them, and the new names of what it gave."""
    ((holder, body),) = bodies = _bodies(module, op)
    inside = list(body.graph.nodes)
    made = _bound(op, bodies, body)
    state: Autocast | None = op.meta.get(AUTOCAST)
    if kind_of(op) == "wrap_with_autocast":
        state = (op.args[0], op.args[1], True, op.args[3]) if op.args[2] else None  # type: ignore[assignment]
    new: list[Op] = []
    results: Any = ()
    with module.graph.inserting_before(op):
        for each in inside:
            if each.op == "placeholder":
                continue
            if each.op == "output":
                results = pytree.tree_map(lambda leaf: made.get(leaf, leaf) if isinstance(leaf, Op) else leaf, each.args[0])
                break
            made[each] = twin = module.graph.node_copy(each, lambda source: made[source])
            if each.op == "get_attr":
                twin.target = f"{holder.target}.{each.target}"
            twin.meta.pop(AUTOCAST, None)
            if state is not None:
                twin.meta[AUTOCAST] = state
            new.append(twin)
    names: dict[str, str] = {}
    if isinstance(results, (list, tuple)):
        for user in list(op.users):
            result = results[user.args[1]]  # type: ignore[index]
            user.replace_all_uses_with(result)
            names[user.name] = result.name
            module.graph.erase_node(user)
    else:
        op.replace_all_uses_with(results)
        names[op.name] = results.name
    module.graph.erase_node(op)
    if not holder.users:
        module.graph.erase_node(holder)
    return new, names


def _bodies(module: GraphModule, op: Op) -> list[tuple[Op, GraphModule]]:
    """The graphs that an operator is given, each with who fetches it."""
    found = []
    for source in op.all_input_nodes:
        if source.op == "get_attr":
            body = attrgetter(str(source.target))(module)
            if isinstance(body, GraphModule):
                found.append((source, body))
    return found


def _bound(op: Op, bodies: list[tuple[Op, GraphModule]], body: GraphModule) -> dict[Op, Any]:
    """What the inputs of an operator's graph are outside: the arguments behind the graphs, in their order, and then come settings.

    (Those of associative_scan's graph that aren't there twice are the last.)
    """
    inputs = [each for each in body.graph.nodes if each.op == "placeholder"]
    leaves = pytree.tree_leaves((op.args, op.kwargs))
    holders = {holder for holder, _ in bodies}
    given = leaves[max(i for i, leaf in enumerate(leaves) if isinstance(leaf, Op) and leaf in holders) + 1 :]
    given = [leaf for leaf in given if not isinstance(leaf, str)]  # the name of invoke_subgraph's graph
    if len(given) < len(inputs):
        inputs = inputs[len(inputs) - len(given) :]
    return dict(zip(inputs, given, strict=False))


def inner_operators(program: ExportedProgram) -> Iterator[Inner]:
    """The operators in the graphs of branches and loops, whatever the depth."""

    def walk(module: GraphModule, op: Op, holder: Op, outer: dict[Op, Any]) -> Iterator[Inner]:
        bodies = _bodies(module, op)
        for _, body in bodies:
            own = {inner: outer.get(given, given) for inner, given in _bound(op, bodies, body).items() if isinstance(given, Op)}
            for each in body.graph.nodes:
                if each.op == "call_function":
                    yield Inner(each, holder, own)
                    yield from walk(body, each, holder, own)

    for op in program.graph.nodes:
        if kind_of(op):
            yield from walk(program.graph_module, op, op, {})
