"""A PyTorch model that runs: in its stored types on a device, as its user runs it, and in float64, operator by operator.

TF32, whose rounding hides real defects, is off while a model runs here, unless it shall run as it is deployed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter
from torch.fx import Node as Op
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bnfold.capture import Switch
from bnfold.data.inputs import check_feeds
from bnfold.errors import DataError, DeviceError, UnsupportedError, UsageError
from bnfold.model import Placement
from bnfold.text import first_line

from ..export.copies import duplicate
from ..export.tensors import flat_outputs, to_numpy, to_tensor
from ..export.trace import Traced
from ..export.walk import FLOATS, dtype_of, in_training, is_batchnorm, is_tensor, mutates, operator_name, written
from ..export.weights import weights
from .widen import call, reads_bits, widened, writes_bits

if TYPE_CHECKING:
    from bnfold.data import Batch, InputSpec

MOVED = 1 / 12  # the share of stored numbers that move by a unit in the last place, with the variance of rounding itself


def device_of(name: str) -> torch.device:
    """A device by its name, "cpu", "cuda" or "cuda:1". Raises UsageError for another name, DeviceError where it isn't there."""
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UsageError(f"PyTorch models run on cpu or cuda, not on {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "there is no CUDA device, or no driver for it"
        raise DeviceError(f"device {name} isn't available: {why}; use --device cpu")
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        raise DeviceError(f"device {name} isn't available: there are {torch.cuda.device_count()}; use --device cuda")
    return torch.device(name)


@contextmanager
def precise() -> Iterator[None]:
    """Without gradients, and with float32 in full."""
    with _full(), torch.no_grad():
        yield


def _set_tf32(values: Sequence[bool]) -> list[bool]:
    flags: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag, value in zip(flags, values, strict=True):
        flag.allow_tf32 = value
    return before


_full = Switch(lambda: _set_tf32((False, False)), _set_tf32)  # for the whole process


def precisions(device: str) -> tuple[str, ...]:
    """In which a model is tried on a device: "full", and "as deployed" where PyTorch's settings let TF32 in."""
    coarse = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return ("full", "as deployed") if device.startswith("cuda") and coarse else ("full",)


class Where(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives its base class no types
    """Counts the operators that are called, and those whose results lie on a device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the same
        self.device, self.there, self.all = device, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        if tensors := [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]:
            self.all += 1
            self.there += all(tensor.device.type == self.device.type for tensor in tensors)
        return returned


class Session:
    """A model in its stored types on a device.

    jitter: a seed; one in twelve of its weights (see `weights`) is then moved to the next stored number, up or down. precision: "full", or
    "as deployed", with PyTorch's own settings for TF32. placement: on another device than the CPU, after the first run, the operators
    that it called. Raises DeviceError where the device isn't there.
    """

    def __init__(self, traced: Traced, *, device: str = "cpu", jitter: int | None = None, precision: str = "full") -> None:
        self.device = device_of(device)
        self.placement: Placement | None = None
        self._exact = precision == "full"
        self._traced = traced
        if isinstance(traced.model, ExportedProgram):
            program = traced.model
            if self.device.type != "cpu":
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, str(self.device))
            module: nn.Module = program.module()
            if jitter is not None or _updates(traced.program):
                module = duplicate(module)
        else:
            module = traced.model
            there = all(t.device == self.device for t in (*module.parameters(), *module.buffers()))
            if jitter is not None or not there or any(each.training for each in module.modules()):
                module = duplicate(module).to(self.device)
        if jitter is not None:
            move_weights(module, weights(traced.program), jitter)
        self._module = module

    @property
    def specs(self) -> list[InputSpec]:
        """What the model is fed."""
        return self._traced.specs

    def flat(self, item: Any) -> dict[str, Any] | None:
        """See `Traced.flat`."""
        return self._traced.flat(item)

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]:
        """The outputs by name. Raises DataError for feeds that don't fit."""
        check_feeds(feeds, self._traced.specs)
        call = self._traced.call({name: to_tensor(np.array(array)).to(self.device) for name, array in feeds.items()})
        args, kwargs = pytree.tree_map(lambda leaf: leaf.to(self.device) if isinstance(leaf, Tensor) else leaf, (call.args, call.kwargs))
        where = Where(self.device) if self.placement is None and self.device.type != "cpu" else None
        with precise() if self._exact else torch.no_grad():
            try:
                with where or nullcontext():
                    returned = self._module(*args, **kwargs)
            except torch.OutOfMemoryError as error:
                raise DeviceError(f"not enough memory on {self.device}: {first_line(error)}; use a smaller batch size") from None
            except Exception as error:  # the model's code raises what it likes
                shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in feeds.items())
                text = f"PyTorch can't run the model on {shapes}: {first_line(error)}"
                raise (UnsupportedError if "not implemented" in str(error) else DataError)(text) from None
        if where is not None:
            self.placement = Placement(where.there, where.all, "operators")
        return {name: to_numpy(tensor) for name, tensor in flat_outputs(returned).items()}


class Oracle:
    """A model in float64, from its graph: casts to another floating-point type give float64 too, and what reads bits reads those that
    are stored (see `widen`).

    jitter: a seed; every weight (see `weights`) is then moved by up to half a unit in the last place of its stored type, which is what
    rounding may have done to it. outputs: inner values to return besides the model's outputs, by their names in the graph.
    """

    def __init__(self, traced: Traced, *, jitter: int | None = None, outputs: Iterable[str] = ()) -> None:
        self._traced = traced
        program = traced.program
        if where := writes_bits(program.graph.nodes):
            raise UnsupportedError(f"the model writes into numbers by their bits (in {where}), which has no form in float64")
        self._writes = any(mutates(op) for op in program.graph.nodes)
        self._held: dict[str, Any] = {}
        moving = frozenset() if jitter is None else weights(program)
        for spec in program.graph_signature.input_specs:
            if spec.target is None:
                continue
            held = program.state_dict.get(spec.target)
            held = program.constants.get(spec.target) if held is None else held
            if isinstance(held, Tensor):
                held = _exact(held, _seed(spec.target, jitter) if jitter is not None and spec.target in moving else None)
            self._held[spec.arg.name] = held
        self._wanted = dict(traced.output_nodes)
        by_name = {op.name: op for op in program.graph.nodes}
        self._wanted.update({name: by_name[name] for name in outputs if name in by_name})
        needed = set(self._wanted.values())
        self._last: dict[Op, list[Op]] = {}  # the values that nobody reads after an operator
        seen: set[Op] = set()
        for op in reversed(program.graph.nodes):
            for source in op.all_input_nodes:
                if source not in seen and op.op != "output":
                    seen.add(source)
                    if source not in needed:
                        self._last.setdefault(op, []).append(source)

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]:
        """The outputs by name, floating-point ones in float64. Raises DataError for feeds that don't fit."""
        check_feeds(feeds, self._traced.specs, any_float=True)
        program = self._traced.program
        values: dict[Op, Any] = {}
        with torch.no_grad():
            for op in program.graph.nodes:
                if op.op == "placeholder":
                    held = self._held.get(op.name)
                    values[op] = widened(to_tensor(np.array(feeds[op.name]))) if op.name in feeds else _own(held)
                elif op.op == "get_attr":
                    values[op] = self.attribute(op)
                elif op.op == "call_function":
                    values[op] = self._call(op, values)
                    for source in self._last.get(op, ()):
                        values.pop(source, None)
        return {name: widened(values[op]).numpy() for name, op in self._wanted.items() if isinstance(values.get(op), Tensor)}

    def attribute(self, op: Op) -> Any:
        """What a get_attr fetches: a tensor, or the graph of a branch or a loop, which computes in float64 too."""
        found = attrgetter(str(op.target))(self._traced.program.graph_module)
        return _ExactBody(found).run if isinstance(found, GraphModule) else _own(found)

    def _call(self, op: Op, values: dict[Op, Any]) -> Any:
        if operator_name(op) == "_assert_tensor_metadata":  # of the stored types
            return None
        try:
            returned = self._returned(op, values)
        except Exception as error:  # operators raise what they like
            if "not implemented" in str(error):
                raise UnsupportedError(f"{op.target} has no form in float64: {first_line(error)}") from None
            raise DataError(f"PyTorch can't run the model on these data: {first_line(error)} (in {op.name})") from None
        if self._writes and operator_name(op) in ("to", "type_as") and dtype_of(op) != dtype_of(op.args[0]):
            return returned.clone()  # as the cast does that float64 makes needless
        return returned

    def _returned(self, op: Op, values: dict[Op, Any]) -> Any:
        try:
            return call(op, values.__getitem__)
        except Exception:
            if reads_bits(op) or mutates(op):
                raise
            try:
                return call(op, values.__getitem__, stored=True)  # some have no other form (what quantises, say)
            except Exception:
                pass
            raise


