"""A PyTorch model as the neutral graph that the rules see. The operators themselves are in `table`, the table of this front-end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor as TorchTensor
from torch.export import ExportedProgram
from torch.fx import Node as Op

from bnfold.algebra.affine import Array
from bnfold.algebra.graph import AS_STORED, Graph, Layout, Node, Param, Site, Tensor, Value
from bnfold.algebra.settings import Settings

from ..export.constants import Constants, as_float64
from ..export.functional import entangled, functional
from ..export.sizes import Sizes
from ..export.trace import Traced
from ..export.walk import FLOATS, arguments, dtype_of, frame, is_float, is_tensor, mutates, operator_name, value_of, written
from .places import Host, ModuleHost, Place, ProgramHost

SIZES = {"sym_size", "sym_stride", "sym_numel", "_assert_scalar", "sym_constrain_range_for_size", "_assert_tensor_metadata"}
COPIES = {"to", "_to_copy", "type_as", "view", "reshape", "permute", "transpose", "t", "detach", "contiguous", "clone"}


@dataclass(frozen=True)
class Slot:
    """Where an operator's parameter lives. argument: its name in the operator's schema, or "Add" for an operator that has to grow one."""

    argument: str
    place: Place | Op


@dataclass(eq=False)
class TorchNative:
    """A neutral node's operator in the exported graph, the arguments that are its activations, and where its parameters live."""

    op: Op
    operands: list[Op]
    slots: dict[str, Slot] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32  # that a parameter without a tensor gets
    output: Op | None = None  # the node of its first output where that isn't the operator itself (an item of a tuple)
    group: list[Op] = field(default_factory=list)  # all operators that it stands for, where these are several
    clone_of: TorchNative | None = None  # the original, where the operator has still to be made
    readers: list[tuple[TorchNative, int]] = field(default_factory=list)  # (who, which activation) reads the clone instead


Lower = Callable[["TorchLowering", Op], "str | None"]


