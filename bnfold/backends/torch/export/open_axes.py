"""Which open axes of an exported program are open: torch.export leaves one open that only one size fits, if that shows nowhere but in a
product (a Linear behind a Flatten takes 8x8 images, and 4x16 too). So the program is run at other sizes, on shapes without numbers.
"""

from __future__ import annotations

import re
from typing import Any

import sympy
import torch
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram

from bnfold.capture import quiet

from .sizes import Probe, Sizes
from .walk import is_tensor, tensor_named

TIMES = (2, 3)  # multiples keep what a model may demand of its sizes


def fixed_axes(program: ExportedProgram) -> dict[str, int]:
    """The symbols of axes that no other size fits, neither alone nor with the other such ones, and the size that does.

    There are none where the program can't be run on shapes.
    """
    usual = Sizes(program).probes[0]
    limits = {symbol: bounds.upper for symbol, bounds in program.range_constraints.items()}

    def fits(symbols: list[Any]) -> bool:
        """Whether these symbols can have another size."""
        for times in TIMES:
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
    stored = {s.arg.name: s.target for s in program.graph_signature.input_specs if s.target is not None and s.kind.name != "USER_INPUT"}
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
