"""An exported program that is changed: its graph, its signature and what it stores, kept in step."""

from __future__ import annotations

import copy
import re

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node as Op

from bnfold.text import unused

from ..export.functional import graph_copy, with_graph


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

    def finish(self) -> ExportedProgram:
        self.graph.lint()
        return with_graph(self.program, self.module, self.signature, state_dict=self.state, constants=self.constants)
