"""An exported program that is changed (its graph, its signature and what it stores, kept in step), and a part of one as its own."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Graph as Ops
from torch.fx import GraphModule, map_arg
from torch.fx import Node as Op

from bnfold.algebra.graph import reachable
from bnfold.capture import quiet
from bnfold.errors import UnsupportedError
from bnfold.text import first_line, unused

from ..export.functional import graph_copy, with_graph
from ..export.tensors import to_tensor
from ..export.walk import function
from ..runtime.interpreter import stored_tensors


class ProgramEditor:
    """copies: for each operator of the program its own copy, which may be changed. state, constants: the tensors by name; the program
    that is made shares them with the old one, but for those that either writes into."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.module, self.copies = graph_copy(program)
        self.graph = self.module.graph
        self.signature = copy.deepcopy(program.graph_signature)
        written = set(self.signature.buffers_to_mutate.values())
        self.state, self.constants = (
            {name: held.clone() if name in written and isinstance(held, Tensor) else held for name, held in each.items()}
            for each in (program.state_dict, program.constants)
        )

    def new_name(self, stem: str) -> str:
        """One that no tensor has."""
        return unused(stem, {*self.state, *self.constants})

    def store(self, target: str, tensor: Tensor, kind: InputKind = InputKind.PARAMETER) -> Op:
        """A new input of the graph, for a tensor that the program holds under this name from now on."""
        stem = ("p_" if kind == InputKind.PARAMETER else "b_") + re.sub(r"\W", "_", target)
        values = [op.meta.get("val") for op in self.graph.nodes]
        with self.graph.inserting_before(next(op for op in self.graph.nodes if op.op == "placeholder")):
            made: Op = self.graph.placeholder(unused(stem, {op.name for op in self.graph.nodes}))
        mode = next(v.fake_mode for v in values if isinstance(v, Tensor) and hasattr(v, "fake_mode"))
        made.meta |= {"val": mode.from_tensor(tensor.detach(), static_shapes=True), "tensor_meta": {}}
        order = [op.name for op in self.graph.nodes if op.op == "placeholder"]
        spec = InputSpec(kind, TensorArgument(made.name), target, True if kind == InputKind.BUFFER else None)
        self.signature.input_specs.insert(order.index(made.name), spec)
        self.state[target] = tensor
        return made

    def work_out_sizes(self, changed: set[Op]) -> None:
        """Those that some operators give, and all behind them, from those of what they read."""
        for op in self.graph.nodes:
            reads = op in changed or not changed.isdisjoint(op.all_input_nodes)
            if reads and op.op == "call_function" and isinstance(op.meta.get("val"), (Tensor, list, tuple)):
                args, kwargs = map_arg((op.args, op.kwargs), lambda source: source.meta["val"])
                op.meta["val"] = function(op)(*args, **kwargs)
                changed.add(op)

    def finish(self) -> ExportedProgram:
        self.graph.lint()
        return with_graph(self.program, self.module, self.signature, state_dict=self.state, constants=self.constants)


def boundary(program: ExportedProgram, output: str, stops: Collection[str]) -> list[str]:
    """Those of some values that another is computed from without others of them between."""
    start = [op for op in program.graph.nodes if op.name == output]
    inside = reachable(start, lambda op: (source for source in op.all_input_nodes if source.name not in stops))
    return list(dict.fromkeys(source.name for op in inside for source in op.all_input_nodes if source.name in stops))


def extract(program: ExportedProgram, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> bytes:
    """What computes some values from others, as the content of a .pt2 file. Raises UnsupportedError where more goes into them."""
    by_name = {op.name: op for op in program.graph.nodes}
    stored, root, ops, made = stored_tensors(program), nn.Module(), Ops(), dict[Op, Op]()
    for name in inputs:
        made[by_name[name]] = ops.placeholder(name)
    given = set(made)
    wanted = reachable((by_name[name] for name in outputs), lambda op: () if op in given else op.all_input_nodes).keys() - given
    for op in (op for op in program.graph.nodes if op in wanted):
        if op.op in ("placeholder", "get_attr"):
            tensor = stored.get(op.name) if op.op == "placeholder" else attrgetter(str(op.target))(program.graph_module)
            if not isinstance(tensor, Tensor):
                raise UnsupportedError(f"value {op.name!r} of the model comes from outside the part")
            root.register_buffer(op.name, tensor.detach().cpu().clone())
            made[op] = ops.get_attr(op.name)
        else:
            made[op] = ops.node_copy(op, lambda source: made[source])
    ops.output(tuple(made[by_name[name]] for name in outputs))
    module = GraphModule(root, ops)
    file = io.BytesIO()
    with quiet(), torch.no_grad():
        try:
            program = torch.export.export(module, tuple(to_tensor(a.copy()) for a in inputs.values()), strict=False)
            torch.export.save(program, file)
        except Exception as error:  # torch.export raises what it likes
            raise UnsupportedError(f"torch.export can't write the part: {first_line(error)}") from None
    return file.getvalue()
