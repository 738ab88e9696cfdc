"""Other calls of a module than the one that was traced: a few at other sizes, of which its code may make another path.

What a size decides shows in what torch.export had to assume of it, in the guards on the axes that it was asked to leave open. Of these,
and of what people vary (one sample, odd, shorter, longer), come sizes by the symbols of the trace (`OtherSizes`). Besides, there are sizes
for axes that torch.export fixed although it was asked to leave them open, and other numbers of axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from .call import Call
from .program import has_more_terms
from .sizes import Sizes, guards, limits
from .trace import Traced

MOST_CALLS = 24  # that are tried
MOST_NUMBERS = 4.0  # that they feed, in all, as a multiple of two samples of the example
FEW_NUMBERS = 1 << 16  # which cost little in any case

SAMPLES = 2  # in most calls
LONGEST_SCAN = 512  # sizes that are tried in a guard
LARGEST_SIZE = 1 << 16  # of an axis that is tried
MOST_TERMS = 200  # of a guard that is looked at
Values = dict[Any, int]  # symbol -> size

Shapes = Mapping[str, tuple[int, ...]]
Fixed = Mapping[tuple[str, int], int]  # the size of an input's axis


@dataclass(frozen=True, eq=False)
class OtherCall:
    """A call at other sizes. text: which; ranks: whether it has other numbers of axes, of which broadcasting may make more again; twin:
    another that runs likewise if the code means it, not where sizes are equal by chance."""

    call: Call
    text: str
    ranks: bool = False
    twin: Call | None = None


def other_calls(traced: Traced) -> tuple[OtherCall, list[OtherCall]]:
    """A call of a module like the traced one, and a few at other sizes."""
    calls = _Calls(traced)
    return calls.traced(), calls.others() if traced.specs else []


def users_shapes(traced: Traced, call: Call) -> Shapes | None:
    """The shapes of the user's own call, of which the traced one may have been made by doubling it."""
    names = [op.name for op in traced.input_nodes]
    fits = len(names) == len(call.tensors)
    return dict(zip(names, (tuple(tensor.shape) for tensor in call.tensors), strict=True)) if fits else None


def shapes_text(traced: Traced, shapes: Shapes | None = None) -> str:
    """Shapes in words: those with which a module was called when it was traced, or others."""
    if shapes is None:
        leaves = pytree.tree_leaves(traced.program.example_inputs)
        pairs = zip(traced.flat_names, leaves, strict=True)
        shapes = {name: tuple(leaf.shape) for name, leaf in pairs if isinstance(leaf, Tensor)}
    texts = [f"{name} of shape ({', '.join(map(str, shape))}{',' * (len(shape) == 1)})" for name, shape in shapes.items()]
    return ", ".join(texts)


