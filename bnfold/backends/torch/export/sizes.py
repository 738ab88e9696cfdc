"""The sizes of an exported program's values: real numbers at a few probes, for the symbols that stand in it.

The first probe is the example's sizes. In the second every symbol is larger, by factors that differ from one to the next, so that a rule
which holds at both doesn't lean on a size that the user may change, or on two that are equal by chance.

torch.export leaves an axis open that only one size fits, if that shows nowhere but in a product (a Linear behind a Flatten takes 8x8
images, and 4x16 too). So the program is run at other sizes, on shapes without numbers (`fixed_axes`).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import bound_sympy

from bnfold.capture import quiet

from .walk import is_tensor, stored_targets, tensor_named

Probe = dict[Any, int]  # symbol -> size
LAYOUT = ("/torch/_prims_common/", "/torch/_subclasses/")  # where torch's own code asks for it
FACTORS = (2, 3)  # multiples keep what a model may demand of its sizes: that they are even, say


class Sizes:
    def __init__(self, program: ExportedProgram) -> None:
        self._known: dict[tuple[Any, int], Any] = {}
        self._ranges = dict(program.range_constraints)
        hints: Probe = {}
        for node in program.graph.nodes:
            value = node.meta.get("val")
            for size in value.shape if node.op == "placeholder" and isinstance(value, Tensor) else ():
                if isinstance(size, torch.SymInt):
                    for symbol in size.node.expr.free_symbols:
                        hints.setdefault(symbol, 0)
                    if size.node.expr in hints and size.node.hint is not None:
                        hints[size.node.expr] = int(size.node.hint)
        ends = limits(program)
        for symbol, hint in hints.items():
            hints[symbol] = hint or max(ends.get(symbol, (None, None))[0] or 0, 8)
        second = {}
        for i, (symbol, hint) in enumerate(hints.items()):
            upper = ends.get(symbol, (None, None))[1]
            larger = hint * FACTORS[i % len(FACTORS)]
            second[symbol] = larger if upper is None or larger <= upper else hint
        second = _satisfying(equations(program), hints, second, {symbol: low or 0 for symbol, (low, _) in ends.items()})
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

    def bounds(self, argument: Any) -> tuple[float, float]:
        """The smallest and the largest that a number can be, or a node that computes one, whatever the sizes and the data."""
        if isinstance(argument, torch.fx.Node):
            argument = argument.meta.get("val")
        if not isinstance(argument, (torch.SymInt, torch.SymFloat)):
            return (float(argument), float(argument)) if isinstance(argument, (int, float)) else (-math.inf, math.inf)
        found = bound_sympy(argument.node.expr, self._ranges)
        return tuple(float(n) if n.is_number and n.is_finite else sign * math.inf for n, sign in ((found.lower, -1), (found.upper, 1)))  # type: ignore[return-value]

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


def limits(program: ExportedProgram) -> dict[Any, tuple[int | None, int | None]]:
    """The smallest and the largest size of each symbol; None where it has none."""
    return {symbol: (_integer(r.lower), _integer(r.upper)) for symbol, r in program.range_constraints.items()}


def guards(program: ExportedProgram) -> dict[Any, bool]:
    """What the trace assumed of the sizes, as formulas of their symbols; none in a program that was loaded.

    Each with whether nobody asked but torch, which wants to know of each axis whether its size is 1 to find a tensor's memory layout.
    """
    values = (value for node in program.graph.nodes if isinstance(value := node.meta.get("val"), Tensor))
    size = next((n for value in values for n in value.shape if isinstance(n, torch.SymInt)), None)
    found: dict[Any, bool] = {}
    made: Iterable[Any] = size.node.shape_env.guards if isinstance(size, torch.SymInt) else ()
    for guard in made:
        asked = any(place in str(guard.sloc.framework_loc) for place in LAYOUT)
        found[guard.expr] = asked and isinstance(guard.expr, sympy.Ne) and guard.expr.rhs == 1 and found.get(guard.expr, True)
    return found


def equations(program: ExportedProgram) -> list[sympy.Eq]:
    """What the trace demands of the sizes, where it still says so: that the width of a weight is theirs, or a number of chunks."""
    return [each for each in guards(program) if isinstance(each, sympy.Eq) and each.free_symbols]


def hold(demands: Iterable[sympy.Eq], sizes: Probe) -> bool:
    """Whether sizes meet all demands that are made of them alone."""
    return all(bool(each.subs(sizes) != False) for each in demands if each.free_symbols <= sizes.keys())  # noqa: E712


def _satisfying(demands: list[sympy.Eq], first: Probe, second: Probe, least: Probe) -> Probe:
    """The second probe, with other sizes for those of which more is demanded: of two with a given product one is larger, the other smaller.

    Where no others are found they are the first probe's.
    """
    broken = [each for each in demands if not hold([each], second)]
    bound = sorted({symbol for each in broken for symbol in each.free_symbols & first.keys()}, key=str)
    free = {symbol: size for symbol, size in second.items() if symbol not in bound}
    for one, other in itertools.permutations(bound, 2):
        for factor in range(2, 8):
            changed = {symbol: first[symbol] for symbol in bound} | {one: first[one] * factor, other: first[other] // factor}
            if changed[other] >= least.get(other, 0) and hold(demands, free | changed):
                return free | changed
    return free | {symbol: first[symbol] for symbol in bound}


def _integer(bound: Any) -> int | None:
    """A bound of a symbol's range; None for an infinite one."""
    return int(bound) if isinstance(bound, sympy.Integer) else None


