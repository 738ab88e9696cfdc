"""Other sizes than those at which a module was traced, by the symbols of the trace, for which its code may take another path.

What a size decides shows in what torch.export had to assume of it, in the guards on the axes that it was asked to leave open. Of these,
and of what people vary (one sample, odd, shorter, longer), come sizes by the symbols of the trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._sympy.printers import PythonPrinter

from .program import has_more_terms
from .sizes import Sizes, guards, limits
from .trace import Traced

SAMPLES = 2  # in most calls
LONGEST_SCAN = 512  # sizes that are tried in a guard
LARGEST_SIZE = 1 << 16  # of an axis that is tried
FEW = 16  # of the longest axis, behind which no smaller one is looked for
MOST_TERMS = 200  # of a guard that is looked at
Values = dict[Any, int]  # symbol -> size


class OtherSizes:
    """shape: of each input, sizes as numbers or formulas of symbols. hints: the symbols' sizes in most calls, example: in the example's;
    batch: the symbols of first axes; rest: the others. small: whether most calls have the smallest sizes for which holds what was assumed
    of the example's."""

    def __init__(self, traced: Traced, *, small: bool = False) -> None:
        self.shape = {op.name: [_size(n) for n in op.meta["val"].shape] for op in traced.input_nodes}
        used, self.batch = (_symbols(n for sizes in self.shape.values() for n in sizes[:most]) for most in (None, 1))
        sizes = Sizes(traced.program).probes[0]
        example = {symbol: n for symbol, n in sizes.items() if symbol in used}
        self.hints = {symbol: min(n, SAMPLES) if symbol in self.batch else n for symbol, n in example.items()}
        self.rest = [symbol for symbol in self.hints if symbol not in self.batch]
        ends = limits(traced.program)
        self._limits = {symbol: ends[symbol] for symbol in self.hints if symbol in ends}
        every = {each: layout for each, layout in guards(traced.program).items() if each.free_symbols & self.hints.keys()}
        known = [each for each in every if each.free_symbols <= self.hints.keys() and not has_more_terms(each, MOST_TERMS)]
        self._assumptions = {each: holds for each in known if (holds := _compiled(each, self.hints)) is not None}
        self._asked = [each for each in self._assumptions if not every[each]]  # an axis of 1 is among the usual sizes
        if not self._fit(self.hints):
            self.hints = example
        self.example = self.hints
        if small and len(self._assumptions) == len(every):
            self.hints = self._smallest()

    def _smallest(self) -> Values:
        """Sizes in the proportions of the example's; its own where it is small, or no smaller ones will do."""
        longest = max((self.hints[symbol] for symbol in self.rest), default=0)
        for n in range(FEW, longest):
            values = self.hints | {symbol: -(-self.hints[symbol] * n // longest) for symbol in self.rest}
            if self._fit(values):
                return values
        return self.hints

    def _fit(self, values: Values) -> bool:
        """Whether the trace holds for these sizes, as far as is known."""
        within = all((low or 0) <= values[symbol] for symbol, (low, _) in self._limits.items())
        return within and all(holds(values) for holds in self._assumptions.values())

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
        for expression in self._asked:
            holds = self._assumptions[expression]
            for symbol in (each for each in self.hints if each in expression.free_symbols):
                for row in candidates(self.example[symbol]):
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
