"""Write a plan into a copy of an exported program: new parameters, operators taken out, everything else untouched."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.fx import Node as Op

from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Graph, Node
from bnfold.algebra.rounding import lost, rounded, too_small
from bnfold.folding.feasible import multiplied, rescaled, said_of_integers
from bnfold.folding.lower import Written
from bnfold.folding.plan import Planned
from bnfold.text import Notes

from ..export.constants import KINDS
from ..export.tensors import NUMPY, laid_out, to_tensor
from ..export.walk import arguments, mutates, operator_name, set_argument, writes_into_shared
from ..lowering.lowering import TorchLowering
from ..lowering.narrowing import VIEWS
from ..lowering.places import Slot, TorchNative
from .editor import ProgramEditor
from .operators import CONSTANTS, calls, multiply, reset, swap
from .requantised import requantised


def write_program(
    ctx: TorchLowering, graph: Graph, planned: Planned, computed: Iterable[Op] = ()
) -> tuple[ExportedProgram, dict[Node, str], int]:
    """A folded copy of the program that was lowered, notes, and the bytes that copies of shared weights add.

    computed: operators of constants alone, in whose places what they give is stored.
    The notes are on nodes whose weights lost precision. Raises RuntimeError on an update that nothing here can write: none may be lost.
    """
    writer = ProgramWriter(ctx)
    writer.write(graph, planned)
    for op in computed:
        writer.compute(op)
    return writer.finish(), writer.notes, writer.bytes_added


def copy_program(program: ExportedProgram) -> ExportedProgram:
    """The program with tensors of its own."""
    editor = ProgramEditor(program)
    shared: dict[int, Any] = {id(each): each for each in program.constants.values() if not isinstance(each, Tensor)}
    editor.state, editor.constants = copy.deepcopy((dict(program.state_dict), dict(program.constants)), shared)
    return editor.finish()


class ProgramWriter(ProgramEditor):
    def __init__(self, ctx: TorchLowering) -> None:
        super().__init__(ctx.program)
        self.ctx = ctx
        self.idle = {op for op in self.graph.nodes if not op.users}
        self.moved: dict[Op, Op] = {}  # operators that were taken out, and whose output is read instead
        self.resized: set[Op] = set()  # operators that have lost channels
        self.notes = Notes()
        self.made: dict[str, list[int]] = {}  # bytes of the new tensors made of an old one
        self.bytes_added = 0

    def write(self, graph: Graph, planned: Planned) -> None:
        self._make_clones(graph.clones)
        alike: dict[tuple[Any, tuple[int, ...], bytes], Op] = {}  # equal copies of one weight are one weight
        for node, role, param in list(graph.updates()):
            native: TorchNative = node.native
            slot = param.slot
            if slot is None:
                raise RuntimeError(f"there is no way to write the {role} of {node.label} {node.name}")
            op = self.copies[native.op]
            if (made := rescaled(graph, node, role)) is not None and param.tensor is not None:
                self.notes.add(node, made.said(param.tensor.name))
                argument, codes = self.ctx.arg(native.op, slot.argument), self.ctx.codes[param.tensor]
                self._give(op, slot, requantised(self, self.ctx.constants, op, argument, codes, made))
                continue
            by = multiplied(param)
            self.notes.add(node, said_of_integers(node, param, multiplied=by is not None))
            exact = param.layout.stored(param.read()) if by is None else by
            if slot.argument == "value" and param.tensor is None:
                set_argument(op, "value", float(exact))
                continue
            dtype = native.new_dtype(node.params.values()) if param.tensor is None else param.tensor.dtype
            array = np.ascontiguousarray(rounded(exact, NUMPY[dtype], flush=param.flush))
            self._note_tiny(node, exact, array, flush=param.flush)
            old = param.tensor.native if param.tensor is not None and isinstance(param.tensor.native, Op) else None
            key = (old, array.shape, array.tobytes() if old is not None and self._shared(old) else b"")
            if old is None or key not in alike:
                value = self._parameter(old, native, role, to_tensor(array).to(self._device(old or native.op)))
                alike[key] = value if by is None or old is None else multiply(self.copies[old], value)
            self._give(op, slot, self._cast(op, alike[key], native.dtype if old is None else old.meta["val"].dtype))
        self._narrow(planned)
        for host in planned.chains.hosts:
            reset(self.copies[host.native.op], host)
            self.resized.add(self.copies[host.native.op])
        for node in planned.removed:
            self.remove(node.native, self.current(node.native.operands[0]))
        for each in planned.written:
            self.remove(each.node.native, self._written(each))
        for m in planned.merges:
            self._replace(self.copies[m.add.native.op], self.current(m.add.native.operands[m.kept_input]))
        for first, second in ((self.copies[node.native.op], self.copies[each.native.op]) for node, each in planned.chains.behind):
            swap(first, second)
            self._rename_output(second, first)
            self.resized |= {first, second}
        for op, source in self.ctx.idle.items() if planned.merges else ():  # the 0 with which a sum of branches began
            if (given := self.current(source)).op == "call_function" and op in self.copies:
                self._replace(self.copies[op], given)

    def _narrow(self, planned: Planned) -> None:
        """State the groups of what has lost channels, and the sizes of all that has others."""
        for node in planned.fewer.nodes:
            if node.op == "Conv":
                set_argument(self.copies[node.native.op], "groups", node.attrs["groups"])
            self.resized.add(self.copies[node.native.op])
        for value, (axis, size) in {**planned.fewer.sizes, **planned.chains.sizes}.items():
            if value.producer is None:
                continue
            op, given = self.copies[value.producer.native.op], arguments(value.producer.native.op)
            name = "size" if "size" in given else "shape"
            if operator_name(op) in VIEWS and isinstance(n := given[name][axis], int) and n != -1:
                set_argument(op, name, [size if i == axis else each for i, each in enumerate(given[name])])
            self.resized.add(op)

    def _shared(self, op: Op) -> bool:
        """Whether several operators read it, those that were doubled included."""
        return len(self.copies[op].users) > 1

    def _device(self, op: Op) -> torch.device:
        value = op.meta.get("val")
        device: torch.device = value.device if isinstance(value, Tensor) else torch.device("cpu")
        return device

    def _make_clones(self, clones: list[Node]) -> None:
        """Make the operators that were doubled, in the order in which they were, and let those who want the copy read it."""
        for node in clones:
            native: TorchNative = node.native
            assert native.clone_of is not None
            native.operands = native.clone_of.operands  # those that it had when it was doubled
            old = self.copies[native.clone_of.op]
            with self.graph.inserting_after(old):
                made = self.graph.node_copy(old)
            self.copies[made] = made
            native.op, native.clone_of = made, None
            for reader, i in native.readers:
                self.copies[reader.op].replace_input_with(self.current(reader.operands[i]), made)
                reader.operands = [made if k == i else op for k, op in enumerate(reader.operands)]

    def _parameter(self, old: Op | None, native: TorchNative, role: str, tensor: Tensor) -> Op:
        """A placeholder for a new tensor; the old one's own where nothing else reads it."""
        stored = None if old is None else self.ctx.constants.stored(old)
        if stored is not None and old is not None and not self._shared(old) and tensor.shape == stored.tensor.shape:
            holder = self.state if stored.target in self.state else self.constants
            again = [s for s in self.signature.input_specs if s.target == stored.target]
            if len(again) == 1:
                holder[stored.target] = _like(laid_out(tensor, stored.tensor), stored.tensor)
                return self.copies[old]
        if old is not None:
            tensor = laid_out(tensor, old.meta["val"])
        stem = stored.target if stored is not None else f"{_path(native)}.{role}"
        trained = stored.tensor.requires_grad if stored is not None and isinstance(stored.tensor, torch.nn.Parameter) else True
        made = self.store(self.new_name(stem), torch.nn.Parameter(tensor, trained and tensor.is_floating_point()))
        if stored is not None:
            self.made.setdefault(stored.target, []).append(tensor.nbytes)
        self.copies[made] = made
        return made

    def _cast(self, op: Op, value: Op, dtype: torch.dtype) -> Op:
        """A parameter in the type that the operator is given."""
        if value.meta["val"].dtype == dtype:
            return value
        with self.graph.inserting_before(op):
            made: Op = self.graph.call_function(torch.ops.aten._to_copy.default, (value,), {"dtype": dtype})
        made.meta = {"val": value.meta["val"].to(dtype), "tensor_meta": {}}
        return made

    def _give(self, op: Op, slot: Slot, value: Op) -> None:
        if slot.argument == "Add":
            with self.graph.inserting_after(op):
                made = self.graph.call_function(torch.ops.aten.add.Tensor, (op, value))
            made.meta = dict(op.meta)
            op.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
            self.moved[op] = made
            self._rename_output(op, made)
            return
        name, _, index = slot.argument.partition(".")
        if not index:
            set_argument(op, name, value)
            return
        items = list(arguments(op)[name])
        items[int(index)] = value
        set_argument(op, name, items)

    def _written(self, written: Written) -> Op:
        """Operators in front of the one whose place they take."""
        native: TorchNative = written.node.native
        constants: dict[str, Op] = {}
        for role, exact in written.constants.items():
            array = rounded(exact, NUMPY[written.node.attrs.get("mixed") or native.dtype], flush=written.flush)
            self._note_tiny(written.node, exact, array, flush=written.flush)
            tensor = to_tensor(array).to(self._device(native.op))
            constants[role] = self.store(self.new_name(f"{_path(native)}.{CONSTANTS[role]}"), torch.nn.Parameter(tensor))
        value: Op = self.current(native.operands[0])
        with self.graph.inserting_before(self.copies[native.op]):
            for target, more in calls(written.constants, constants):
                value = self.graph.call_function(target, (value, *more))
                value.meta = dict(native.end.meta)
            if (wide := written.node.attrs.get("mixed")) is not None:
                value.meta["val"] = value.meta["val"].to(wide)
                value = self.graph.call_function(torch.ops.aten._to_copy.default, (value,), {"dtype": native.dtype})
                value.meta = dict(native.end.meta)
        return value

    def _note_tiny(self, node: Node, exact: Array, array: npt.NDArray[Any], *, flush: bool) -> None:
        if count := lost(exact, array):
            self.notes.add(node, too_small(count, exact.size, node.name, array.dtype, flush=flush))

    def remove(self, native: TorchNative, by: Op) -> None:
        """Let another stand in the place of an operator."""
        self._replace(self.copies[native.end], by)
        for op in map(self.copies.__getitem__, reversed(native.group[:-1])):
            if mutates(op) and not op.users:
                self.graph.erase_node(op)

    def current(self, op: Op) -> Op:
        """Who gives now what an operator gave."""
        found = self.copies[op]
        while found in self.moved:
            found = self.moved[found]
        return found

    def _replace(self, old: Op, new: Op) -> None:
        """Let the users of one operator read another's output; a copy of it where somebody would write into what others still read."""
        if writes_into_shared(old, new):
            with self.graph.inserting_after(old):
                made = self.graph.call_function(torch.ops.aten.clone.default, (new,))
            made.meta = dict(old.meta)
            new = made
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.moved[old] = new
        self._rename_output(old, new)
        if mutates(old):  # nobody reads it, and it must not write either
            self.graph.erase_node(old)

    def _rename_output(self, old: Op, new: Op) -> None:
        for spec in self.signature.output_specs:
            if isinstance(spec.arg, TensorArgument) and spec.arg.name == old.name:
                spec.arg = TensorArgument(new.name)

    def compute(self, op: Op) -> None:
        """Store what an operator of constants gives, unless nobody reads it any more."""
        for old in [op] if isinstance(op.meta["val"], Tensor) else list(op.users):
            new, tensor = self.copies[old], self.ctx.constants.tensor(old)
            if new.users and isinstance(tensor, Tensor):
                exact = tensor.to(old.meta["val"].dtype).to(self._device(old))
                self._replace(new, self.store(self.new_name(old.name), torch.nn.Parameter(exact, exact.is_floating_point())))

    def sweep(self) -> None:
        """Drop what nobody reads any more, weights and what computed them; what nobody read before stays."""
        held = {s.arg.name: s.target for s in self.signature.input_specs if s.kind.name in KINDS and s.target is not None}
        gone = set()
        for op in reversed(list(self.graph.nodes)):
            if op.users or op in self.idle or op.op == "output" or mutates(op) or (op.op == "placeholder" and op.name not in held):
                continue
            if op.op == "placeholder":
                gone.add(op.name)
            self.graph.erase_node(op)
        owners = {held[name].rpartition(".")[0] for name in gone if held[name].endswith("running_mean")}
        for op in list(self.graph.nodes):  # the counters of BatchNorms that are gone, which nothing reads in evaluation
            owner, _, attribute = held.get(op.name, "").rpartition(".")
            if op.op == "placeholder" and attribute == "num_batches_tracked" and owner in owners and not op.users:
                gone.add(op.name)
                self.graph.erase_node(op)
        self.signature.input_specs = [s for s in self.signature.input_specs if s.arg.name not in gone]
        left = {s.target for s in self.signature.input_specs if s.target is not None}
        self.bytes_added = sum(sum(sizes) - (target not in left) * sizes[0] for target, sizes in self.made.items())
        for tensors in (self.state, self.constants):
            for target in {held[name] for name in gone} - left:
                tensors.pop(target, None)

    def finish(self) -> ExportedProgram:
        self.sweep()
        self.work_out_sizes(self.resized)
        return super().finish()


def _like(tensor: Tensor, old: Tensor) -> Tensor:
    return torch.nn.Parameter(tensor, old.requires_grad) if isinstance(old, torch.nn.Parameter) else tensor


def _path(native: TorchNative) -> str:
    stack = native.op.meta.get("nn_module_stack") or {}
    return next((entry[0] for entry in reversed(stack.values()) if entry[0]), native.op.name)