class _ExactBody(Interpreter):
    """The graph of a branch or a loop in float64."""

    def run_node(self, n: Op) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        return None if operator_name(n) == "_assert_tensor_metadata" else call(n, self.env.__getitem__)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = super().get_attr(target, args, kwargs)
        return _ExactBody(found).run if isinstance(found, GraphModule) else _own(found)


def _updates(program: ExportedProgram) -> bool:
    """Whether a program writes into its buffers when it runs, such as running statistics in training mode."""
    held = {spec.arg.name for spec in program.graph_signature.input_specs if spec.target is not None}
    written_to = {each.name for op in program.graph.nodes if mutates(op) for each in written(op)}
    trained = any(is_batchnorm(op) and in_training(op) for op in program.graph.nodes)
    return trained or bool(program.graph_signature.buffers_to_mutate) or not held.isdisjoint(written_to)


def inner(traced: Traced) -> list[Op]:
    """The operators whose floating-point output can be looked at."""
    return [op for op in traced.program.graph.nodes if op.op == "call_function" and is_tensor(op) and op.meta["val"].dtype in FLOATS]


def _own(held: Any) -> Any:
    """What an operator that writes in place may write to."""
    return widened(held).clone() if isinstance(held, Tensor) else held


def _seed(name: str, jitter: int) -> int:
    import zlib

    return zlib.crc32(f"{jitter} {name}".encode())


