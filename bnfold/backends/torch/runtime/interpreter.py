"""A PyTorch graph, run one operator at a time: in float64, and in its stored types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.fx
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx import Node as Op

from bnfold.data import Batch
from bnfold.data.inputs import check_feeds
from bnfold.errors import BnfoldError, DataError, UnsupportedError
from bnfold.text import first_line

from ..export.constants import ProgramConstants, weights
from ..export.quantisers import quantiser
from ..export.regions import under
from ..export.tensors import to_tensor
from ..export.trace import Traced
from ..export.walk import FLOATS, dtype_of, function, is_item, is_tensor, mutates, operator_name, stored_targets, tensor_named
from .session import moved, precise, seed_of
from .widen import call, reads_bits, widened, writes_bits


class Interpreter(torch.fx.Interpreter):
    """Runs a graph in the types that it states. tensors: what its placeholders stand for, by their names, where nothing is fed.

    A subclass says what else becomes of a feed, of a stored tensor, of a call and of its failure.
    """

    def __init__(self, module: GraphModule, tensors: Mapping[str, Any] = MappingProxyType({})) -> None:
        super().__init__(module)
        self._tensors = tensors

    def values(self, feeds: Batch) -> Iterator[tuple[Op, Any]]:
        """Each operator and what it gives, held no longer than something reads it."""
        for op in self.graph.nodes:
            if op.op == "output":
                return
            with self.carefully():
                if op.op == "placeholder":
                    fed = op.name in feeds
                    self.env[op] = self.fed(to_tensor(np.array(feeds[op.name]))) if fed else self.own(self._tensors.get(op.name))
                else:
                    try:
                        self.env[op] = self.run_node(op)
                    except Exception as error:  # operators raise what they like
                        raise self.failure(op, error) from None
            yield op, self.env[op]
            for dead in (*self.user_to_last_uses.get(op, ()), *(() if op.users else (op,))):
                del self.env[dead]

    def run_node(self, n: Op) -> Any:
        if n.op == "call_function":
            return self.called(n)
        return self.own(self.fetch_attr(str(n.target))) if n.op == "get_attr" else super().run_node(n)

    def carefully(self) -> AbstractContextManager[Any]:
        return precise()

    def fed(self, tensor: Tensor) -> Tensor:
        return tensor

    def own(self, stored: Any) -> Any:
        """What an operator that writes in place may write to; the graph of a branch or a loop as a function."""
        return stored.detach().clone() if isinstance(stored, Tensor) else stored

    def called(self, op: Op) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(op)
        with under(op):
            return function(op)(*args, **kwargs)

    def failure(self, op: Op, error: Exception) -> BnfoldError:
        return UnsupportedError(f"{op.target} doesn't run in the stored type: {str(error)[:200]}")


class Float64Interpreter(Interpreter):
    """Casts to another floating-point type give float64 too, and what reads bits reads those that are stored (see `widen`).

    constants: of the program, where it quantises. rounds: whether it rounds activations to integers.
    """

    constants: ProgramConstants | None = None
    rounds = True

    def carefully(self) -> AbstractContextManager[Any]:
        return torch.no_grad()  # which is all on the CPU, and quicker

    def fed(self, tensor: Tensor) -> Tensor:
        return widened(tensor)

    def own(self, stored: Any) -> Any:
        if isinstance(stored, GraphModule):
            return Float64Interpreter(stored).run
        return widened(stored).clone() if isinstance(stored, Tensor) else stored

    def called(self, op: Op) -> Any:
        if operator_name(op) == "_assert_tensor_metadata":  # of the stored types
            return None
        rounding = None if self.rounds or is_item(op) else quantiser(op)
        if rounding is not None and not (self.constants is not None and self.constants.is_constant(op)):
            return self.env[rounding.source] if is_tensor(op) else (self.env[rounding.source],)
        returned = self._returned(op)
        if self._writes and operator_name(op) in ("to", "type_as") and dtype_of(op) != dtype_of(op.args[0]):
            return returned.clone()  # as the cast does that float64 makes needless
        return returned

    def _returned(self, op: Op) -> Any:
        try:
            return call(op, self.constants.as_run(op, self.env.__getitem__) if self.constants is not None else self.env.__getitem__)
        except Exception:
            if reads_bits(op) or mutates(op):
                raise
            with suppress(Exception):
                return call(op, self.env.__getitem__, stored=True)  # some have no other form (what quantises, say)
            raise

    @cached_property
    def _writes(self) -> bool:
        return any(map(mutates, self.graph.nodes))

    def failure(self, op: Op, error: Exception) -> BnfoldError:
        if "not implemented" in str(error):
            return UnsupportedError(f"{op.target} has no form in float64: {first_line(error)}")
        return DataError(f"PyTorch can't run the model on these data: {first_line(error)} (in {op.name})")


class TorchOracle:
    """A model in float64, from its graph.

    jitter: a seed; every weight (see `weights`) is then moved by up to half a unit in the last place of its stored type, which is what
    rounding may have done to it. outputs: inner values to return besides the model's outputs, by their names in the graph. rounds: whether
    it rounds activations to integers.
    """

    def __init__(self, traced: Traced, *, jitter: int | None = None, outputs: Iterable[str] = (), rounds: bool = True) -> None:
        self._rounds = rounds
        self._traced, program = traced, traced.program
        if where := writes_bits(program.graph.nodes):
            raise UnsupportedError(f"the model writes into numbers by their bits (in {where}), which has no form in float64")
        moving = frozenset() if jitter is None else weights(program)
        self._tensors = stored_tensors(program)
        for name, target in stored_targets(program).items():
            if isinstance(tensor := self._tensors[name], Tensor):
                seed = seed_of(target, jitter) if jitter is not None and target in moving else None
                self._tensors[name] = within_rounding(tensor, seed)
        self._constants = ProgramConstants(program) if any(map(quantiser, program.graph.nodes)) else None
        by_name = {op.name: op for op in program.graph.nodes}
        self._wanted = traced.output_nodes | {name: by_name[name] for name in outputs if name in by_name}

    def values(self, feeds: Batch) -> Iterator[tuple[Op, Any]]:
        """See `Interpreter.values`. Raises DataError for feeds that don't fit."""
        check_feeds(feeds, self._traced.specs, any_float=True)
        run = Float64Interpreter(self._traced.program.graph_module, self._tensors)
        run.constants, run.rounds = self._constants, self._rounds
        return run.values(feeds)

    def run(self, feeds: Batch) -> dict[str, npt.NDArray[Any]]:
        """The outputs by name, floating-point ones in float64. Raises DataError for feeds that don't fit."""
        wanted = set(self._wanted.values())
        found = {op: value for op, value in self.values(feeds) if op in wanted and isinstance(value, Tensor)}
        return {name: widened(found[op]).numpy() for name, op in self._wanted.items() if op in found}


