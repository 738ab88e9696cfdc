"""Take the BatchNorms of an exported program out of training mode: they normalise with stored statistics, and update nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node as Op

from ..export.walk import arguments, epsilon, frame, in_training, is_batchnorm, is_tensor, mutates, operator_name, set_argument
from .editor import ProgramEditor

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
