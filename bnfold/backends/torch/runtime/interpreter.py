"""A PyTorch graph, run one operator at a time: in float64, and in its stored types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.fx
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph as Ops
from torch.fx import GraphModule
from torch.fx import Node as Op

from bnfold.data.inputs import check_feeds
from bnfold.errors import DataError, UnsupportedError
from bnfold.text import first_line

from ..export.regions import under
from ..export.tensors import to_tensor
from ..export.trace import Traced
from ..export.walk import FLOATS, dtype_of, function, is_tensor, mutates, operator_name
from ..export.weights import weights
from .session import Session, precise, seed_of
from .widen import call, reads_bits, widened, writes_bits

if TYPE_CHECKING:
    from bnfold.data import Batch


class Interpreter:
    """Runs a graph one operator at a time. The back half of it says how: what becomes of a feed, of what the program holds, of a call."""

    any_float = False

    def __init__(self, traced: Traced) -> None:
        self.traced, self.program = traced, traced.program
        self.tensors = stored_tensors(traced.program)  # by the names of their placeholders

    def values(self, feeds: Batch) -> Iterator[tuple[Op, Any]]:
        """Each operator and what it gives, held no longer than something reads it. Raises DataError for feeds that don't fit."""
        check_feeds(feeds, self.traced.specs, any_float=self.any_float)
        last = _last_uses(self.program.graph)
        values: dict[Op, Any] = {}
        for op in self.program.graph.nodes:
            with precise():
                if op.op == "placeholder":
                    fed = op.name in feeds
                    values[op] = self.fed(to_tensor(np.array(feeds[op.name]))) if fed else self.own(self.tensors.get(op.name))
                elif op.op == "get_attr":
                    values[op] = self.own(attrgetter(str(op.target))(self.program.graph_module))
                elif op.op == "call_function":
                    values[op] = self.called(op, values)
            if op in values:
                yield op, values[op]
            for dead in last.get(op, ()):
                values.pop(dead, None)

    def fed(self, tensor: Tensor) -> Tensor:
        return tensor

    def own(self, stored: Any) -> Any:
        """What an operator that writes in place may write to; the graph of a branch or a loop as a function."""
        return stored.detach().clone() if isinstance(stored, Tensor) else stored

    def called(self, op: Op, values: dict[Op, Any]) -> Any:
        raise NotImplementedError


class Oracle(Interpreter):
    """A model in float64, from its graph: casts to another floating-point type give float64 too, and what reads bits reads those that
    are stored (see `widen`).

    jitter: a seed; every weight (see `weights`) is then moved by up to half a unit in the last place of its stored type, which is what
    rounding may have done to it. outputs: inner values to return besides the model's outputs, by their names in the graph.
    """

    any_float = True

    def __init__(self, traced: Traced, *, jitter: int | None = None, outputs: Iterable[str] = ()) -> None:
        super().__init__(traced)
        if where := writes_bits(self.program.graph.nodes):
            raise UnsupportedError(f"the model writes into numbers by their bits (in {where}), which has no form in float64")
        self._writes = any(mutates(op) for op in self.program.graph.nodes)
        moving = frozenset() if jitter is None else weights(self.program)
        targets = {spec.arg.name: spec.target for spec in self.program.graph_signature.input_specs if spec.target is not None}
        for name, tensor in self.tensors.items():
            if isinstance(tensor, Tensor):
                seed = seed_of(targets[name], jitter) if jitter is not None and targets[name] in moving else None
                self.tensors[name] = _exact(tensor, seed)
        by_name = {op.name: op for op in self.program.graph.nodes}
        self._wanted = traced.output_nodes | {name: by_name[name] for name in outputs if name in by_name}

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]:
        """The outputs by name, floating-point ones in float64. Raises DataError for feeds that don't fit."""
        wanted = set(self._wanted.values())
        found = {op: value for op, value in self.values(feeds) if op in wanted and isinstance(value, Tensor)}
        return {name: widened(found[op]).numpy() for name, op in self._wanted.items() if op in found}

    def fed(self, tensor: Tensor) -> Tensor:
        return widened(tensor)

    def own(self, stored: Any) -> Any:
        return _own(stored)

    def called(self, op: Op, values: dict[Op, Any]) -> Any:
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


class _ExactBody(torch.fx.Interpreter):
    """The graph of a branch or a loop in float64."""

    def run_node(self, n: Op) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        return None if operator_name(n) == "_assert_tensor_metadata" else call(n, self.env.__getitem__)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _own(super().get_attr(target, args, kwargs))


def _own(stored: Any) -> Any:
    if isinstance(stored, GraphModule):
        return _ExactBody(stored).run
    return widened(stored).clone() if isinstance(stored, Tensor) else stored


class StoredTypes(Interpreter):
    """A model in its stored types. jitter: as for `Session`."""

    def __init__(self, traced: Traced, *, jitter: int | None = None) -> None:
        super().__init__(traced)
        if jitter is not None:
            module = Session(traced, jitter=jitter).module
            moved = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            for spec in self.program.graph_signature.input_specs:
                if spec.target in moved:
                    self.tensors[spec.arg.name] = moved[spec.target].detach()

    def called(self, op: Op, values: dict[Op, Any]) -> Any:
        args, kwargs = torch.fx.node.map_arg((op.args, op.kwargs), values.__getitem__)
        try:
            with under(op):
                return function(op)(*args, **kwargs)
        except Exception as error:  # operators raise what they like
            raise UnsupportedError(f"{op.target} doesn't run in the stored type: {str(error)[:200]}") from None


def stored_tensors(program: ExportedProgram) -> dict[str, Any]:
    """The tensors that a program holds, by the names of their placeholders."""
    found: dict[str, Any] = {}
    for spec in program.graph_signature.input_specs:
        if spec.target is not None:
            held = program.state_dict.get(spec.target)
            held = program.constants.get(spec.target) if held is None else held
            found[spec.arg.name] = held.detach() if isinstance(held, Tensor) else held
    return found


def _last_uses(graph: Ops) -> dict[Op, list[Op]]:
    """The values that nobody reads after an operator, itself included where nobody reads it."""
    found: dict[Op, list[Op]] = {}
    seen: set[Op] = set()
    for op in reversed(graph.nodes):
        for each in (op, *op.all_input_nodes):
            if each not in seen:
                seen.add(each)
                found.setdefault(op, []).append(each)
    return found


def inner(traced: Traced) -> list[Op]:
    """The operators whose floating-point output can be looked at."""
    return [op for op in traced.program.graph.nodes if op.op == "call_function" and is_tensor(op) and op.meta["val"].dtype in FLOATS]


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