def _exact(tensor: Tensor, seed: int | None) -> Tensor:
    """A stored tensor in float64; with a seed, moved by up to half a unit in the last place."""
    exact = widened(tensor)
    if seed is None:
        return exact
    # The exponent's bits alone are the power of two below the number; times epsilon, it is a unit in the last place.
    power = (exact.contiguous().view(torch.int64) & 0x7FF0_0000_0000_0000).view(torch.float64)
    moved = torch.rand(exact.shape, generator=torch.Generator().manual_seed(seed)).double().sub_(0.5)
    moved.mul_(power).mul_(torch.finfo(tensor.dtype).eps).add_(exact)
    finite = exact.isfinite()
    return moved if finite.all() else torch.where(finite, moved, exact)


def move_weights(module: nn.Module, names: Iterable[str], seed: int) -> None:
    """Move one in twelve of the numbers of some of a module's tensors to the next stored number, up or down."""
    done = set()
    with torch.no_grad():
        for name in sorted(names):
            try:
                tensor = attrgetter(name)(module)
            except AttributeError:  # a constant that the code makes afresh
                continue
            if id(tensor) in done:
                continue
            done.add(id(tensor))
            draw = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(_seed(name, seed))).to(tensor.device)
            up, down = (torch.nextafter(tensor, torch.full_like(tensor, end)) for end in (float("inf"), float("-inf")))
            keep = (tensor == 0) | ~tensor.isfinite() | (draw >= MOVED)
            tensor.copy_(torch.where(keep, tensor, torch.where(draw < MOVED / 2, up, down)))
