"""The original module and a folded copy, run on the same calls: the traced ones, and others, wherever the original runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node as Op
from torch.utils import _pytree as pytree

from bnfold.errors import UnsupportedError

from ..export.call import Call, as_call
from ..export.copies import duplicate
from ..export.observers import settled_quantisers
from ..export.other_calls import OtherCall, other_calls, shapes_text, users_shapes
from ..export.regions import kind_of
from ..export.trace import Traced, at_its_sizes
from ..export.walk import frames, operator_name
from ..export.weights import weights
from ..runtime.eager import Eager, alike, eager
from ..runtime.session import move_weights

CLOSE = 1e-7  # of the largest number: a right fold differs by 1e-14 or so in float64, a wrong one by more than 1e-3
STORED_CLOSE = {torch.float64: CLOSE, torch.float32: 1e-3}  # where a model doesn't run in float64; for half precision:
HALF_CLOSE = 0.05


def users_call(traced: Traced) -> OtherCall | None:
    """The user's own call, where what was traced is it with twice the samples, and comes by other modules."""
    assert isinstance(traced.model, nn.Module)
    call = traced.calls[0] if traced.calls else None
    shapes = None if call is None else users_shapes(traced, call)
    if call is None or shapes is None or (text := shapes_text(traced, shapes)) == shapes_text(traced):
        return None
    met = {path for op in traced.program.graph.nodes for path in frames(op)}
    return None if eager(traced.model, exact=False).called(call) <= met else OtherCall(call, text)


class DifferentialTest:
    """Of folded copies of a module."""

    def __init__(self, traced: Traced) -> None:
        assert isinstance(traced.model, nn.Module)
        self._module = traced.model
        read = [(each, *other_calls(each)) for each in (traced, *traced.others)]
        self._read = [(each, own) for each, own, _ in read]
        self.traced = [own for _, own in self._read]
        self.others = [other for *_, others in read for other in others]
        self._expected: dict[int, Any] = {}
        kinds = {t.dtype for t in itertools.chain(self._module.parameters(), self._module.buffers()) if t.is_floating_point()}
        self.exact = not _branches(traced) and all(eager(self._module, True)(other.call) is not None for other in self.traced)
        self._close = CLOSE if self.exact else max((STORED_CLOSE.get(kind, HALF_CLOSE) for kind in kinds), default=CLOSE)

    @cached_property
    def _reference(self) -> Eager:
        return eager(self._module, self.exact)

    def differing(self, copy: nn.Module, others: Iterable[OtherCall] = ()) -> OtherCall | None:
        """The first call on which a folded copy gives something else than the original, which gives the same each time.

        None too where they differ on a traced call, though the code of both calls the same operators: that is no matter of paths, and for
        the check to find.
        """
        run = Eager(settled_quantisers(copy), exact=self.exact)
        for traced, other in self._read:
            if self._differs(other.call, run):
                return other if run(other.call) is None or _other_operators(traced, copy, other.call) else None
        for other in others or self.others:
            calls = (other.call,) if other.twin is None else (other.call, other.twin)
            if all(self._differs(call, run, other.ranks) for call in calls):
                return other
        return None

    def _differs(self, call: Call, run: Eager, ranks: bool = False) -> bool:
        if id(call) not in self._expected:
            self._expected[id(call)] = self._reference(call)
        want = self._expected[id(call)]
        if want is None or alike(want, run(call), self._close, ranks=ranks):
            return False
        again = eager(self._module, self.exact)(call)
        return again is not None and alike(want, again, self._close)


def compared(reference: Traced, candidate: Traced) -> tuple[Any, Any, Any, list[tuple[str, Call]]] | None:
    """See `TorchModel.elsewhere`."""
    if not isinstance(reference.model, nn.Module) or not isinstance(candidate.model, nn.Module):
        return None
    original, copy = reference.model, candidate.model
    traced, others = other_calls(reference)
    exact = not _branches(reference) and all(eager(module, True)(traced.call) is not None for module in (original, copy))

    def moved(seed: int) -> Any:
        module = duplicate(original)
        move_weights(module, weights(reference.program), seed)
        return eager(module, exact).run

    def theirs(call: Call) -> Any:
        if candidate.flat_names != reference.flat_names:
            call = candidate.call(dict(zip((op.name for op in candidate.input_nodes), call.tensors, strict=True)))
        return run_copy.run(call)

    run_copy = eager(copy, exact)
    stated = [(f"call {k} of the example", call) for k, call in enumerate(reference.calls[1:], 2)]
    tried = [(other.text, other.call) for other in others if not other.ranks]
    return eager(original, exact).run, theirs, moved, stated + tried


def _branches(traced: Traced) -> bool:
    """Whether there are torch.cond and its like, which torch compiles when they are called, and can't beneath a mode of another's."""
    return any(kind_of(op) for op in traced.program.graph.nodes)


def _other_operators(traced: Traced, copy: nn.Module, call: Call) -> bool:
    """Whether a folded copy calls other operators than the original, apart from those in what was replaced."""
    assert isinstance(traced.model, nn.Module)
    theirs = dict(copy.named_modules(remove_duplicate=False))

    def kind(module: nn.Module | None) -> Any:
        return None if module is None else (type(module), len(module._forward_pre_hooks))

    gone = {path for path, module in traced.model.named_modules(remove_duplicate=False) if kind(module) != kind(theirs.get(path))}

    def operators(program: ExportedProgram) -> Counter[Any]:
        own = (op for op in program.graph.nodes if operator_name(op) and gone.isdisjoint(frames(op)))
        return Counter((tuple(frames(op)), operator_name(op), _numbers(op)) for op in own)

    try:
        folded = at_its_sizes(dataclasses.replace(traced, model=copy), as_call(copy, call))
        return operators(at_its_sizes(traced, call).program) != operators(folded.program)
    except UnsupportedError:
        return False


def _numbers(op: Op) -> str:
    """The settings of an operator, but for types: a copy in float64 states its own."""
    leaves = pytree.tree_leaves((op.args, dict(op.kwargs)))
    return str([leaf for leaf in leaves if isinstance(leaf, (bool, int, float, str))])
