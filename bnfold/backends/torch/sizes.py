"""The sizes of an exported program's values: real numbers at a few probes, for the symbols that stand in it.

The first probe is the example's sizes. In the second every symbol is larger, by factors that differ from one to the next, so that a rule
which holds at both doesn't lean on a size that the user may change, or on two that are equal by chance.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

Probe = dict[Any, int]  # symbol -> size
FACTORS = (2, 3)  # multiples keep what a model may demand of its sizes: that they are even, say


class Sizes:
    def __init__(self, program: ExportedProgram) -> None:
        self._known: dict[tuple[Any, int], Any] = {}
        hints: Probe = {}
        for node in program.graph.nodes:
            value = node.meta.get("val")
            for size in value.shape if node.op == "placeholder" and isinstance(value, Tensor) else ():
                if isinstance(size, torch.SymInt):
                    for symbol in size.node.expr.free_symbols:
                        hints.setdefault(symbol, 0)
                    if size.node.expr in hints and size.node.hint is not None:
                        hints[size.node.expr] = int(size.node.hint)
        limits = {symbol: (_integer(r.lower), _integer(r.upper)) for symbol, r in program.range_constraints.items() if symbol in hints}
        for symbol, hint in hints.items():
            hints[symbol] = hint or max(limits.get(symbol, (None, None))[0] or 0, 8)
        second = {}
        for i, (symbol, hint) in enumerate(hints.items()):
            upper = limits.get(symbol, (None, None))[1]
            larger = hint * FACTORS[i % len(FACTORS)]
            second[symbol] = larger if upper is None or larger <= upper else hint
        self.probes: list[Probe] = [hints, second] if hints and second != hints else [hints]

    def shapes(self, value: Any) -> tuple[tuple[int | None, ...], ...] | None:
        """The shape of a tensor at every probe; None for an axis whose size the data decide, or for what is no tensor."""
        if not isinstance(value, Tensor):
            return None
        return tuple(tuple(self._size(n, probe) for n in value.shape) for probe in self.probes)

    def values(self, argument: Any) -> list[Any]:
        """An argument of an operator at every probe: numbers in the place of symbols and of the nodes that compute them."""
        return [pytree.tree_map(partial(self._size, probe=probe), _plain(argument)) for probe in self.probes]

    def static(self, argument: Any, default: Any = None) -> Any:
        """The argument where it is the same at every probe, else the default."""
        found = self.values(argument)
        known = all(value == found[0] for value in found) and not any(leaf is None for leaf in pytree.tree_leaves(found[0]))
        return found[0] if known or argument is None else default

    def _size(self, leaf: Any, probe: Probe) -> Any:
        if isinstance(leaf, torch.fx.Node):
            leaf = leaf.meta.get("val")
        if not isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return leaf
        expression = leaf.node.expr
        key = (expression, self.probes.index(probe))
        if key not in self._known:  # sympy takes its time, and most sizes occur often
            self._known[key] = expression.subs(probe) if expression.free_symbols <= probe.keys() else None
        number = self._known[key]
        if number is None:
            return None  # the data decide it
        return float(number) if isinstance(leaf, torch.SymFloat) else bool(number) if isinstance(leaf, torch.SymBool) else int(number)


def _integer(bound: Any) -> int | None:
    """A bound of a symbol's range; None for an infinite one."""
    return int(bound) if isinstance(bound, sympy.Integer) else None


def _plain(argument: Any) -> Any:
    """fx's own lists and dicts as plain ones."""
    if isinstance(argument, (list, tuple)):
        return [_plain(each) for each in argument]
    return argument
