"""A module, run in eager mode as its user calls it: in its stored types, or in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bnfold.capture import quiet
from bnfold.errors import DataError, UnsupportedError
from bnfold.text import one_line
from bnfold.verification.noise import deviation, plain

from ..export.call import Call
from ..export.copies import duplicate
from ..export.observers import settled_quantisers
from ..export.quantisers import described, quantises
from ..export.tensors import flat_outputs, to_numpy
from ..export.walk import FLOATS
from .depthwise import called

NARROW = frozenset({*FLOATS} - {torch.float64})
PLAIN = (int, float, str, type(None), torch.device, torch.layout, torch.memory_format)
FLIPPED = 0.01  # the share of integers that may differ, since some were decided by rounding


class _Float64(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives its base class no types
    """Whatever an operator would give in another floating-point type is float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mutable, kwargs, rounding = func._schema.is_mutable, kwargs or {}, None
        if quantises(func):
            names = [argument.name for argument in func._schema.arguments]
            rounding = described(func, dict(zip(names, args, strict=False)) | kwargs)

        def exact(leaf: Any) -> Any:
            return _double(leaf) if isinstance(leaf, torch.dtype) or not mutable else leaf

        if rounding is not None or not (_is_exact(args) and _is_exact(kwargs.values())):
            args, kwargs = pytree.tree_map(exact, (args, kwargs))
        if rounding is not None:
            stored = pytree.tree_map(
                lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in FLOATS else leaf, (args, kwargs)
            )
            return rounding.exact(func(*stored[0], **stored[1]), lambda given: given)
        returned = called(func, args, kwargs)
        return returned if mutable or _is_exact((returned,)) else pytree.tree_map(_double, returned)


def _is_exact(values: Iterable[Any]) -> bool:
    """Whether it is plain that none of an operator's values is, or names, another floating-point type: nearly all calls by far."""
    for value in values:
        if isinstance(value, Tensor):
            if value.dtype in NARROW:
                return False
        elif not (isinstance(value, PLAIN) or (type(value) in (list, tuple) and _is_exact(value))):
            return False
    return True


def _double(leaf: Any) -> Any:
    if isinstance(leaf, torch.dtype):
        return torch.float64 if leaf in FLOATS else leaf
    return leaf.double() if isinstance(leaf, Tensor) and leaf.dtype in FLOATS else leaf


class Eager:
    """exact: the module is in float64 and on the CPU, where casts to another float type do nothing."""

    def __init__(self, module: nn.Module, *, exact: bool) -> None:
        self.exact, self._module = exact, module

    def __call__(self, call: Call) -> dict[str, Any] | None:
        """The outputs as arrays by name; None where it doesn't run."""
        try:
            return self.run(call)
        except (DataError, UnsupportedError):
            return None

    def called(self, call: Call) -> set[str]:
        """The modules with parameters of their own that it calls."""
        found: set[str] = set()
        for name, module in self._module.named_modules():
            if name and any(True for _ in module.parameters(recurse=False)):
                module.register_forward_pre_hook(lambda module, given, name=name: found.add(name))
        self(call)
        return found

    def run(self, call: Call) -> dict[str, Any]:
        """The same. Raises DataError where it doesn't run."""
        own = call.map_tensors(lambda t: _double(t.detach().cpu().clone()) if self.exact else t.detach().clone())
        try:
            mode: Any = _Float64() if self.exact else nullcontext()  # type: ignore[no-untyped-call]  # its base class has no types
            with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                with mode:
                    returned = own.on(self._module)
                return plain({name: to_numpy(tensor) for name, tensor in flat_outputs(returned).items()})
        except Exception as error:  # the user's code raises what it likes
            raise DataError(one_line(error)) from None


def eager(module: nn.Module, exact: bool) -> Eager:
    """A copy of a module that runs."""
    own = settled_quantisers(duplicate(module))
    return Eager(own.cpu().double() if exact else own, exact=exact)


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
