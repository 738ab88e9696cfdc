"""One stage of a PyTorch model: its operators, run one by one on a device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node as Op
from torch.fx.node import map_aggregate

from bnfold.data.memory import out_of_memory
from bnfold.errors import BnfoldError, UnsupportedError
from bnfold.recalibration.moments import Moments, Pointwise, Samples
from bnfold.recalibration.plan import NOTHING, Reading, Values
from bnfold.recalibration.schedule import Cut

from ..export.constants import ProgramConstants
from ..export.regions import under
from ..export.tensors import to_numpy, to_tensor
from ..export.walk import arguments, epsilon, in_training, is_batchnorm, is_tensor, items, operator_name, stored_targets, viewed
from ..runtime.session import run_failed
from .moments import Meter

aten = torch.ops.aten
# Operators with a form that writes into its input, for an input that nobody else reads.
IN_PLACE: dict[Any, Any] = {
    getattr(aten, name).default: getattr(aten, f"{name}_").default for name in ("relu", "silu", "hardtanh", "hardswish", "leaky_relu")
} | {aten.add.Tensor: aten.add_.Tensor}
Value = Callable[[Op], Any]  # gives the value of a node
FRESH = {"batch_norm", "conv1d", "conv2d", "conv3d", "convolution", "linear", "add"}  # their output shares no storage
SIZES = "sizes of the micro-batch"


class StoredTensors:
    """What an exported program stores, on the device: parameters, buffers, and what is computed from them, with the new statistics."""

    def __init__(self, program: ExportedProgram, constants: ProgramConstants, device: torch.device) -> None:
        self._program, self._constants, self.device = program, constants, device
        self._targets = stored_targets(program)
        self.meter = Meter(device)
        self._new: dict[str, Tensor] = {}
        self._values: dict[Op, Any] = {}

    def is_stored(self, op: Op) -> bool:
        return op.op == "get_attr" or (op.op == "placeholder" and op.name in self._targets)

    def is_constant(self, op: Op) -> bool:
        """Whether a value is the same for all data."""
        return self._constants.is_constant(op) or self.is_stored(op)

    def tensor(self, target: str) -> Tensor:
        """As the program came with it."""
        found: Tensor | None = self._program.state_dict.get(target)
        return self._program.constants[target] if found is None else found

    def replace(self, target: str, tensor: Tensor) -> None:
        self._new[target] = tensor.to(self.device)
        self._values.clear()  # something may have been computed from the old one

    def restore(self, target: str) -> None:
        self._new.pop(target, None)
        self._values.clear()

    def value(self, op: Op) -> Any:
        if op not in self._values:
            self._values[op] = self._compute(op)
        return self._values[op]

    def _compute(self, op: Op) -> Any:
        if op.op == "placeholder":
            target = self._targets[op.name]
            if target in self._new:
                return self._new[target]
            stored = self.tensor(target).detach()
            trains = any(is_batchnorm(user) and in_training(user) for user in op.users)  # that one writes into it
            return (stored.clone() if trains else stored).to(self.device)
        if op.op == "get_attr":
            found = attrgetter(str(op.target))(self._program.graph_module)
            return found.detach().to(self.device) if isinstance(found, Tensor) else found
        return called(op, self.value, self.device)


def called(op: Op, value: Value, device: torch.device, target: Any = None) -> Any:
    """What an operator gives, or another in its place. value: gives that of the nodes that it reads."""

    def given(leaf: Any) -> Any:
        return value(leaf) if isinstance(leaf, Op) else device if isinstance(leaf, torch.device) else leaf

    run: Any = op.target if target is None else target
    args, kwargs = map_aggregate((op.args, op.kwargs), given)
    with under(op):
        return run(*args, **kwargs)


def normalising(op: Op, moments: Moments) -> Callable[[Value], Any]:
    """What runs a BatchNorm with given statistics, out of training mode. Gives what the operator gives, as far as anyone reads it."""
    given = arguments(op)
    eps = epsilon(given)

    def run(value: Value) -> Any:
        x = value(given["input"])
        scale, shift = (None if given.get(name) is None else value(given[name]) for name in ("weight", "bias"))
        kind = scale.dtype if scale is not None else torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        mean, variance = (torch.from_numpy(each).to(x.device, kind) for each in (moments.mean, moments.variance()))
        out = torch.batch_norm(x, scale, shift, mean, variance, False, 0.0, eps, False)
        return out if is_tensor(op) else (out, mean, (variance + eps).rsqrt())

    return run


class TorchStage:
    """The operators of a part. With the values that wait between stages wait the sizes of the micro-batch.

    first, last: its place among the stages. calls: those that run here and may be normalised with what `run` is told or what `stands_in`
    for statistics that the program has no place for, with the names of their mean and variance, for those that are no operator (see
    `lowering.chains.frozen_chains`).
    """

    def __init__(
        self,
        program: ExportedProgram,
        stored: StoredTensors,
        part: Cut[Op, Op],
        readings: list[Reading],
        calls: Mapping[int, tuple[Op, tuple[str, str]]],
        stands_in: Mapping[int, Moments],
        *,
        first: bool,
        last: bool,
    ) -> None:
        self.readings, self._calls, self._stands_in = readings, calls, stands_in
        self.needs = [op.name for op in part.reads]
        self.keeps = dict.fromkeys(op.name for op in part.keeps)
        self._stored, self._part, self._first = stored, part, first
        inputs = [op for op in program.graph.nodes if op.op == "placeholder" and not stored.is_stored(op) and is_tensor(op)]
        sizes = [(n, op.name, axis) for op in inputs for axis, n in enumerate(op.meta["val"].shape) if isinstance(n, torch.SymInt)]
        self._symbols = {n.node.expr: (name, axis) for n, name, axis in sizes if n.node.expr.is_symbol}
        if self._symbols:
            self.needs = list(dict.fromkeys([*self.needs, *(op.name for op in inputs)])) if first else [*self.needs, SIZES]
            if not last:
                self.keeps[SIZES] = None
        self._nodes = [op for each in part.nodes for op in (each, *items(each))]
        inner = set(self._nodes).difference(part.makes)  # what nobody needs behind this stage
        self._drops: dict[Op, list[Op]] = {}
        self._in_place: dict[Op, Any] = {}
        seen = set[Op]()
        for op in reversed(self._nodes):
            self._drops[op] = [source for source in op.all_input_nodes if source in inner and source not in seen]
            seen.update(op.all_input_nodes)
            if op.target in IN_PLACE and _fits_into(op, op.args[0], inner):
                self._in_place[op] = IN_PLACE[op.target]

    def run(self, values: Values, own: Mapping[int, Moments] = NOTHING) -> Values:
        return self._run(values, self._normalising({**self._stands_in, **own}))

    def _normalising(self, own: Mapping[int, Moments]) -> dict[Op, Callable[[Value], Any]]:
        """What runs in the place of calls that are normalised with given moments; chains read theirs where their layer's are stored."""
        steps = {}
        chains: dict[tuple[str, str], Moments] = {}
        for i, (op, names) in self._calls.items():
            if i in own and is_batchnorm(op):
                steps[op] = normalising(op, own[i])
            elif i in own:  # several calls of one in a micro-batch are pooled
                chains[names] = chains[names] + own[i] if names in chains else own[i]
        for names, moments in chains.items():
            for name, exact in zip(names, (moments.mean, moments.variance()), strict=True):
                old = self._stored.tensor(name)
                self._stored.replace(name, torch.from_numpy(exact).to(old.dtype).reshape(old.shape))
        return steps

    def _run(self, values: Values, normalising: Mapping[Op, Callable[[Value], Any]]) -> Values:
        env: dict[Op, Any] = {op: self._tensor(values[op.name]) for op in self._part.reads}
        sizes = self._sizes(values)
        known = dict(zip(self._symbols, sizes.tolist(), strict=True))

        def value(op: Op) -> Any:
            if op in env:
                return env[op]
            size = op.meta.get("val")
            if isinstance(size, torch.SymInt):
                return _evaluated(size, known)
            return size if isinstance(size, int) else self._stored.value(op)

        for op in self._nodes:
            try:
                if op in normalising:
                    env[op] = normalising[op](value)
                else:
                    env[op] = called(op, value, self._stored.device, self._in_place.get(op))
            except Exception as error:  # operators raise what they like
                if isinstance(error, BnfoldError) or out_of_memory(error):
                    raise
                raise run_failed(error, op.name, "these data", self._stored.device) from None
            for source in self._drops[op]:
                env.pop(source, None)
        return {op.name: env[op] for op in self._part.makes} | ({SIZES: sizes} if self._first else {})

    def measure(self, array: Any, through: Pointwise | None = None) -> Samples:
        meter, tensor = self._stored.meter, self._tensor(array)
        return meter.measure(tensor) if through is None else meter.measure_through(tensor, through)

    def waiting(self, array: Any, room: int) -> Any:
        if not isinstance(array, Tensor):
            return np.asarray(array)
        if array.device.type == "cpu" or array.nbytes > room:
            return to_numpy(array)
        part = array.untyped_storage().nbytes() > array.nbytes  # it would keep what it is a part of
        return array.clone() if part else array

    def _tensor(self, array: Any) -> Tensor:
        return array if isinstance(array, Tensor) else to_tensor(np.asarray(array)).to(self._stored.device)

    def _sizes(self, values: Values) -> npt.NDArray[np.int64]:
        """The symbols' sizes in this micro-batch, in their order."""
        if not self._first:
            return np.asarray(values[SIZES]) if self._symbols else np.zeros(0, np.int64)
        return np.array([values[name].shape[axis] for name, axis in self._symbols.values()], np.int64)


def _evaluated(size: torch.SymInt, known: Mapping[Any, int]) -> int:
    expression = size.node.expr
    if not expression.free_symbols <= known.keys():
        raise UnsupportedError("a size in this model depends on the data's values, which lockstep can't follow: export it to ONNX")
    return int(expression.subs(known))


def _fits_into(op: Op, source: Any, inner: Collection[Op]) -> bool:
    """Whether a result fits into the storage of an input that nobody else reads."""
    if source not in inner or operator_name(source) not in FRESH or list(source.users) != [op] or viewed(op) is not None:
        return False
    one, other = op.meta["val"], source.meta["val"]
    shapes = [[n.node.expr if isinstance(n, torch.SymInt) else n for n in each.shape] for each in (one, other)]
    return bool(one.dtype == other.dtype and shapes[0] == shapes[1])
