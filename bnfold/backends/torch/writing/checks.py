"""Checks of what a module's own code does, by running it: on a copy by itself, and the original beside a folded copy.

By itself a module gets the arguments that it gets in the model's example. Beside each other, both run on the same calls: the traced ones,
and others, wherever the original runs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx import Node as Op
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bnfold.capture import quiet
from bnfold.errors import UnsupportedError
from bnfold.running import Elsewhere

from ..export.call import Call, as_call
from ..export.constants import weights
from ..export.copies import duplicate
from ..export.observers import settled_quantisers
from ..export.other_calls import OtherCall, other_calls, shapes_text, users_shapes
from ..export.regions import kind_of
from ..export.tensors import flat_outputs
from ..export.trace import Traced, at_its_sizes
from ..export.walk import FLOATS, dtype_of, frames, operator_name
from ..runtime.eager import Eager, alike, eager
from ..runtime.interpreter import within_rounding
from ..runtime.session import move_weights, seed_of, set_weights

Check = Callable[[nn.Module, Call], bool]
Key = TypeVar("Key", bound=tuple[str, ...])

CLOSE = 1e-9
CONVOLUTIONS = tuple(f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3))
WITH_BIAS = (*CONVOLUTIONS, "convolution", "linear", "layer_norm", "group_norm")


def passed(model: nn.Module, example: Call | None, checks: Mapping[Key, Check]) -> dict[Key, bool]:
    """The model is run once on its example, in evaluation mode: whether each check says yes at every call of its module.

    A key begins with the module's name. A check gets a copy of the module and its arguments in float64. A module that isn't called, or
    whose copy can't be run, says no.
    """
    found: dict[Key, bool] = {}
    if example is None:
        return found
    busy: list[Key] = []

    def watch(key: Key, module: nn.Module, args: Any, kwargs: Any) -> None:
        if busy or not found.get(key, True):
            return
        busy.append(key)
        try:
            found[key] = checks[key](duplicate(module).double(), Call(args, kwargs).map_tensors(partial(_own, double=True)))
        except Exception:  # the user's code may raise anything
            found[key] = False
        finally:
            busy.clear()

    try:
        with quiet(), torch.no_grad():
            copy = settled_quantisers(duplicate(model)).eval()
            for key in checks:
                copy.get_submodule(key[0]).register_forward_pre_hook(partial(watch, key), with_kwargs=True)
            example.map_tensors(_own).on(copy)
    except Exception:  # likewise
        return dict.fromkeys(checks, False)
    return found


def _own(tensor: Tensor, *, double: bool = False) -> Tensor:
    return tensor.detach().to(torch.float64 if double and tensor.is_floating_point() else tensor.dtype, copy=True)


def outputs(module: nn.Module, call: Call) -> list[Tensor]:
    return [*flat_outputs(call.map_tensors(_own).on(module)).values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two lists of outputs agree, but for rounding."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return False
    pairs = [(a.double(), b.double()) for a, b in zip(one, other, strict=True) if a.numel()]
    return all(bool((a - b).abs().max() <= CLOSE * max(float(a.abs().max()), 1e-30)) for a, b in pairs)


def bias_check(owner: str, weight: str | None, shape: tuple[int, ...], op: Node) -> Check:
    """Whether a bias given to the module `owner` inside the checked one is added to what the operator gives, and does nothing else.

    weight: the name of the owner's weight, None where that is computed: then the operator must be called once. shape: the weight's.
    """
    name = operator_name(op)
    spatial = len(shape) - 2 if name in (*CONVOLUTIONS, "convolution") else 0
    size = shape if name == "layer_norm" else (op.meta["val"].shape[1],) if spatial or name != "linear" else shape[:1]

    def check(module: nn.Module, call: Call) -> bool:
        holder = module.get_submodule(owner) if owner else module
        bias = torch.linspace(0.5, 1.5, int(torch.Size(size).numel()), dtype=torch.float64).reshape(size)
        bias = bias.to(next(t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()).device)
        own = None if weight is None else getattr(holder, weight)
        adding = _Adding(CONVOLUTIONS if spatial else (name,), own, bias.reshape(-1, *(1,) * spatial) if spatial else bias)
        with adding:
            want = outputs(module, call)
        holder.bias = nn.Parameter(bias)
        got = outputs(module, call)
        return adding.calls > 0 and (own is not None or adding.calls == 1) and same(want, got)

    return check


class _Adding(TorchFunctionMode):
    """Adds a bias to what the named functions give, where they read a weight (any, for None)."""

    def __init__(self, names: tuple[str, ...], weight: Any, bias: Tensor) -> None:
        super().__init__()
        self.names, self.weight, self.bias, self.calls = names, weight, bias, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        reads = self.weight is None or any(each is self.weight for each in (*args, *(kwargs or {}).values()))
        if getattr(func, "__name__", "") in self.names and reads:
            self.calls += 1
            return found + self.bias
        return found


NEAR = 1e-7  # of the largest number: a right fold differs by 1e-14 or so in float64, a wrong one by more than 1e-3
STORED_CLOSE = {torch.float64: NEAR, torch.float32: 1e-3}  # where a model doesn't run in float64; for half precision:
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
        self._expected: dict[int, Any] = {}
        for exact, small in ((True, True), (True, False), (False, False)) if not _branches(traced) else ((False, False),):
            self.exact, self._reference = exact, eager(self._module, exact)
            read = [(each, *other_calls(each, small=small)) for each in (traced, *traced.others)]
            self._read = [(each, own if small else _running(each, own, self._reference)) for each, own, _ in read]
            self.traced = [own for _, own in self._read]
            self.others = [other for *_, others in read for other in others]
            if all(self._wanted(own.call) is not None for own in self.traced):
                break
            self._expected.clear()
        kinds = {kind for each, _ in self._read for op in each.program.graph.nodes if (kind := dtype_of(op)) in FLOATS}
        self._close = NEAR if self.exact else max((STORED_CLOSE.get(kind, HALF_CLOSE) for kind in kinds), default=NEAR)

    def holds(self, copy: nn.Module) -> bool:
        """Whether a module gives what the original does in the traced calls."""
        run = eager(copy, self.exact)
        return not any(self._differs(own.call, run) for own in self.traced)

    def _wanted(self, call: Call) -> dict[str, Any] | None:
        """What the original gives."""
        if id(call) not in self._expected:
            self._expected[id(call)] = self._reference(call)
        found: dict[str, Any] | None = self._expected[id(call)]
        return found

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
        want = self._wanted(call)
        if want is None or alike(want, run(call), self._close, ranks=ranks):
            return False
        again = eager(self._module, self.exact)(call)
        return again is not None and alike(want, again, self._close)


def compared(reference: Traced, candidate: Traced) -> Elsewhere | None:
    """See `TorchModel.elsewhere`."""
    if not isinstance(reference.model, nn.Module) or not isinstance(candidate.model, nn.Module):
        return None
    original, copy = reference.model, candidate.model
    traced, others = other_calls(reference)
    traced = _running(reference, traced, eager(original, True))
    exact = not _branches(reference) and all(eager(module, True)(traced.call) is not None for module in (original, copy))

    def moved(seed: int) -> Any:
        module, names = duplicate(original), weights(reference.program)
        if exact:
            set_weights(module.cpu().double(), original, names, lambda tensor, name: within_rounding(tensor, seed_of(name, seed)))
        else:
            move_weights(module, names, seed)
        return eager(module, exact).run

    def theirs(call: Call) -> Any:
        if candidate.flat_names != reference.flat_names:
            call = candidate.call(dict(zip((op.name for op in candidate.input_nodes), call.tensors, strict=True)))
        return run_copy.run(call)

    run_copy = eager(copy, exact)
    stated = [(f"call {k} of the example", call) for k, call in enumerate(reference.calls[1:], 2)]
    tried = [(other.text, other.call) for other in others if not other.ranks]
    bounded = hasattr(copy, "_guards_fn")  # as torch's module of an exported program
    return Elsewhere(eager(original, exact).run, theirs, moved, stated + tried, bounded)


def _running(traced: Traced, own: OtherCall, run: Eager) -> OtherCall:
    """The traced call; as it was given, where a few samples of it alone don't run."""
    given = traced.calls[0] if traced.calls else own.call
    if run(own.call) is not None or run(given) is None:
        return own
    return OtherCall(given, shapes_text(traced, users_shapes(traced, given)))


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