class TorchLowering:
    """The state of one lowering; the operators' functions in `table` work on it.

    program: the graph that is lowered: the traced one, or, where writing in place and views make its data flow hard to see, the same
    without writing in place. operators: the function of each, by name; settings: what
    verify's first level compares. outputs: the values that a caller gets, by the name of the output.
    """

    def __init__(self, traced: Traced, operators: Mapping[str, Lower], settings: Callable[..., Settings]) -> None:
        self.traced, self._operators, self._settings = traced, operators, settings
        self.program = traced.program if not entangled(traced.program) else functional(traced.program)
        self.sizes = Sizes(self.program)
        self.constants = Constants(self.program)
        module = None if isinstance(traced.model, ExportedProgram) else traced.model
        self.host: Host = ProgramHost() if module is None else ModuleHost(module, self.program, self.constants, traced.example, traced.held)
        self.nodes: list[Node] = []
        self.sites: dict[Any, Site] = {}
        self.outputs: dict[str, Value] = {}
        self._values: dict[Op, Value] = {}
        self._tensors: dict[Any, Tensor] = {}
        self._names: dict[str, int] = {}
        self.idle: dict[Op, Op] = {}  # operators that do nothing, with their inputs
        self.done: set[Op] = set()  # operators that were lowered together with another
        self._leaves = _leaf_frames(self.program)

    def graph(self) -> Graph:
        for op in self.program.graph.nodes:
            if op.op == "output":
                self._finish(op)
            if op.op != "call_function" or op in self.done or self.constants.is_constant(op):
                continue  # constants are parameters of those who read them
            lower = self._operators.get(operator_name(op))
            why = "no rule lets a map cross it" if lower is None else None
            if why is None and is_tensor(op) and not is_float(op):
                why = "it isn't floating point"
            if why is None and lower is not None:
                why = lower(self, op)
            if why is not None:
                self.barrier(op, why)
            if mutates(op):  # who reads the tensor from here on reads what was written
                for target in written(op):
                    self._values[target] = self.value(op if is_tensor(op) else target)
        nodes = [node for node in self.nodes if node.op != "Constant" or node.outputs[0].users]
        if not self.host.copies_weights:
            self._count_other_readers()
        return Graph(nodes, list(self.sites.values()), copies_weights=self.host.copies_weights)

    def _finish(self, op: Op) -> None:
        names = {node: name for name, node in Traced(self.traced.model, self.program).output_nodes.items()}
        for source in op.all_input_nodes:
            if is_tensor(source):
                self.value(source).is_output = True
        for node, name in names.items():
            self.outputs[name] = self.value(node)

    def _count_other_readers(self) -> None:
        """A weight that is also read in a way that no update can follow (by another operator, or as an output) must stay."""
        assert isinstance(self.host, ModuleHost)
        for place, tensor in self._tensors.items():
            known = {(user.native.op, _at(user.native.op, user.native.slots[role].argument)) for user, role in tensor.users}
            for reader, read in dict.fromkeys(self.host.readers(place)):
                if (reader, read) not in known and operator_name(reader) not in SIZES:
                    Node("Barrier", reader.name, [], [], {}, {"read": Param(tensor, tensor.shape)}, label=operator_name(reader))

    # --- what the operators' functions use ---------------------------------------------------------------------------------

    def value(self, op: Op) -> Value:
        if op not in self._values:
            probes = self.sizes.shapes(value_of(op))
            self._values[op] = Value(op.name, probes, None if probes is None else len(probes[0]))
        return self._values[op]

    def same(self, op: Op, source: Op) -> None:
        """An operator that does nothing: its output is its input."""
        if dtype_of(op) == dtype_of(source):
            self._values[op] = self.value(source)
            self.idle[op] = source
        else:
            self.emit("Identity", op, [source])

    def rank(self, op: Op) -> int:
        value = value_of(op)
        return value.ndim if isinstance(value, TorchTensor) else 0

    def const(self, argument: Any) -> Array | None:
        """The constant at an argument in float64; None where there is none or it isn't constant."""
        return self.constants.get(argument)

    def is_activation(self, argument: Any) -> bool:
        return isinstance(argument, Op) and not self.constants.is_constant(argument)

    def param(
        self, op: Op, argument: Any, shape: tuple[int, ...] | None = None, layout: Layout | None = None, *, computed: bool = False
    ) -> Param | None:
        """A constant argument as a parameter in its canonical shape; None where it can't be rewritten.

        computed: whether it may be rewritten through the steps in which a module's code computes it from a stored tensor.
        """
        if not isinstance(argument, Op) or not self.constants.is_constant(argument) or not is_float(argument):
            return None
        place, source, base = self.host.weight(op, argument), argument, AS_STORED
        dtypes = [dtype_of(argument) or torch.float32]
        if place is None and computed and isinstance(self.host, ModuleHost) and (found := self.host.computed(op, argument)) is not None:
            place, (source, base) = found[0], (found[1].root, found[1].layout)
            dtypes = [dtype_of(source) or torch.float32, *found[1].dtypes]
        array_shape = tuple(int(n) for n in value_of(argument).shape)
        if place is None or (self.constants.stored(source) is None and self.const(source) is None):
            return None
        if place not in self._tensors:
            kinds = _kinds(argument)
            # What is cast down stays as precise as it was stored; a module's code does without the cast then.
            dtype = min(kinds, key=lambda kind: torch.finfo(kind).eps) if self.host.copies_weights else dtypes[0]
            name = place.target if isinstance(place, Place) else self.target(source)
            stored_shape = tuple(int(n) for n in value_of(source).shape)
            made = Tensor(name, lambda: self._read(source), stored_shape, min(map(largest, kinds)), place, dtype)
            made.cast_from = largest(max(kinds, key=lambda kind: torch.finfo(kind).eps))
            self._tensors[place] = made
        tensor = self._tensors[place]
        tensor.limit = min(tensor.limit, *map(largest, dtypes))
        shape = array_shape if shape is None else shape
        if layout is None:
            layout = AS_STORED if shape == array_shape else reshaped(shape, array_shape)
        return Param(tensor, shape, layout.after(base))

    def no_weight(self, *arguments: Any) -> str:
        """Why none of the arguments is a weight that can be rewritten, in a clause."""
        by = next((by for argument in arguments if (by := self.constants.rounded_by(argument))), "")
        return f"its weight is rounded by {by}" if by else "its weight is no constant that can be rewritten"

    def _read(self, argument: Op) -> Array:
        stored = self.constants.stored(argument)
        array = as_float64(stored.tensor) if stored is not None else self.constants.get(argument)
        assert array is not None
        return array

    def target(self, argument: Op) -> str:
        """The qualified name of a stored constant; for another one, the node's."""
        stored = self.constants.stored(argument)
        return argument.name if stored is None else stored.target

    def bias(self, op: Op, argument: Any, weight: Param, shape: tuple[int, ...]) -> tuple[Param | None, Slot | None, str]:
        """The bias at an argument, or one that the operator could have; None with the reason where it can have none."""
        if isinstance(argument, Op):
            found = self.param(op, argument, shape, computed=True)
            if found is None or found.tensor is None:
                return None, None, "its bias is no constant that can be rewritten"
            return found, Slot("bias", found.tensor.native), ""
        assert weight.tensor is not None
        place = self.host.bias(op, weight.tensor.native)
        if place is None:
            return None, None, "its code has no place for one"
        stored = tuple(n for n in shape if n != 1) or (1,)
        return Param(None, shape, reshaped(shape, stored)), Slot("bias", place), ""

    def emit(
        self,
        kind: str,
        op: Op,
        inputs: list[Op],
        attrs: dict[str, Any] | None = None,
        params: dict[str, Param] | None = None,
        slots: dict[str, Slot | str] | None = None,
        output: Op | None = None,
    ) -> Node:
        """Add a neutral node with one output, the operator's own or that of an item of its tuple."""
        out = op if output is None else output
        dtype = dtype_of(out) or torch.float32
        places = {
            role: slot if isinstance(slot, Slot) else Slot(slot, (params or {})[role].tensor.native)  # type: ignore[union-attr]
            for role, slot in (slots or {}).items()
        }
        native = TorchNative(op, inputs, places, dtype, None if output is None else output)
        attrs = {"limit": largest(dtype), "cloneable": self.host.copies_weights and output is None and not mutates(op), **(attrs or {})}
        sources = [self._operand(op, source) for source in inputs]
        target = self.value(out)
        made = Node(kind, self.name(op), sources, [target], attrs, params or {}, native, label=operator_name(op) or str(op.target))
        held = {slot.argument for role, slot in places.items() if role != "fill"}
        item = next((i for i, each in self.items(op).items() if each is out), 0)
        made.attrs["settings"] = partial(self._settings, self, op, inputs, held, {target: item})
        self.nodes.append(made)
        return made

    def _operand(self, op: Op, source: Op) -> Value:
        """An activation; a constant operand becomes a node of its own, which can absorb a map."""
        if not self.constants.is_constant(source):
            return self.value(source)
        shape = tuple(int(n) for n in value_of(source).shape)
        value = Value(source.name, (shape,), len(shape))
        param = self.param(op, source)
        if param is not None and param.tensor is not None:
            argument = next((name for name, given in arguments(op).items() if given is source), "")
            if argument:  # not where it stands in a list of tensors
                slots = {"value": Slot(argument, param.tensor.native)}
                native = TorchNative(op, [], slots, dtype_of(source) or torch.float32)
                attrs = {"limit": param.tensor.limit}
                self.nodes.append(Node("Constant", self.target(source), [], [value], attrs, {"value": param}, native))
        value.fixed = value.producer is None
        return value

    def items(self, op: Op) -> dict[int, Op]:
        """The users that take an item each of the tuple or list that an operator gives."""
        return {
            user.args[1]: user for user in op.users if getattr(user.target, "__name__", "") == "getitem" and isinstance(user.args[1], int)
        }

    def barrier(self, op: Op, why: str) -> None:
        """An operator that no map crosses. It uses all its activations, and their sizes alone are no use of a value."""
        name = operator_name(op)
        if name in SIZES:
            return
        if not name and not isinstance(op.target, torch._ops.OperatorBase) and not is_tensor(op):
            return  # arithmetic on sizes
        inputs = [source for source in op.all_input_nodes if is_tensor(source) and not self.constants.is_constant(source)]
        sources = [self.value(source) for source in inputs]
        outputs = [op] if is_tensor(op) else [item for _, item in sorted(self.items(op).items())]
        self.done.update(self.items(op).values())
        values = [self.value(each) for each in outputs]
        if not values and mutates(op):
            values = [Value(f"{op.name}.written")]
        items = self.items(op)
        places = {value: next((i for i, each in items.items() if each is op_), 0) for value, op_ in zip(values, outputs, strict=False)}
        attrs = {"why": why, "settings": partial(self._settings, self, op, inputs, (), places)}
        self.nodes.append(
            Node("Barrier", self.name(op), sources, values, attrs, native=TorchNative(op, inputs), label=name or str(op.target))
        )

    def name(self, op: Op) -> str:
        """The module in whose forward the operator stands, if it is a leaf; else the operator's own name behind the module's."""
        path = frame(op)
        own = path if path in self._leaves and path else f"{path}.{op.name}" if path else op.name
        self._names[own] = self._names.get(own, 0) + 1
        return own if self._names[own] == 1 else f"{own}, call {self._names[own]}"

    def site(
        self, key: Any, node: Node, channels: int, *, is_batchnorm: bool, name: str = "", refusal: str | None = None, note: str = ""
    ) -> None:
        """Register an affine node as something to fold; nodes with the same key are calls of one layer."""
        found = self.sites.get(key)
        if found is not None and (found.refusal == refusal or not self.host.copies_weights):
            found.nodes.append(node)
            found.refusal = found.refusal or refusal
            return
        if found is not None:
            key = node
        separable = self.host.copies_weights
        self.sites[key] = Site(name or node.name, [node], channels, is_batchnorm, separable, refusal, note)


