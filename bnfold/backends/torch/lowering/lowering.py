"""A PyTorch model as the neutral graph that the rules see. The operators themselves are in `table`, the table of this front-end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node as Op

from bnfold.algebra.affine import Array, Blocked
from bnfold.algebra.graph import Elementwise, Graph, Node, Param, Tensor, Value
from bnfold.algebra.layouts import AS_STORED, Layout, Shape, new, scaled
from bnfold.algebra.lowering import Lowering
from bnfold.algebra.quantised import ROUNDED
from bnfold.algebra.settings import Settings

from ..export.constants import ProgramConstants
from ..export.copies import WAY_OUT
from ..export.functional import entangled, functional
from ..export.quantisers import quantiser
from ..export.sizes import Sizes
from ..export.trace import Traced
from ..export.walk import FLOATS, arguments, dtype_of, frame, is_float, is_tensor, items, mutates, operator_name, value_of, written
from . import narrowing, quantised
from .module_host import ModuleHost
from .places import Host, Place, ProgramHost, Slot, TorchNative, plain_path
from .quantised import Codes

SIZES = {"sym_size", "sym_stride", "sym_numel", "_assert_scalar", "sym_constrain_range_for_size", "_assert_tensor_metadata"}
# What reads of an argument its type alone, its sizes, or sizes that follow where channels go.
MADE = ("zeros", "ones", "full", "empty", "rand", "randn")
LIKE = {f"{name}_like": "self" for name in MADE} | {f"new_{name}": "self" for name in MADE[:4]} | {"expand_as": "other", "view_as": "other"}

Lower = Callable[["TorchLowering", Op], object]


class TorchLowering(Lowering):
    """The lowering of a model. An argument goes by its name in the operator's schema, or by its place in the list there ("params.2").

    program: the graph that is lowered: the traced one, or, where writing in place and views make its data flow hard to see, the same
    without writing in place. named_outputs: the values that a caller gets.
    """

    constants: ProgramConstants

    def __init__(self, traced: Traced, operators: Mapping[str, Lower], settings: Callable[..., Settings]) -> None:
        super().__init__(operators, settings)
        self.traced = traced
        self.program = traced.program if not entangled(traced.program) else functional(traced.program)
        self.sizes = Sizes(self.program)
        self.constants = ProgramConstants(self.program)
        module = None if isinstance(traced.model, ExportedProgram) else traced.model
        self.host: Host = ProgramHost() if module is None else ModuleHost(module, self.program, self.constants, traced)
        self.copies_weights = self.host.copies_weights
        self.named_outputs: dict[str, Value] = {}
        self._names: dict[str, int] = {}
        self.idle: dict[Op, Op] = {}  # operators that do nothing, with their inputs
        self.done: set[Op] = set()  # operators that were lowered together with another
        self.codes: dict[Tensor, Codes] = {}  # of the quantised weights
        self._leaves = _leaf_frames(self.program)

    def graph(self) -> Graph:
        for op in self.program.graph.nodes:
            if op.op == "output":
                self._finish(op)
            if op.op != "call_function" or op in self.done or self.constants.is_constant(op):
                continue  # constants are parameters of those who read them
            name = operator_name(op) or (op.target._schema.name if isinstance(op.target, torch._ops.OpOverload) else "")
            numbers = name in self._operators and is_tensor(op) and not is_float(op)
            self.lower(op, name, ROUNDED if quantiser(op) is not None else "it isn't floating point" if numbers else "")
            if mutates(op):  # who reads the tensor from here on reads what was written
                for target in written(op):
                    self._values[target] = self.value(op if is_tensor(op) else target)
        if not self.copies_weights:
            self._count_other_readers()
        return self.finished()

    def _finish(self, op: Op) -> None:
        for source in op.all_input_nodes:
            if is_tensor(source):
                self.value(source).is_output = True
        names = {node: name for name, node in Traced(self.traced.model, self.program).output_nodes.items()}
        self.named_outputs = {name: self.value(node) for node, name in names.items()}

    def _count_other_readers(self) -> None:
        """A weight that is also read in a way that no update can follow (by another operator, or as an output) must stay."""
        assert isinstance(self.host, ModuleHost)
        held = {tensor: codes.places.values() for tensor, codes in self.codes.items()}  # scales and zero points, too
        places = [(place, tensor) for key, tensor in self._tensors.items() for place in {key, *held.get(tensor, ())}]
        for place, tensor in places:
            users = [(user.native.op, user.params[role].slot.argument) for user, role in tensor.users if user.native is not None]
            known = {(op, self.arg(op, argument)) for op, argument in users}
            for reader, read in dict.fromkeys(self.host.readers(place)):
                if (reader, read) not in known and operator_name(reader) not in SIZES:
                    Node("Barrier", reader.name, [], [], {}, {"read": Param(tensor, tensor.shape)}, label=operator_name(reader))

    # --- see `Lowering` --------------------------------------------------------------------------------------------------------------

    def arg(self, op: Op, key: str) -> Any:
        name, _, index = key.partition(".")
        given = arguments(op)[name]
        return given[int(index)] if index else given

    def keys(self, op: Op, refs: Iterable[Op]) -> list[str]:
        known = arguments(op) if isinstance(op.target, torch._ops.OpOverload) else {}
        return [next((name for name, given in known.items() if given is ref), "") for ref in refs]  # "" in a list of tensors

    def outputs(self, op: Op) -> dict[int, Op]:
        return {0: op} if is_tensor(op) else {i: item for i, item in self.items(op).items() if item.users}

    def ends(self, op: Op) -> tuple[list[Op], list[Value]]:
        name = operator_name(op)
        sizes = not name and not isinstance(op.target, torch._ops.OperatorBase) and not is_tensor(op)  # arithmetic on them
        if sizes or name in SIZES:  # which is no use of a value
            return [], []
        like = self.arg(op, LIKE[name]) if name in LIKE else None
        if name.endswith("_like") and like is not None:
            self.value(like).is_sized = True
        inputs = [s for s in op.all_input_nodes if s is not like and is_tensor(s) and not self.constants.is_constant(s)]
        outputs = [op] if is_tensor(op) else [item for _, item in sorted(self.items(op).items())]
        values = [self.value(each) for each in outputs]
        return inputs, [Value(f"{op.name}.written")] if not values and mutates(op) else values

    def new_value(self, ref: Op) -> Value:
        probes = self.sizes.shapes(value_of(ref))
        return Value(ref.name, probes, None if probes is None else len(probes[0]))

    def rank(self, ref: Op, what: str = "") -> int:
        return value_of(ref).ndim if is_tensor(ref) else 0

    def shape(self, ref: Op) -> Shape:
        return tuple(int(n) for n in value_of(ref).shape)

    def dtype(self, ref: Op) -> torch.dtype | None:
        return dtype_of(ref)

    def name(self, op: Op) -> str:
        """The module in whose forward the operator stands, if it is a leaf; else the operator's own name behind the module's.

        Behind Keras's own name of a layer, where its weights say that: its layers are no modules.
        """
        path = frame(op)
        roots = (root for source in op.all_input_nodes if self.constants.is_constant(source) for root in self.constants.roots(source))
        targets = (plain_path(self.target(root)) for root in roots)
        if layer := next((target.rpartition("/")[0] for target in targets if "/" in target), ""):
            return f"{layer}.{op.name}"
        own = path if path in self._leaves and path else f"{path}.{op.name}" if path else op.name
        self._names[own] = self._names.get(own, 0) + 1
        return own if self._names[own] == 1 else f"{own}, call {self._names[own]}"

    def title(self, op: Op, ref: Op) -> str:
        return self.target(ref)

    def label(self, op: Op) -> str:
        return operator_name(op) or str(op.target)

    def native(self, op: Op, inputs: list[Op], keys: list[str], output: Op | None) -> TorchNative:
        parts = [] if is_tensor(op) else [*self.items(op).values()]
        self.done.update(parts)
        dtype, item = dtype_of(output) or torch.float32, output if output in parts else None
        return TorchNative(op, inputs, dtype, item, largest(dtype), self.copies_weights and item is None and not mutates(op))

    def param(
        self, op: Op, key: str, shape: Shape | None = None, layout: Layout | None = None, *, role: str = "weight", computed: bool = True
    ) -> Param:
        """computed: whether it may be rewritten through the steps in which a module's code computes it from a stored tensor."""
        argument: Any = self.arg(op, key) if key else None
        found = self._rewritable(op, argument, computed)
        if found is None:
            inside = not self.copies_weights and self.constants.is_constant(argument)
            raise Blocked(f"its {role} is no constant that can be rewritten" + f" in a module: {WAY_OUT}" * inside)
        tensor, base = found
        own = self.shape(argument)
        shape = own if shape is None else shape
        layout = scaled(shape, own) if layout is None else layout
        return Param(tensor, shape, layout.after(base), slot=Slot(key, tensor.native))

    def bias(self, op: Op, key: str, weight: Param, shape: Shape, stored: Shape | None = None) -> Param:
        if isinstance(self.arg(op, key), Op):
            return self.param(op, key, shape, role="bias")
        assert weight.tensor is not None
        place = self.host.bias(op, weight.tensor.native)
        layout = new(shape, tuple(n for n in shape if n != 1) or (1,) if stored is None else stored)
        if place is None:
            return Param(None, shape, layout, refusal="its code has no place for one")
        return Param(None, shape, layout, slot=Slot(key, place))

    def slot_behind(self, op: Op) -> Slot | None:
        return Slot("Add", op) if self.host.grows else None

    def elementwise(self, node: Node) -> Elementwise | None:
        return narrowing.elementwise(self.constants, node)

    def rigid(self, node: Node) -> str:
        return narrowing.rigid(self.host, self.constants, node)

    def layer_of(self, op: Op, node: Node, param: Param) -> tuple[Any, str]:
        owner = frame(op)
        assert param.tensor is not None
        name = owner if owner and node.name.startswith(owner) else node.name
        return node if self.copies_weights else ("constant", param.tensor.name), name

    # --- what the operators' functions use -------------------------------------------------------------------------------------------

    def same(self, op: Op, source: Op) -> None:
        """An operator that does nothing: its output is its input."""
        if dtype_of(op) == dtype_of(source):
            self._values[op] = self.value(source)
            self.idle[op] = source
        else:
            self.emit("Identity", op, [source])

    def is_activation(self, argument: Any) -> bool:
        return isinstance(argument, Op) and not self.constants.is_constant(argument)

    def items(self, op: Op) -> dict[int, Op]:
        """The users that take an item each of the tuple or list that an operator gives."""
        return {user.args[1]: user for user in items(op) if isinstance(user.args[1], int)}

    def target(self, argument: Op) -> str:
        """The qualified name of a stored constant; for another one, the node's."""
        stored = self.constants.stored(argument)
        return argument.name if stored is None else stored.target

    # --- constants that may be rewritten ---------------------------------------------------------------------------------------------

    def _rewritable(self, op: Op, argument: Any, computed: bool) -> tuple[Tensor, Layout] | None:
        """The stored tensor that a constant is, or is computed from, and how; None where none can be rewritten."""
        if not isinstance(argument, Op) or not self.constants.is_constant(argument) or not is_float(argument):
            return None
        if quantised.knows(self.constants, self.host, op, argument):
            return self._quantised(op, argument)
        place, source, base = self.host.weight(op, argument), argument, AS_STORED
        dtypes = [dtype_of(argument) or torch.float32]
        if place is None and computed and isinstance(self.host, ModuleHost) and (found := self.host.computed(op, argument)) is not None:
            place, (source, base) = found[0], (found[1].root, found[1].layout)
            dtypes = [dtype_of(source) or torch.float32, *found[1].dtypes]
        if place is None or (self.constants.stored(source) is None and self.const(source) is None):
            return None
        if place in self._tensors and (codes := self.codes.get(self._tensors[place])) is not None and codes.quantised.apart:
            return None
        if place not in self._tensors:
            held = quantised.kinds(argument)
            # What is cast down stays as precise as it was stored; a module's code does without the cast then.
            dtype = min(held, key=lambda kind: torch.finfo(kind).eps) if self.copies_weights else dtypes[0]
            name = place.target if isinstance(place, Place) else self.target(source)
            made = Tensor(name, lambda: self._read(source), self.shape(source), min(map(largest, held)), place, dtype)
            made.integers = self.constants.of_integers(argument)
            made.cast_from = largest(quantised.coarsest(argument))
            self._tensors[place] = made
        tensor = self._tensors[place]
        tensor.limit = min(tensor.limit, *map(largest, dtypes))
        return tensor, base

    def _quantised(self, op: Op, argument: Op) -> tuple[Tensor, Layout]:
        """The tensor that is rounded or stored as integers, and how what the operator reads is laid out."""
        name, codes, layout = quantised.read(self.constants, self.host, op, argument)
        key: Any = codes.places.get("scale" if codes.quantised.apart else "source", argument)
        if key in self._tensors and not codes.same_as(self.codes.get(self._tensors[key])):
            raise Blocked(f"{name} is quantised, and its scale is also that of others")
        if key not in self._tensors:
            kind, how = dtype_of(argument), codes.quantised
            made = self._tensors[key] = Tensor(name, how.array, how.shape, largest(kind), key, kind, quantised=how)
            made.cast_from = largest(quantised.coarsest(argument, codes.last.scale))
            self.codes[made] = codes
        return self._tensors[key], layout

    def _read(self, argument: Op) -> Array:
        array = self.const(argument)
        assert array is not None
        return array


def first(op: Op) -> Op:
    """The operator's first tensor, whatever its schema calls it."""
    return next(value for value in arguments(op).values() if isinstance(value, Op))


def by_first(shared: Callable[..., object], **settings: Any) -> Lower:
    """An operator of which its first tensor and its settings say all."""
    return lambda ctx, op: shared(ctx, op, first(op), **settings)


def _leaf_frames(program: ExportedProgram) -> set[str]:
    paths = {frame(op) for op in program.graph.nodes if op.op == "call_function"}
    return paths - {path.rpartition(".")[0] for path in paths if path}


def largest(dtype: torch.dtype | None) -> float:
    """The largest finite number of a float type (float32 where it isn't one)."""
    return float(torch.finfo(dtype if dtype in FLOATS else torch.float32).max)


def each(sizes: Any, count: int) -> Shape:
    """A setting for each spatial axis; one number or a list of one holds for all of them."""
    found = tuple(int(n) for n in sizes) if isinstance(sizes, (list, tuple)) else (int(sizes),)
    return found * count if len(found) == 1 else found