def _plain(argument: Any) -> Any:
    """fx's own lists and dicts as plain ones."""
    if isinstance(argument, (list, tuple)):
        return [_plain(each) for each in argument]
    return argument


# --- axes that are open and have one size only ---------------------------------------------------------------------------------------


def fixed_axes(program: ExportedProgram) -> dict[str, int]:
    """The symbols of axes that no other size fits, neither alone nor with the other such ones, and the size that does.

    There are none where the program can't be run on shapes.
    """
    usual = Sizes(program).probes[0]
    limits = {symbol: bounds.upper for symbol, bounds in program.range_constraints.items()}

    def fits(symbols: list[Any]) -> bool:
        """Whether these symbols can have another size."""
        for times in FACTORS:
            probe = {symbol: size * times if symbol in symbols else size for symbol, size in usual.items()}
            if any(probe[symbol] > limits[symbol] for symbol in symbols if symbol in limits) or _runs(program, probe):
                return True
        return False

    if not usual or not _runs(program, usual):
        return {}
    alone = [symbol for symbol in usual if not fits([symbol])]
    if len(alone) > 1 and fits(alone):
        return {}
    return {str(symbol): usual[symbol] for symbol in alone}


def _runs(program: ExportedProgram, probe: Probe) -> bool:
    stored = stored_targets(program)
    with quiet(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        try:
            values = []
            for op in program.graph.nodes:
                if op.op != "placeholder":
                    continue
                if op.name in stored:
                    found = tensor_named(program, stored[op.name])
                    values.append(mode.from_tensor(found) if isinstance(found, torch.Tensor) else found)
                elif is_tensor(op):
                    shape = [n if isinstance(n, int) else int(n.node.expr.subs(probe)) for n in op.meta["val"].shape]
                    values.append(torch.empty(shape, dtype=op.meta["val"].dtype))
                else:
                    values.append(op.meta.get("val"))
            torch.fx.Interpreter(program.graph_module).run(*values)
        except Exception:  # an operator's own words for sizes that don't fit
            return False
    return True


def substituted(expression: str, known: dict[str, int]) -> int | str:
    """An axis as torch's exporter writes it: by its symbols, or by a number in letters. With these symbols' sizes in their place."""
    if expression.isdecimal():
        return int(expression)
    names = set(re.findall(r"[A-Za-z_]\w*", expression))
    if not names & known.keys():
        return expression
    try:
        made = sympy.sympify(expression, locals={name: sympy.Symbol(name, integer=True, positive=True) for name in names})
        made = made.subs({symbol: known[str(symbol)] for symbol in made.free_symbols if str(symbol) in known})
    except (sympy.SympifyError, TypeError, AttributeError, SyntaxError):
        return expression
    return int(made) if made.is_integer and made.is_number else str(made)
