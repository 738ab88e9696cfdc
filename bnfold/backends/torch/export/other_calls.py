"""Other calls of a module than the one that was traced: other sizes, of which its code may make another path.

A trace shows one path. What a size decides shows in what torch.export had to assume of it: in the guards on the axes that it was asked to
leave open, and in the axes that it fixed all the same. From these, and from what people vary (one sample, odd, shorter, longer), come a
few calls on which the original and the folded copy are held against each other, wherever the original runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node as Op
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.printers import PythonPrinter

from bnfold.capture import quiet
from bnfold.errors import DataError, UnsupportedError
from bnfold.text import one_line
from bnfold.verification.noise import deviation, plain

from ..runtime.session import move_weights
from .call import Call, as_call
from .copies import duplicate
from .program import has_more_terms
from .regions import kind_of
from .sizes import Sizes
from .tensors import flat_outputs, to_numpy
from .trace import Traced, at_its_sizes
from .walk import FLOATS, frames, operator_name
from .weights import weights

CLOSE = 1e-7  # of the largest number: a right fold differs by 1e-14 or so in float64, a wrong one by more than 1e-3
STORED_CLOSE = {torch.float64: CLOSE, torch.float32: 1e-3}  # where a model doesn't run in float64; for half precision:
HALF_CLOSE = 0.05
FLIPPED = 0.01  # the share of integers that may differ, since some were decided by rounding
SAMPLES = 2  # in most calls
MOST_CALLS = 24  # that are tried
MOST_NUMBERS = 4.0  # that they feed, in all, as a multiple of two samples of the example
FEW_NUMBERS = 1 << 16  # which cost little in any case
LONGEST_SCAN = 512  # sizes that are held against a guard
LARGEST_SIZE = 1 << 16  # of an axis that is tried
MOST_TERMS = 200  # of a guard that is looked at

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Other:
    """A call at other sizes. text: which; ranks: whether it has other numbers of axes, of which broadcasting may make more again; twin:
    another that runs likewise if the code means it, not where sizes are equal by chance."""

    call: Call
    text: str
    ranks: bool = False
    twin: Call | None = None


def other_calls(traced: Traced) -> tuple[Other, list[Other]]:
    """A call of a module like the traced one, and a few at other sizes."""
    others = _Others(traced)
    return others.traced_call(), others.calls() if traced.specs else []


def own_call(traced: Traced) -> Other | None:
    """The user's own call, where what was traced is it with twice the samples, and comes by other modules."""
    call = traced.calls[0] if traced.calls else None
    shapes = None if call is None else _Others(traced).as_given(call)
    if call is None or shapes is None or _text(shapes) == shown(traced):
        return None
    run = _ready(traced.model, exact=False)  # type: ignore[arg-type]
    return None if run.calls(call) <= {path for op in traced.program.graph.nodes for path in frames(op)} else Other(call, _text(shapes))


def shown(traced: Traced) -> str:
    """The shapes with which a module was called when it was traced."""
    leaves = pytree.tree_leaves(traced.program.example_inputs)
    return _text({name: tuple(leaf.shape) for name, leaf in zip(traced.flat_names, leaves, strict=True) if isinstance(leaf, Tensor)})


