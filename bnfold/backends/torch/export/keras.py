"""Copies of Keras layers, which are torch modules where Keras runs on PyTorch. Keras itself is asked for only where a model brings it.

Keras copies a layer by saving and loading it. That builds its variables anew, in the same order, but under other names, in the types of
its configuration, and outside of all that is shared with others. So a copy is given what Python's own would hold.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn


def outermost(module: nn.Module) -> Iterator[Any]:
    """The Keras layers of a module that stand in no other one."""
    keras = sys.modules.get("keras")
    if keras is None:
        return
    stack = [module]
    while stack:
        each = stack.pop()
        if isinstance(each, keras.layers.Layer):
            yield each
        else:
            stack.extend(each.children())


def copied(layer: Any, memo: dict[int, Any]) -> Any:
    """A copy of a layer by Keras, with the tensors and hooks that Python's would have. memo: of the deep copy that it is a part of.

    Raises ValueError where Keras gives something else than a copy.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the state of an optimiser, which is none of the model
        found = copy.deepcopy(layer)
    mine, theirs = ([*_parts(layer)], [*_parts(found)])
    if [type(each) for each in mine] != [type(each) for each in theirs] or len(layer.variables) != len(found.variables):
        raise ValueError("Keras's own copy has other layers or variables")
    memo.update(zip(map(id, mine), theirs, strict=True))
    for variable, other in zip(layer.variables, found.variables, strict=True):
        if tuple(variable.shape) != tuple(other.shape):
            raise ValueError(f"Keras's own copy has {variable.path} in another shape")
        other._path, other._value = variable._path, copy.deepcopy(variable._value, memo)
    for one, other in zip(mine, theirs, strict=True):
        if "_torch_params" in one._modules:
            other._modules["_torch_params"] = copy.deepcopy(one._modules["_torch_params"], memo)
        other.training = one.training
        for name, value in vars(one).items():
            if name.endswith("_hooks") or name not in vars(other):
                vars(other)[name] = copy.deepcopy(value, memo)
    return found


def _parts(layer: Any) -> Iterator[Any]:
    """A layer and all in it, some of which are registered as modules and some are not."""
    modules = (module for each in layer._flatten_layers() for module in each.modules() if hasattr(module, "_flatten_layers"))
    yield from {id(module): module for module in modules}.values()
