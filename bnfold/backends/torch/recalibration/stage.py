"""One stage of a PyTorch model: its operators, run one by one on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node as Op

from bnfold.errors import BnfoldError, DataError, DeviceError, UnsupportedError
from bnfold.recalibration.moments import Moments, Pointwise, Samples
from bnfold.recalibration.protocol import NOTHING, Reading, Values
from bnfold.recalibration.schedule import Cut

from ..export.constants import Constants
from ..export.regions import AUTOCAST, under
from ..export.trace import to_numpy, to_tensor
from ..export.walk import arguments, epsilon, in_training, is_batchnorm, is_tensor, operator_name, viewed
from .moments import Meter

# Operators with a form that writes into its input, for an input that nobody else reads.
IN_PLACE: dict[Any, Any] = {
    torch.ops.aten.relu.default: torch.ops.aten.relu_.default,
    torch.ops.aten.silu.default: torch.ops.aten.silu_.default,
    torch.ops.aten.hardtanh.default: torch.ops.aten.hardtanh_.default,
    torch.ops.aten.hardswish.default: torch.ops.aten.hardswish_.default,
    torch.ops.aten.leaky_relu.default: torch.ops.aten.leaky_relu_.default,
    torch.ops.aten.add.Tensor: torch.ops.aten.add_.Tensor,
}
Value = Callable[[Op], Any]  # gives the value of a node
FRESH = {"batch_norm", "conv1d", "conv2d", "conv3d", "convolution", "linear", "add"}  # their output shares no storage


class Held:
    """What an exported program holds, on the device: parameters, buffers, and what is computed from them, with the new statistics."""

    def __init__(self, program: ExportedProgram, constants: Constants, device: torch.device) -> None:
        self._program, self._constants, self.device = program, constants, device
        specs = program.graph_signature.input_specs
        self._targets = {s.arg.name: s.target for s in specs if s.target is not None and s.kind.name != "USER_INPUT"}
        self.meter = Meter(device)
        self._new: dict[str, Tensor] = {}
        self._values: dict[Op, Any] = {}

    def is_held(self, op: Op) -> bool:
        return op.op == "get_attr" or (op.op == "placeholder" and op.name in self._targets)

    def is_constant(self, op: Op) -> bool:
        """Whether a value is the same for all data."""
        return self._constants.is_constant(op) or self.is_held(op)

    def stored(self, target: str) -> Tensor:
        found: Tensor | None = self._program.state_dict.get(target)
        return self._program.constants[target] if found is None else found

    def replace(self, target: str, tensor: Tensor) -> None:
        self._new[target] = tensor.to(self.device)
        self._values.clear()  # something may have been computed from the old one

    def restore(self, target: str) -> None:
        self._new.pop(target, None)
        self._values.clear()

    def value(self, op: Op) -> Any:
        """The value of a constant."""
        if op not in self._values:
            self._values[op] = self._compute(op)
        return self._values[op]

    def _compute(self, op: Op) -> Any:
        found: Any
        if op.op == "placeholder":
            target = self._targets[op.name]
            if target in self._new:
                return self._new[target]
            found = self.stored(target).detach()
            trains = any(is_batchnorm(user) and in_training(user) for user in op.users)  # that one writes into it
            return found.clone().to(self.device) if trains else found.to(self.device)
        if op.op == "get_attr":
            found = self._program.graph_module
            for name in str(op.target).split("."):
                found = getattr(found, name)
            return found.detach().to(self.device) if isinstance(found, Tensor) else found
        return prepared(op, self)(self.value)


def prepared(op: Op, held: Held, target: Any = None) -> Callable[[Value], Any]:
    """What runs one operator, with its constants in place; it is given what gives the value of another node."""

    def settled(argument: Any) -> Any:
        if isinstance(argument, Op):
            return held.value(argument) if held.is_constant(argument) else argument
        if isinstance(argument, (list, tuple)):
            return [settled(each) for each in argument]
        return held.device if isinstance(argument, torch.device) else argument

    def given(argument: Any, value: Value) -> Any:
        if isinstance(argument, Op):
            return value(argument)
        return [given(each, value) for each in argument] if isinstance(argument, list) else argument

    run: Any = op.target if target is None else target
    args = [settled(each) for each in op.args]
    kwargs = {name: settled(each) for name, each in op.kwargs.items()}

    def step(value: Value) -> Any:
        return run(*[given(each, value) for each in args], **{name: given(each, value) for name, each in kwargs.items()})

    def in_region(value: Value) -> Any:
        with under(op):
            return step(value)

    return in_region if AUTOCAST in op.meta else step


def normalising(op: Op, held: Held, moments: Moments) -> Callable[[Value], Any]:
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


@contextmanager
def enough_memory(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"not enough memory on {device}: {_first_line(error)}; use a smaller batch size") from None


class TorchStage:
    """The operators of a `Cut`. With the values that wait between stages wait the sizes of the micro-batch.

    first, last: its place among the stages. calls: those that run here and may be normalised with what `run` or `stands_in` tells, and
    their layers; names: of each layer's mean and variance, for those that are no operator (see `lowering.affine.frozen_chains`).
    """

    def __init__(
        self,
        program: ExportedProgram,
        held: Held,
        cut: Cut[Op, Op],
        readings: list[Reading],
        calls: dict[int, tuple[Op, int]],
        names: Sequence[tuple[str, str]],
        *,
        first: bool,
        last: bool,
    ) -> None:
        self.readings = readings
        self._calls, self._names = calls, names
        self.stands_in: Mapping[int, Moments] = NOTHING
        self.needs = [op.name for op in cut.reads]
        self.keeps = dict.fromkeys(op.name for op in cut.keeps)
        self._held, self._cut, self._first = held, cut, first
        inputs = [op for op in program.graph.nodes if op.op == "placeholder" and not held.is_held(op) and is_tensor(op)]
        axes = [(op.name, axis, n.node.expr) for op in inputs for axis, n in enumerate(_shape(op)) if isinstance(n, torch.SymInt)]
        self._symbols = {expression: (name, axis) for name, axis, expression in axes if expression.is_symbol}
        if self._symbols:
            self.needs = list(dict.fromkeys([*self.needs, *(op.name for op in inputs)])) if first else [*self.needs, SIZES]
            if not last:
                self.keeps[SIZES] = None
        self._nodes = [op for each in cut.nodes for op in (each, *parts(each))]
        self._steps: list[tuple[Op, Callable[[Value], Any], list[Op]]] = []
        makes = set(cut.makes)
        self._drops: dict[Op, list[Op]] = {}
        self._in_place: set[Op] = set()
        inside, seen = set(self._nodes), set()
        for op in reversed(self._nodes):
            for source in dict.fromkeys(op.all_input_nodes):
                if source in inside and source not in seen and source not in makes:
                    seen.add(source)
                    self._drops.setdefault(op, []).append(source)
            target = op.args[0] if op.args else None
            if not isinstance(target, Op) or op.target not in IN_PLACE or operator_name(target) not in FRESH:
                continue
            if target in inside and target not in makes and list(target.users) == [op] and _alike(op, target):
                self._in_place.add(op)

    def run(self, values: Values, own: Mapping[int, Moments] = NOTHING) -> Values:
        with enough_memory(self._held.device):
            return self._run(values, self._told({**self.stands_in, **own}))

    def _told(self, own: Mapping[int, Moments]) -> dict[Op, Callable[[Value], Any]]:
        """What runs in the place of calls that are normalised with given moments; chains read theirs where their layer's are held."""
        steps = {}
        chains: dict[int, Moments] = {}
        for i, (op, layer) in self._calls.items():
            if i not in own:
                continue
            if is_batchnorm(op):
                steps[op] = normalising(op, self._held, own[i])
            else:  # several calls of one in a micro-batch are pooled
                chains[layer] = chains[layer] + own[i] if layer in chains else own[i]
        for layer, moments in chains.items():
            for name, exact in zip(self._names[layer], (moments.mean, moments.variance()), strict=True):
                old = self._held.stored(name)
                self._held.replace(name, torch.from_numpy(exact).to(old.dtype).reshape(old.shape))
            self._steps = []
        return steps

    def _run(self, values: Values, told: Mapping[Op, Callable[[Value], Any]]) -> Values:
        env: dict[Op, Any] = {}
        device = self._held.device
        for op in self._cut.reads:
            found = values[op.name]
            env[op] = found if isinstance(found, Tensor) else to_tensor(np.asarray(found)).to(device)
        sizes = self._sizes(values)
        known = dict(zip(self._symbols, sizes.tolist(), strict=True))

        def value(op: Op) -> Any:
            if op in env:
                return env[op]
            size = op.meta.get("val")
            if isinstance(size, torch.SymInt):
                return self._size(size, known)
            return size if isinstance(size, int) else self._held.value(op)

        if not self._steps:
            in_place = {op: IN_PLACE[op.target] for op in self._in_place}
            self._steps = [(op, prepared(op, self._held, in_place.get(op)), self._drops.get(op, [])) for op in self._nodes]
        for op, step, drops in self._steps:
            try:
                env[op] = told.get(op, step)(value)
            except (BnfoldError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # operators raise what they like
                raise DataError(f"PyTorch can't run {op.name} on these data: {_first_line(error)}") from None
            for source in drops:
                env.pop(source, None)
        return {op.name: env[op] for op in self._cut.makes} | ({SIZES: sizes} if self._first else {})

    def measure(self, array: Any, through: Pointwise | None = None) -> Samples:
        meter = self._held.meter
        with enough_memory(self._held.device):
            tensor = array if isinstance(array, Tensor) else to_tensor(np.asarray(array)).to(self._held.device)
            return meter.measure(tensor) if through is None else meter.measure_through(tensor, through)

    def held(self, array: Any, room: int) -> Any:
        if not isinstance(array, Tensor):
            return np.asarray(array)
        if array.device.type == "cpu" or array.nbytes > room:
            return to_numpy(array)
        part = array.untyped_storage().nbytes() > array.nbytes  # it would keep what it is a part of
        return array.clone() if part else array

    def _sizes(self, values: Values) -> npt.NDArray[np.int64]:
        """The symbols' sizes in this micro-batch, in their order."""
        if not self._first:
            return np.asarray(values[SIZES]) if self._symbols else np.zeros(0, np.int64)
        return np.array([values[name].shape[axis] for name, axis in self._symbols.values()], np.int64)

    def _size(self, size: torch.SymInt, known: dict[Any, int]) -> int:
        expression = size.node.expr
        if not expression.free_symbols <= known.keys():
            raise UnsupportedError("a size in this model depends on the data's values, which lockstep can't follow: export it to ONNX")
        return int(expression.subs(known))


SIZES = "sizes of the micro-batch"


def parts(op: Op) -> list[Op]:
    """The tensors of an operator that gives several."""
    return [] if is_tensor(op) else [user for user in op.users if getattr(user.target, "__name__", "") == "getitem"]


def _first_line(error: Exception) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text.strip().rstrip(".")


def _shape(op: Op) -> tuple[Any, ...]:
    value = op.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _alike(op: Op, source: Op) -> bool:
    """Whether a result fits into its first input's storage."""
    if not is_tensor(op) or viewed(op) is not None:
        return False
    one, other = op.meta["val"], source.meta["val"]
    shapes = [[n.node.expr if isinstance(n, torch.SymInt) else n for n in each.shape] for each in (one, other)]
    return one.dtype == other.dtype and shapes[0] == shapes[1]
