"""An exported program that is changed (its graph, its signature and what it stores, kept in step), a part of one as its own, and
its BatchNorms out of training mode.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, TensorArgument
from torch.fx import Graph as Ops
from torch.fx import GraphModule, map_arg
from torch.fx import Node as Op

from bnfold.algebra.graph import reachable
from bnfold.capture import quiet
from bnfold.errors import UnsupportedError
from bnfold.text import first_line, unused

from ..export.functional import graph_copy, with_graph
from ..export.tensors import to_tensor
from ..export.walk import arguments, epsilon, frame, function, in_training, is_batchnorm, is_tensor, mutates, operator_name, set_argument
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


# --- BatchNorms taken out of training mode: they normalise with stored statistics, and update nothing ------------------------------------


MOMENTUM = 0.1  # of an operator that no longer uses it
ITEMS = {"_native_batch_norm_legit_functional": 3, "_batch_norm_with_update_functional": 4}  # from which on come the new statistics


def frozen(program: ExportedProgram, select: Callable[[str], bool]) -> tuple[ExportedProgram, dict[str, str]]:
    """A copy of the program in which all BatchNorms in training mode that are selected are out of it, and what is to be said of each.

    One of whose further results somebody reads stays as it is.
    """
    ops = [op for op in program.graph.nodes if is_batchnorm(op) and in_training(op) and select(frame(op) or op.name)]
    ops = [op for op in ops if _is_free(op, program)]
    if not ops:
        return program, {}
    writer = _Freezer(program)
    for op in ops:
        writer.freeze(op)
    return writer.finish(), writer.notes


def _is_free(op: Op, program: ExportedProgram) -> bool:
    """Whether nobody reads what training alone gives: the batch's statistics, and the running ones but to store them."""
    if is_tensor(op):
        return True
    stored = {spec.arg.name for spec in program.graph_signature.output_specs if spec.kind == OutputKind.BUFFER_MUTATION}
    update = ITEMS.get(operator_name(op))

    def is_update(item: Op) -> bool:
        index = item.args[1]
        only = item.name in stored and all(user.op == "output" for user in item.users)
        return update is not None and isinstance(index, int) and index >= update and only

    return all(item.args[1] == 0 or not item.users or is_update(item) for item in op.users)


class _Freezer(ProgramEditor):
    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program)
        self.targets = {spec.arg.name: spec.target for spec in self.signature.input_specs if spec.target is not None}
        self.notes: dict[str, str] = {}

    def freeze(self, old: Op) -> None:
        op, given = self.copies[old], arguments(old)
        owner = frame(old)
        statistics = [given.get(name) for name in ("running_mean", "running_var")]
        if statistics[0] is None or statistics[1] is None:
            name = owner or old.name
            self.notes[name] = f"{name} had no statistics: it normalised each batch by itself"
            found = [self._statistic(f"{name}.{what}", old, fill) for what, fill in (("running_mean", 0.0), ("running_var", 1.0))]
        else:
            found = [self.copies[each] for each in statistics if each is not None]
            owner = str(self.targets[found[0].name]).rpartition(".")[0]
            name = owner or old.name
            self.notes[name] = f"{name} was in training mode, and has statistics of its own now"
        read = list(op.all_input_nodes)
        if is_tensor(op):
            for name, value in (("running_mean", found[0]), ("running_var", found[1]), ("training", False), ("momentum", MOMENTUM)):
                set_argument(op, name, value)
        else:
            self._replace(op, found)
        self._forget({str(self.targets[each.name]) for each in found} | {f"{owner}.num_batches_tracked".lstrip(".")})
        self._drop([*read, op, *op.users] if not is_tensor(op) else read)

    def _replace(self, op: Op, statistics: list[Op]) -> None:
        """An operator that gives a tuple by the one that doesn't train."""
        given = arguments(op)
        with self.graph.inserting_before(op):
            made = self.graph.call_function(
                torch.ops.aten._native_batch_norm_legit_no_training.default,
                (given["input"], given["weight"], given["bias"], *statistics, MOMENTUM, epsilon(given)),
            )
        made.meta = dict(op.meta)
        made.meta["val"] = (op.meta["val"][0], *(each.new_empty(0) for each in op.meta["val"][1:3]))
        for item in list(op.users):
            if item.args[1] == 0:
                item.replace_input_with(op, made)

    def _statistic(self, target: str, op: Op, fill: float) -> Op:
        """A new buffer for a BatchNorm that had none."""
        weight, value = arguments(op).get("weight"), arguments(op)["input"].meta["val"]
        kind = value.dtype if weight is None else weight.meta["val"].dtype
        if target in self.state or target in self.constants:
            known: Op = next(op for op in self.graph.nodes if op.op == "placeholder" and self.targets.get(op.name) == target)
            return known
        tensor = torch.full((int(value.shape[1]),), fill, dtype=kind, device=value.device)
        made = self.store(target, tensor, InputKind.BUFFER)
        self.targets[made.name] = target
        return made

    def _forget(self, targets: set[str]) -> None:
        """Let the program no longer write into these buffers."""
        specs = self.signature.output_specs
        gone = [i for i, s in enumerate(specs) if s.kind == OutputKind.BUFFER_MUTATION and s.target in targets]
        output = next(op for op in reversed(self.graph.nodes) if op.op == "output")
        given = list(output.args[0])
        dropped = [given[i] for i in gone]
        output.args = (tuple(each for i, each in enumerate(given) if i not in gone),)
        self.signature.output_specs = [s for i, s in enumerate(specs) if i not in gone]
        for op in [op for op in self.graph.nodes if op.op == "placeholder" and self.targets.get(op.name) in targets]:
            for writer in [user for user in op.users if mutates(user) and not is_batchnorm(user)]:
                writer.replace_all_uses_with(op)
                dropped.append(writer)
        self._drop([op for op in dropped if isinstance(op, Op)])

    def _drop(self, ops: list[Op]) -> None:
        """Take out what nobody reads any more."""
        stack, left = list(ops), set(self.graph.nodes)
        while stack:
            op = stack.pop()
            if op.op == "call_function" and not op.users and op in left:
                stack += op.all_input_nodes
                left.remove(op)
                self.graph.erase_node(op)