class _Others:
    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        leaves = pytree.tree_leaves(traced.program.example_inputs)
        given = dict(zip(traced.flat_names, leaves, strict=True))
        self.tensors: dict[str, Tensor] = {op.name: given[op.name].detach() for op in traced.input_nodes}
        self.shape: dict[str, list[Any]] = {op.name: [_size(n) for n in op.meta["val"].shape] for op in traced.input_nodes}
        hints = Sizes(traced.program).probes[0]
        used = {symbol for sizes in self.shape.values() for n in sizes if not isinstance(n, int) for symbol in n.free_symbols}
        self.batch = {symbol for sizes in self.shape.values() for n in sizes[:1] if not isinstance(n, int) for symbol in n.free_symbols}
        self.hints = {symbol: min(n, SAMPLES) if symbol in self.batch else n for symbol, n in hints.items() if symbol in used}
        self.rest = [symbol for symbol in self.hints if symbol not in self.batch]

    def traced_call(self) -> Other:
        """The traced one, with a few samples."""
        shapes = self._shapes({})
        if shapes is None:
            shapes = {name: tuple(t.shape) for name, t in self.tensors.items()}
        return Other(self._call(shapes), _text(shapes))

    def calls(self) -> list[Other]:
        found: list[Other] = []
        usual = self._shapes({})
        seen: set[Any] = {self._key(usual)}
        own = self.traced.calls[:1]
        if own and (made := self.as_given(own[0])) is not None and self._key(made) not in seen:
            seen.add(self._key(made))
            found.append(Other(own[0], _text(made)))
        room = max(MOST_NUMBERS * (0 if usual is None else self._numbers(usual)), FEW_NUMBERS)
        for shapes, twin in self._all_shapes():
            if len(found) >= MOST_CALLS:
                break
            if shapes is None or self._key(shapes) in seen or (cost := self._numbers(shapes)) > room:
                continue
            seen.add(self._key(shapes))
            room -= cost
            ranks = any(len(shape) != self.tensors[name].ndim for name, shape in shapes.items())
            found.append(Other(self._call(shapes), _text(shapes), ranks, None if twin is None else self._call(twin)))
        return found

    def as_given(self, call: Call) -> Shapes | None:
        """The shapes of the user's own call, of which the traced one may have been made by doubling it."""
        leaves = [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
        return (
            {name: tuple(leaf.shape) for name, leaf in zip(self.tensors, leaves, strict=True)} if len(leaves) == len(self.tensors) else None
        )

    def _all_shapes(self) -> Iterator[tuple[Shapes | None, Shapes | None]]:
        """The most telling first."""
        one = dict.fromkeys(self.batch, 1)
        yield self._shapes(one), None
        for values in self._guarded():
            yield self._shapes(values), None
        for k, values in enumerate(self._usual()):
            yield self._shapes({**values, **dict.fromkeys(self.batch, (1, 3, SAMPLES)[k % 3])}), None
        fixed, apart = self._fixed()
        for sizes in fixed:
            yield self._shapes(one, sizes), None
        yield from self._ranks()
        for values in self._beyond():
            yield self._shapes(values), None
        for sizes in apart:
            yield self._shapes(one, sizes), None

    def _usual(self) -> Iterator[dict[Any, int]]:
        """Shorter, longer, odd and even, and the ends of what the trace holds for."""
        if not self.rest:
            yield {}
            return
        for times, more, odd in ((1, 1, 0), (0.5, 0, 1), (0.5, 0, 0), (2, 1, 0)):
            yield {symbol: max(1, int(times * self.hints[symbol]) + more) | odd for symbol in self.rest}
        limits = {symbol: self.traced.program.range_constraints.get(symbol) for symbol in self.rest}
        lower = {symbol: int(limit.lower) for symbol, limit in limits.items() if limit is not None and limit.lower.is_Integer}
        upper = {symbol: int(limit.upper) for symbol, limit in limits.items() if limit is not None and limit.upper.is_Integer}
        yield {**self.hints, **lower}
        yield from ({**self.hints, symbol: n} for symbol, n in lower.items() if len(lower) > 1)
        yield from ({**self.hints, symbol: n} for symbol, n in upper.items())

    def _guarded(self) -> list[dict[Any, int]]:
        """Sizes that what the trace assumed of them doesn't hold for: of each assumption and symbol the nearest on either side.

        Those come first that few assumptions are about: it is the arithmetic of windows that most are about.
        """
        found: dict[Any, dict[Any, int]] = {}
        for expression in self._assumptions():
            symbols = [symbol for symbol in self.hints if symbol in expression.free_symbols]
            if (holds := _compiled(expression, self.hints)) is None:
                continue
            for symbol in symbols:
                hint = self.hints[symbol]
                below = range(hint - 1, 0, -1)
                above = range(hint + 1, min(2 * hint + 64, hint + LONGEST_SCAN))
                for sizes in (below, above):
                    n = next((n for n in itertools.islice(sizes, LONGEST_SCAN) if not _try(holds, {**self.hints, symbol: n})), None)
                    if n is not None:
                        found.setdefault((symbol, n), {**self.hints, symbol: n})
        return list(found.values())

    def _beyond(self) -> list[dict[Any, int]]:
        """Sizes that what the trace assumed of them holds for no more, far above the example's: just past the range of each, or doubled."""
        limits = {symbol: self.traced.program.range_constraints.get(symbol) for symbol in self.hints}
        found = {
            (symbol, n): {**self.hints, symbol: n}
            for symbol, limit in limits.items()
            if limit is not None and limit.upper.is_Integer and (n := int(limit.upper) + 1) < LARGEST_SIZE
        }
        for expression in self._assumptions():
            if (holds := _compiled(expression, self.hints)) is None:
                continue
            for symbol in self.hints:
                doubled = (self.hints[symbol] << k for k in range(1, LARGEST_SIZE.bit_length()))
                sizes = itertools.takewhile(lambda n: n < LARGEST_SIZE, doubled) if symbol in expression.free_symbols else ()
                first = next((n for n in sizes if not _try(holds, {**self.hints, symbol: n})), None)
                if first is not None:
                    found.setdefault((symbol, first), {**self.hints, symbol: first})
        return list(found.values())

    def _assumptions(self) -> list[Any]:
        symbolic = (n for op in self.traced.input_nodes for n in op.meta["val"].shape if isinstance(n, torch.SymInt))
        first = next(symbolic, None)
        if first is None:
            return []
        guards = {guard.expr: None for guard in first.node.shape_env.guards}
        return [
            each for each in guards if each.free_symbols and each.free_symbols <= self.hints.keys() and not has_more_terms(each, MOST_TERMS)
        ]

    def _fixed(self) -> tuple[list[dict[tuple[str, int], int]], list[dict[tuple[str, int], int]]]:
        """Other sizes for axes that were asked to be open and that came back with one size, those of equal size together and apart; and
        for one of several that came back with sizes that hang together. Then more for those apart, which may be equal by chance."""
        groups: dict[Any, list[tuple[str, int]]] = {}
        tied: dict[Any, list[tuple[str, int]]] = {}
        for name, sizes in self.shape.items():
            for axis, n in enumerate(sizes):
                if isinstance(n, int):
                    groups.setdefault((axis == 0, n), []).append((name, axis))
                for symbol in () if isinstance(n, int) else n.free_symbols:
                    tied.setdefault(symbol, []).append((name, axis))
        changes = (lambda n: n + 1, lambda n: n // 2, lambda n: 1, lambda n: 2 * n, lambda n: n - 1)
        together = [dict.fromkeys(places, change(n)) for change in changes for (_, n), places in groups.items()]
        apart = [{place: change(n)} for change in changes for (_, n), places in groups.items() if len(places) > 1 for place in places]
        plus_one = sum(len(places) for places in groups.values() if len(places) > 1)
        hanging = [
            {(name, axis): self.tensors[name].shape[axis] + 1} for places in tied.values() if len(places) > 1 for name, axis in places
        ]
        return together + apart[:plus_one] + hanging, apart[plus_one:]

    def _ranks(self) -> Iterator[tuple[Shapes | None, Shapes | None]]:
        """Without the first axis, and with one more before it, each at two sizes, since an axis may take another's place by chance."""
        model = self.traced.model
        assert isinstance(model, nn.Module)
        taken = {t.numel() for t in itertools.chain(model.parameters(), model.buffers()) if t.ndim == 1}
        if not self.batch or any(not t.ndim for t in self.tensors.values()):
            return
        others = [self._shapes({**dict.fromkeys(self.batch, 1), **{s: self.hints[s] + k for s in self.rest}}) for k in range(2)]
        if all(shapes is not None for shapes in others) and (self.rest or all(t.ndim <= 2 for t in self.tensors.values())):
            dropped = [{name: shape[1:] for name, shape in shapes.items()} for shapes in others if shapes is not None]
            yield dropped[0], dropped[1] if self.rest else None
        free = [n for n in (3, 5, 7, 11, 13) if n not in taken][:2]
        added = [self._shapes(dict.fromkeys(self.batch, n)) for n in free]
        if len(free) == 2 and all(shapes is not None for shapes in added):
            one, other = ({name: (1, *shape) for name, shape in shapes.items()} for shapes in added if shapes is not None)
            yield one, other

    def _shapes(self, values: Mapping[Any, int], fixed: Mapping[tuple[str, int], int] | None = None) -> Shapes | None:
        """Every input's shape for the sizes of some symbols and of some axes; None where there is none."""
        known = {**self.hints, **values}
        found = {}
        for name, sizes in self.shape.items():
            shape = [n if isinstance(n, int) else n.subs(known) for n in sizes]
            shape = [(fixed or {}).get((name, axis), n) for axis, n in enumerate(shape)]
            try:
                found[name] = tuple(int(n) for n in shape)
            except TypeError:
                return None
            if any(n < 1 and old > 0 for n, old in zip(found[name], self.tensors[name].shape, strict=True)):
                return None
        return found

    def _call(self, shapes: Shapes) -> Call:
        return self.traced.call({name: _resized(self.tensors[name], shape) for name, shape in shapes.items()})

    def _key(self, shapes: Shapes | None) -> Any:
        return None if shapes is None else tuple(shapes.items())

    def _numbers(self, shapes: Shapes) -> float:
        return float(sum(math.prod(shape) for shape in shapes.values()))


def _size(n: Any) -> Any:
    """A size as a number or as a formula of symbols."""
    return int(n) if not isinstance(n, torch.SymInt) or n.node.expr.is_number else n.node.expr


def _compiled(expression: Any, symbols: Iterable[Any]) -> Callable[..., Any] | None:
    """A guard as a function of the sizes by symbol; None where it can't be written in Python."""
    names = {symbol: f"s_{i}" for i, symbol in enumerate(symbols)}
    try:
        text = PythonPrinter().doprint(expression.xreplace({s: type(s)(name, integer=True, positive=True) for s, name in names.items()}))
        code = compile(text, "guard", "eval")
    except Exception:  # sympy and torch's printer raise what they like
        return None
    place = {"math": math, "max": max, "min": min, "abs": abs}
    return lambda sizes: eval(code, {"__builtins__": {}}, {**place, **{names[s]: n for s, n in sizes.items() if s in names}})


def _try(holds: Callable[..., Any], sizes: Mapping[Any, int]) -> bool:
    try:
        return bool(holds(sizes))
    except Exception:  # a division by zero, or something that Python can't say: it says nothing of these sizes
        return True


def _resized(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor's own numbers, fewer of them or again, so that indices stay what they were; floats vary a little.

    An example of nothing but equal floats, as people make them up, becomes random.
    """
    while tensor.ndim < len(shape):
        tensor = tensor[None]
    while tensor.ndim > len(shape):
        tensor = tensor[0]
    for axis, n in enumerate(shape):
        if not tensor.shape[axis]:  # there is nothing to take again
            return tensor.new_zeros(shape)
        tensor = tensor.index_select(axis, torch.arange(n, device=tensor.device) % tensor.shape[axis])
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor.clone()
    generator = torch.Generator().manual_seed(tensor.numel())
    if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
        return torch.randn(shape, generator=generator).to(tensor)
    return tensor * (0.75 + 0.5 * torch.rand(shape, generator=generator)).to(tensor)


def _text(shapes: Shapes) -> str:
    texts = [f"{name} of shape ({', '.join(map(str, shape))}{',' * (len(shape) == 1)})" for name, shape in shapes.items()]
    return ", ".join(texts)


# --- running ------------------------------------------------------------------------------------------------------------------------


class _Float64(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives its base class no types
    """Whatever an operator would give in another floating-point type is float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mutable = func._schema.is_mutable

        def exact(leaf: Any) -> Any:
            if isinstance(leaf, torch.dtype):
                return torch.float64 if leaf in FLOATS else leaf
            return _double(leaf) if not mutable else leaf

        args, kwargs = pytree.tree_map(exact, (args, kwargs or {}))
        returned = func(*args, **kwargs)
        return returned if mutable else pytree.tree_map(_double, returned)


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.dtype in FLOATS and leaf.dtype != torch.float64 else leaf


class Run:
    """A module, called as its user calls it. exact: it is in float64 and on the CPU, where casts to another float type do nothing."""

    def __init__(self, module: nn.Module, *, exact: bool) -> None:
        self.exact, self._module = exact, module

    def __call__(self, call: Call) -> dict[str, Any] | None:
        """The outputs as arrays by name; None where it doesn't run."""
        try:
            return self.run(call)
        except (DataError, UnsupportedError):
            return None

    def calls(self, call: Call) -> set[str]:
        """The modules with parameters of their own that it calls."""
        found: set[str] = set()
        for name, module in self._module.named_modules():
            if name and any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(lambda module, given, name=name: found.add(name))
        self(call)
        return found

    def run(self, call: Call) -> dict[str, Any]:
        """The same. Raises DataError where it doesn't run."""

        def own(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return _double(leaf.detach().cpu().clone()) if self.exact else leaf.detach().clone()

        args, kwargs = pytree.tree_map(own, (call.args, call.kwargs))
        try:
            with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                if self.exact:
                    with _Float64():  # type: ignore[no-untyped-call]
                        returned = self._module(*args, **kwargs)
                else:
                    returned = self._module(*args, **kwargs)
                return plain({name: to_numpy(tensor) for name, tensor in flat_outputs(returned).items()})
        except Exception as error:  # the user's code raises what it likes
            raise DataError(one_line(error)) from None


def alike(want: Mapping[str, Any], got: Mapping[str, Any] | None, close: float, *, ranks: bool = False) -> bool:
    """Whether two runs gave the same, up to rounding; with `ranks`, also up to first axes of size 1."""
    if got is None or list(want) != list(got):
        return False
    for name, array in want.items():
        found = got[name]
        error, problem = deviation(*map(_without_ones, (array, found))) if ranks else deviation(array, found)
        if error is None or problem:
            return False
        if array.dtype.kind in "fc":
            largest = float(np.abs(np.where(np.isfinite(array), array, 0)).max(initial=0))
            if float(error.max(initial=0)) > close * largest:
                return False
        elif error.size and float(error.mean()) > FLIPPED:
            return False
    return True


def _without_ones(array: Any) -> Any:
    while array.ndim and len(array) == 1:
        array = array[0]
    return array


def compared(reference: Traced, candidate: Traced) -> tuple[Any, Any, Any, list[tuple[str, Call]]] | None:
    """See `TorchModel.elsewhere`."""
    if not isinstance(reference.model, nn.Module) or not isinstance(candidate.model, nn.Module):
        return None
    original, copy = reference.model, candidate.model
    traced, others = other_calls(reference)
    exact = not _branches(reference) and all(_ready(module, True)(traced.call) is not None for module in (original, copy))

    def moved(seed: int) -> Any:
        module = duplicate(original)
        move_weights(module, weights(reference.program), seed)
        return _ready(module, exact).run

    def theirs(call: Call) -> Any:
        if candidate.flat_names == reference.flat_names:
            return run_copy.run(call)
        tensors = [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
        return run_copy.run(candidate.call(dict(zip((op.name for op in candidate.input_nodes), tensors, strict=True))))

    run_copy = _ready(copy, exact)
    stated = [(f"call {k} of the example", call) for k, call in enumerate(reference.calls[1:], 2)]
    tried = [(other.text, other.call) for other in others if not other.ranks]
    return _ready(original, exact).run, theirs, moved, stated + tried


def _branches(traced: Traced) -> bool:
    """Whether there are torch.cond and its like, which torch compiles when they are called, and can't beneath a mode of another's."""
    return any(kind_of(op) for op in traced.program.graph.nodes)


def _ready(module: nn.Module, exact: bool) -> Run:
    """A copy of a module that runs."""
    own = duplicate(module)
    return Run(own.cpu().double() if exact else own, exact=exact)


def _otherwise(traced: Traced, copy: nn.Module, call: Call) -> bool:
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


class Trial:
    """The original, held against folded copies on other calls than the traced ones."""

    def __init__(self, traced: Traced) -> None:
        assert isinstance(traced.model, nn.Module)
        self._module = traced.model
        self._read: list[tuple[Traced, Other]] = []
        self._calls: list[Other] = []
        for each in (traced, *traced.others):
            own, others = other_calls(each)
            self._read.append((each, own))
            self._calls += others
        self.traced = [own for _, own in self._read]
        self._expected: dict[int, Any] = {}
        kinds = {t.dtype for t in itertools.chain(self._module.parameters(), self._module.buffers()) if t.is_floating_point()}
        self.exact = not _branches(traced) and all(self._original(True)(other.call) is not None for other in self.traced)
        self._close = CLOSE if self.exact else max((STORED_CLOSE.get(kind, HALF_CLOSE) for kind in kinds), default=CLOSE)

    def _original(self, exact: bool) -> Run:
        return _ready(self._module, exact)

    @cached_property
    def _reference(self) -> Run:
        return self._original(self.exact)

    def differs(self, copy: nn.Module, calls: Iterable[Other] = ()) -> Other | None:
        """The first call on which a folded copy gives something else than the original, which gives the same each time.

        None too where they differ on a traced call, though the code of both calls the same operators: that is no matter of paths, and for
        the check to find.
        """
        run = Run(copy, exact=self.exact)
        for traced, other in self._read:
            if self._parts(other.call, run):
                return other if run(other.call) is None or _otherwise(traced, copy, other.call) else None
        for other in calls or self._calls:
            if self._parts(other.call, run, other.ranks) and (other.twin is None or self._parts(other.twin, run, other.ranks)):
                return other
        return None

    def _parts(self, call: Call, run: Run, ranks: bool = False) -> bool:
        if id(call) not in self._expected:
            self._expected[id(call)] = self._reference(call)
        want = self._expected[id(call)]
        if want is None or alike(want, run(call), self._close, ranks=ranks):
            return False
        again = self._original(self.exact)(call)
        return again is not None and alike(want, again, self._close)