def _at(op: Op, argument: str) -> Any:
    """What stands at an argument, or in the list at it ("params.2")."""
    name, _, index = argument.partition(".")
    given = arguments(op)[name]
    return given[int(index)] if index else given


def _leaf_frames(program: ExportedProgram) -> set[str]:
    paths = {frame(op) for op in program.graph.nodes if op.op == "call_function"}
    parents = {path.rpartition(".")[0] for path in paths if path}
    return paths - parents


def reshaped(canonical: tuple[int, ...], stored: tuple[int, ...]) -> Layout:
    """A layout that differs in its shape alone. An array that grew is stored in the canonical rank, which broadcasts alike."""

    def back(w: Array) -> Array:
        return w.reshape(stored) if w.shape == canonical else w

    return Layout(f"as {canonical}", lambda w: w.reshape(canonical), back)


def _kinds(argument: Op) -> list[torch.dtype]:
    """The float types that a constant has and had on its way from where it is stored, which only copied and cast it."""
    dtypes = [dtype_of(argument)]
    while operator_name(argument) in COPIES and isinstance(source := argument.args[0], Op):
        argument = source
        dtypes.append(dtype_of(argument))
    return [dtype for dtype in dtypes if dtype in FLOATS]


def largest(dtype: torch.dtype | None) -> float:
    """The largest finite number of a float type (float32 where it isn't one)."""
    return float(torch.finfo(dtype if dtype in FLOATS else torch.float32).max)


def each(sizes: Any, count: int) -> tuple[int, ...]:
    """A setting for each spatial axis; one number or a list of one holds for all of them."""
    found = tuple(int(n) for n in sizes) if isinstance(sizes, (list, tuple)) else (int(sizes),)
    return found * count if len(found) == 1 else found


def ones_like(rank: int, axis: int, size: int) -> tuple[int, ...]:
    """A shape of ones with one size."""
    return tuple(size if i == axis else 1 for i in range(rank))


def vector(array: Array, rank: int, axis: int = 1) -> Array:
    """A vector along one axis of a tensor."""
    return np.reshape(array, ones_like(rank, axis, array.size))
