"""A PyTorch graph, run one operator at a time: in float64, or in its stored types."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph as Ops
from torch.fx import Node as Op

from bnfold.errors import UnsupportedError

from ..export.regions import under
from ..export.tensors import to_tensor
from ..export.trace import Traced
from ..export.walk import function
from .session import Oracle, Session

if TYPE_CHECKING:
    from bnfold.data import Batch


class Exact(Oracle):
    """The float64 oracle, one operator at a time."""

    def step(self, op: Op, values: dict[Op, Any], feeds: Batch) -> None:
        if op.op == "placeholder":
            if op.name in feeds:
                values[op] = to_tensor(feeds[op.name].astype("float64") if feeds[op.name].dtype.kind in "fV" else feeds[op.name].copy())
            else:
                held = self._held.get(op.name)
                values[op] = held.clone() if isinstance(held, Tensor) else held
        elif op.op == "get_attr":
            values[op] = self.attribute(op)
        elif op.op == "call_function":
            values[op] = self._call(op, values)


class Stored:
    """The model in its stored types, one operator at a time."""

    def __init__(self, traced: Traced, *, jitter: int | None = None) -> None:
        self._program = traced.program
        self._held = held_tensors(traced.program)
        if jitter is not None:
            module = Session(traced, jitter=jitter)._module
            moved = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            for spec in traced.program.graph_signature.input_specs:
                if spec.target in moved:
                    self._held[spec.arg.name] = moved[spec.target].detach()

    def step(self, op: Op, values: dict[Op, Any], feeds: Batch) -> None:
        if op.op == "placeholder":
            held = self._held.get(op.name)
            values[op] = to_tensor(feeds[op.name].copy()) if op.name in feeds else held.clone() if isinstance(held, Tensor) else held
        elif op.op == "get_attr":
            found = attrgetter(str(op.target))(self._program.graph_module)
            values[op] = found.detach().clone() if isinstance(found, Tensor) else found
        elif op.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((op.args, op.kwargs), lambda source: values[source])
            try:
                with under(op):
                    values[op] = function(op)(*args, **kwargs)
            except Exception as error:  # operators raise what they like
                raise UnsupportedError(f"{op.target} doesn't run in the stored type: {str(error)[:200]}") from None


def held_tensors(program: ExportedProgram) -> dict[str, Any]:
    """The tensors that a program holds, by the names of their placeholders."""
    found: dict[str, Any] = {}
    for spec in program.graph_signature.input_specs:
        if spec.target is not None:
            held = program.state_dict.get(spec.target)
            held = program.constants.get(spec.target) if held is None else held
            found[spec.arg.name] = held.detach() if isinstance(held, Tensor) else held
    return found


def last_uses(graph: Ops) -> dict[Op, list[Op]]:
    """The values that nobody reads after an operator, itself included where nobody reads it."""
    found: dict[Op, list[Op]] = {}
    seen: set[Op] = set()
    for op in reversed(graph.nodes):
        for each in (op, *op.all_input_nodes):
            if each not in seen:
                seen.add(each)
                found.setdefault(op, []).append(each)
    return found