class StoredTypes:
    """A model in its stored types, one operator at a time. jitter: as for `TorchSession`."""

    def __init__(self, traced: Traced, *, jitter: int | None = None) -> None:
        self._traced, program = traced, traced.program
        self._tensors = stored_tensors(program)
        if jitter is not None:
            names = {id(tensor_named(program, target)): target for target in sorted(weights(program), reverse=True)}
            for name, target in stored_targets(program).items():
                if (first := names.get(id(tensor_named(program, target)))) is not None:
                    self._tensors[name] = moved(self._tensors[name], seed_of(first, jitter))

    def values(self, feeds: Batch) -> Iterator[tuple[Op, Any]]:
        """As for `TorchOracle`."""
        check_feeds(feeds, self._traced.specs)
        return Interpreter(self._traced.program.graph_module, self._tensors).values(feeds)


def stored_tensors(program: ExportedProgram) -> dict[str, Any]:
    """What it stores, by the same names."""
    found = {name: tensor_named(program, target) for name, target in stored_targets(program).items()}
    return {name: tensor.detach() if isinstance(tensor, Tensor) else tensor for name, tensor in found.items()}


def rounds(program: ExportedProgram) -> bool:
    """Whether a program rounds activations to integers."""
    rounding = [op for op in program.graph.nodes if quantiser(op) is not None]
    return bool(rounding) and not all(map(ProgramConstants(program).is_constant, rounding))


def inner(traced: Traced) -> list[Op]:
    """The operators whose floating-point output can be looked at."""
    return [op for op in traced.program.graph.nodes if op.op == "call_function" and is_tensor(op) and op.meta["val"].dtype in FLOATS]


def within_rounding(tensor: Tensor, seed: int | None) -> Tensor:
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
