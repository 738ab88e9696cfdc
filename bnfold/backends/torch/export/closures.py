"""Functions that a module holds, as a patched forward, a hook or an attribute, and what they close over.

copy.deepcopy gives a copied module the same functions, in whose closures are the original's modules: the copy runs these.
"""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

from torch import nn


def closures(module: nn.Module) -> list[types.FunctionType]:
    """The functions in a module's attributes and hooks whose closures or defaults reach its modules, tensors, dicts or lists."""
    stack = [value for each in module.modules() for value in vars(each).values()]
    reaching = {id(each) for each in (*module.modules(), *module.parameters(), *module.buffers())}
    reaching |= {id(value) for value in stack if isinstance(value, (dict, list))}
    held: dict[int, Any] = {}
    while stack:
        value = stack.pop()
        if id(value) not in held and (inside := _inside(value)):
            held[id(value)] = value
            stack.extend(inside)
    while found := {key for key, value in held.items() if key not in reaching and not reaching.isdisjoint(map(id, _inside(value)))}:
        reaching |= found
    return [value for key, value in held.items() if key in reaching and isinstance(value, types.FunctionType)]


def without_closure(function: types.FunctionType) -> types.FunctionType:
    """A copy of a function, with nothing yet in the cells of its closure."""
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__dict__.update(function.__dict__)
    return made


def close_over(made: types.FunctionType, function: types.FunctionType, memo: dict[int, Any]) -> None:
    """Give a function's copy the copies of what the function closes over; what no module holds stays the function's own."""

    def copy_of(value: Any) -> Any:
        return copy.deepcopy(value, memo) if isinstance(value, types.MethodType) else memo.get(id(value), value)

    made.__defaults__ = function.__defaults__ and tuple(map(copy_of, function.__defaults__))
    made.__kwdefaults__ = function.__kwdefaults__ and {name: copy_of(value) for name, value in function.__kwdefaults__.items()}
    for cell, given in zip(made.__closure__ or (), function.__closure__ or (), strict=True):
        if given != types.CellType():
            cell.cell_contents = copy_of(given.cell_contents)


def _inside(value: Any) -> list[Any]:
    """What functions and containers hold."""
    if isinstance(value, types.FunctionType):
        cells = value.__closure__ or ()
        return [
            *(cell.cell_contents for cell in cells if cell != types.CellType()),
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
        ]
    if isinstance(value, types.MethodType):
        return [value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    return [*value.values()] if isinstance(value, dict) else [*value] if isinstance(value, (list, tuple)) else []
