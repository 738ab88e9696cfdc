"""Checks of what a module's own code does: on a copy of the module by itself, with the arguments that it gets in the model's example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bnfold.capture import quiet

from ..export.call import Call
from ..export.copies import duplicate
from ..export.observers import settled_quantisers
from ..export.walk import operator_name

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
    return [leaf for leaf in pytree.tree_leaves(call.map_tensors(_own).on(module)) if isinstance(leaf, Tensor)]


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
        given = next(module.parameters())
        bias = bias.to(given.device)
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