class _Calls:
    def __init__(self, traced: Traced) -> None:
        self._traced, self._sizes = traced, OtherSizes(traced)
        given = dict(zip(traced.flat_names, pytree.tree_leaves(traced.program.example_inputs), strict=True))
        self._tensors: dict[str, Tensor] = {op.name: given[op.name].detach() for op in traced.input_nodes}

    def traced(self) -> OtherCall:
        """The traced one, with a few samples."""
        return self._made(self._shapes({}) or {name: tuple(tensor.shape) for name, tensor in self._tensors.items()})

    def others(self) -> list[OtherCall]:
        found: list[OtherCall] = []
        usual = self._shapes({})
        seen = [usual]
        for call in self._traced.calls[:1]:
            if (shapes := users_shapes(self._traced, call)) is not None and shapes not in seen:
                seen.append(shapes)
                found.append(OtherCall(call, shapes_text(self._traced, shapes)))
        room = max(MOST_NUMBERS * _numbers(usual or {}), FEW_NUMBERS)
        for shapes, twin in self._all_shapes():
            if len(found) >= MOST_CALLS:
                break
            if shapes is not None and shapes not in seen and _numbers(shapes) <= room:
                seen.append(shapes)
                room -= _numbers(shapes)
                found.append(self._made(shapes, twin))
        return found

    def _made(self, shapes: Shapes, twin: Shapes | None = None) -> OtherCall:
        ranks = any(len(shape) != self._tensors[name].ndim for name, shape in shapes.items())
        return OtherCall(self._call(shapes), shapes_text(self._traced, shapes), ranks, None if twin is None else self._call(twin))

    def _call(self, shapes: Shapes) -> Call:
        return self._traced.call({name: _resized(self._tensors[name], shape) for name, shape in shapes.items()})

    def _all_shapes(self) -> Iterator[tuple[Shapes | None, Shapes | None]]:
        """The most telling first, each with a twin where it has one."""
        one = dict.fromkeys(self._sizes.batch, 1)
        yield self._shapes(one), None
        for values in self._sizes.guarded():
            yield self._shapes(values), None
        for k, values in enumerate(self._sizes.usual()):
            yield self._shapes({**values, **dict.fromkeys(self._sizes.batch, (1, 3, SAMPLES)[k % 3])}), None
        fixed, apart = self._fixed()
        for sizes in fixed:
            yield self._shapes(one, sizes), None
        yield from self._ranks()
        for values in self._sizes.beyond():
            yield self._shapes(values), None
        for sizes in apart:
            yield self._shapes(one, sizes), None

    def _fixed(self) -> tuple[list[Fixed], list[Fixed]]:
        """Other sizes for axes that were asked to be open and that came back with one size, those of equal size together and apart; and
        for one of several that came back with sizes that hang together. Then more for those apart, which may be equal by chance."""
        groups: dict[Any, list[tuple[str, int]]] = {}
        tied: dict[Any, list[tuple[str, int]]] = {}
        for name, sizes in self._sizes.shape.items():
            for axis, n in enumerate(sizes):
                if isinstance(n, int):
                    groups.setdefault((axis == 0, n), []).append((name, axis))
                for symbol in () if isinstance(n, int) else n.free_symbols:
                    tied.setdefault(symbol, []).append((name, axis))
        changes = (lambda n: n + 1, lambda n: n // 2, lambda n: 1, lambda n: 2 * n, lambda n: n - 1)
        together: list[Fixed] = [dict.fromkeys(places, change(n)) for change in changes for (_, n), places in groups.items()]
        several = {n: places for n, places in groups.items() if len(places) > 1}
        apart: list[Fixed] = [{place: change(n)} for change in changes for (_, n), places in several.items() for place in places]
        plus_one = sum(map(len, several.values()))
        hanging: list[Fixed] = [
            {(name, axis): self._tensors[name].shape[axis] + 1} for places in tied.values() if len(places) > 1 for name, axis in places
        ]
        return together + apart[:plus_one] + hanging, apart[plus_one:]

    def _ranks(self) -> Iterator[tuple[Shapes | None, Shapes | None]]:
        """Without the first axis, without the last, and with one more before the first, each at two sizes, since an axis may take another's
        place by chance."""
        model, batch, rest = self._traced.model, self._sizes.batch, self._sizes.rest
        assert isinstance(model, nn.Module)
        taken = {t.numel() for t in itertools.chain(model.parameters(), model.buffers()) if t.ndim == 1}
        if not batch or any(not t.ndim for t in self._tensors.values()):
            return
        others = [self._shapes({**dict.fromkeys(batch, 1), **{s: self._sizes.hints[s] + k for s in rest}}) for k in range(2)]
        if None not in others and (rest or all(t.ndim <= 2 for t in self._tensors.values())):
            dropped = [{name: shape[1:] for name, shape in shapes.items()} for shapes in others if shapes is not None]
            yield dropped[0], dropped[1] if rest else None
            if any(t.ndim > 2 for t in self._tensors.values()):
                one, other = (
                    {name: shape[: max(len(shape) - 1, 2)] for name, shape in shapes.items()} for shapes in others if shapes is not None
                )
                yield one, other
        free = [n for n in (3, 5, 7, 11, 13) if n not in taken][:2]
        added = [self._shapes(dict.fromkeys(batch, n)) for n in free]
        if len(free) == 2 and None not in added:
            one, other = ({name: (1, *shape) for name, shape in shapes.items()} for shapes in added if shapes is not None)
            yield one, other

    def _shapes(self, values: Mapping[Any, int], fixed: Fixed | None = None) -> Shapes | None:
        """Every input's shape for the sizes of some symbols and of some axes; None where there is none."""
        known = {**self._sizes.hints, **values}
        found = {}
        for name, sizes in self._sizes.shape.items():
            shape = [(fixed or {}).get((name, axis), n if isinstance(n, int) else n.subs(known)) for axis, n in enumerate(sizes)]
            try:
                found[name] = tuple(int(n) for n in shape)
            except TypeError:
                return None
            if any(n < 1 and old > 0 for n, old in zip(found[name], self._tensors[name].shape, strict=True)):
                return None
        return found


def _numbers(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


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


# --- by the symbols of the trace ------------------------------------------------------------------------------------------------------


class OtherSizes:
    """shape: of each input, sizes as numbers or formulas of symbols. hints: the symbols' sizes in most calls; batch: the symbols of first
    axes; rest: the others."""

    def __init__(self, traced: Traced) -> None:
        self.shape = {op.name: [_size(n) for n in op.meta["val"].shape] for op in traced.input_nodes}
        used, self.batch = (_symbols(n for sizes in self.shape.values() for n in sizes[:most]) for most in (None, 1))
        sizes = Sizes(traced.program).probes[0]
        self.hints = {symbol: min(n, SAMPLES) if symbol in self.batch else n for symbol, n in sizes.items() if symbol in used}
        self.rest = [symbol for symbol in self.hints if symbol not in self.batch]
        ends = limits(traced.program)
        self._limits = {symbol: ends[symbol] for symbol in self.hints if symbol in ends}
        known = (each for each in dict.fromkeys(guards(traced.program)) if each.free_symbols <= self.hints.keys())
        self._assumptions = [each for each in known if each.free_symbols and not has_more_terms(each, MOST_TERMS)]

    def usual(self) -> Iterator[Values]:
        """Shorter, longer, odd and even, and the ends of what the trace holds for."""
        if not self.rest:
            yield {}
            return
        for times, more, odd in ((1, 1, 0), (0.5, 0, 1), (0.5, 0, 0), (2, 1, 0)):
            yield {symbol: max(1, int(times * self.hints[symbol]) + more) | odd for symbol in self.rest}
        ends = [(s, self._limits[s]) for s in self.rest if s in self._limits]
        lower, upper = ({s: n for s, pair in ends if (n := pair[i]) is not None} for i in (0, 1))
        yield self.hints | lower
        yield from (self.hints | {symbol: n} for symbol, n in lower.items() if len(lower) > 1)
        yield from (self.hints | {symbol: n} for symbol, n in upper.items())

    def guarded(self) -> list[Values]:
        """Those that what the trace assumed of them doesn't hold for: of each assumption and symbol the nearest on either side."""

        def near(hint: int) -> list[Iterable[int]]:
            return [range(hint - 1, max(0, hint - 1 - LONGEST_SCAN), -1), range(hint + 1, min(2 * hint + 64, hint + LONGEST_SCAN))]

        return self._with(self._breaking(near))

    def beyond(self) -> list[Values]:
        """Those that it holds for no more, far above the example's: just past the range of each, or doubled."""

        def doubled(hint: int) -> list[Iterable[int]]:
            return [[n for k in range(1, LARGEST_SIZE.bit_length()) if (n := hint << k) < LARGEST_SIZE]]

        past = [(symbol, upper + 1) for symbol, (_, upper) in self._limits.items() if upper is not None and upper + 1 < LARGEST_SIZE]
        return self._with([*past, *self._breaking(doubled)])

    def _with(self, changes: Iterable[tuple[Any, int]]) -> list[Values]:
        return [self.hints | {symbol: n} for symbol, n in dict.fromkeys(changes)]

    def _breaking(self, candidates: Callable[[int], list[Iterable[int]]]) -> Iterator[tuple[Any, int]]:
        """Of each assumption and symbol, the first size in each row of candidates that the assumption doesn't hold for."""
        for expression in self._assumptions:
            if (holds := _compiled(expression, self.hints)) is None:
                continue
            for symbol in (each for each in self.hints if each in expression.free_symbols):
                for row in candidates(self.hints[symbol]):
                    n = next((n for n in row if not holds(self.hints | {symbol: n})), None)
                    if n is not None:
                        yield symbol, n


def _size(n: Any) -> Any:
    """A size as a number or as a formula of symbols."""
    return int(n) if not isinstance(n, torch.SymInt) or n.node.expr.is_number else n.node.expr


def _symbols(sizes: Iterable[Any]) -> set[Any]:
    return {symbol for n in sizes if not isinstance(n, int) for symbol in n.free_symbols}


def _compiled(expression: Any, symbols: Iterable[Any]) -> Callable[[Mapping[Any, int]], bool] | None:
    """A guard as a function of the sizes by symbol; None where it can't be written in Python."""
    names = {symbol: f"s_{i}" for i, symbol in enumerate(symbols)}
    try:
        text = PythonPrinter().doprint(expression.xreplace({s: type(s)(name, integer=True, positive=True) for s, name in names.items()}))
        code = compile(text, "guard", "eval")
    except Exception:  # sympy and torch's printer raise what they like
        return None
    place = {"math": math, "max": max, "min": min, "abs": abs, "__builtins__": {}}

    def holds(sizes: Mapping[Any, int]) -> bool:
        try:
            return bool(eval(code, place, {names[s]: n for s, n in sizes.items() if s in names}))
        except Exception:  # a division by zero, or something that Python can't say: it says nothing of these sizes
            return True

    return holds
