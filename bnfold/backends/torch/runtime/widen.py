"""Calling an operator of an exported graph in float64, where its program says float32 or less.

What reads the bits of a number, or the limits of its type, means them as they are stored: there the arguments are rounded to the types that
the graph states, and what comes out is widened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node as Op
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..export.quantisers import quantiser
from ..export.walk import FLOATS, dtype_of, function, is_item, mutates, operator_name, overload, storage_of, viewed, views, written
from .depthwise import called

COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
NEIGHBOURS = ("nextafter", "nan_to_num")  # the next stored number; the largest


def widened(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, floating-point numbers in float64; one that is made of other tensors stays as it is."""
    tensor = tensor.detach().cpu()
    if is_traceable_wrapper_subclass(tensor):
        return tensor
    return tensor.to(_wide(tensor.dtype)) if tensor.is_floating_point() or tensor.is_complex() else tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else torch.complex128 if dtype in COMPLEX else dtype


def reads_bits(op: Op) -> bool:
    """Whether what an operator gives hangs on how numbers are stored: a view as another type, and what knows a type's limits."""
    name = operator_name(op)
    return name in NEIGHBOURS or (name in ("view", "view_copy") and overload(op) == "dtype")


def writes_bits(ops: Iterable[Op]) -> str:
    """The name of an operator that writes into numbers through a view as another type, or beneath one; "" where none does."""
    ops = list(ops)
    for op in ops:
        if not reads_bits(op) or viewed(op) is None:
            continue
        family = views(storage_of(op))
        if any(mutates(other) and family.intersection(written(other)) for other in ops):
            return op.name
    return ""


def call(op: Op, value: Callable[[Op], Any], *, stored: bool = False) -> Any:
    """What an operator gives, tensors widened. value: of the operators before it. stored: whether its arguments get their stored types."""
    rounding = None if is_item(op) else quantiser(op)
    stored = stored or reads_bits(op) or rounding is not None

    def given(leaf: Any) -> Any:
        if isinstance(leaf, Op):
            found = value(leaf)
            kind = dtype_of(leaf)
            return found.to(kind) if stored and kind is not None and isinstance(found, Tensor) else found
        if isinstance(leaf, torch.dtype):
            return leaf if stored or not (leaf in FLOATS or leaf in COMPLEX) else _wide(leaf)
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    def exact(leaf: Any) -> Any:
        return value(leaf) if isinstance(leaf, Op) else leaf

    if rounding is not None and rounding.kind == "dequantize":
        return rounding.exact(None, exact)
    args, kwargs = pytree.tree_map(given, (tuple(op.args), dict(op.kwargs)))
    with torch.no_grad():
        returned = called(function(op), args, kwargs)
        if rounding is not None:
            return rounding.exact(returned, exact)
    return pytree.tree_map(lambda leaf: widened(leaf) if isinstance(leaf, Tensor) else leaf, returned)
