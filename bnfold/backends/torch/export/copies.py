"""Copies of modules, whose classes may have a way of their own of making them, and the mean of several.

Keras layers are torch modules where Keras runs on PyTorch; Keras itself is asked for only where a model brings it. It copies a layer by
saving and loading it. That builds its variables anew, in the same order, but under other names, in the types of its configuration, and
outside of all that is shared with others. So a copy is given what Python's own would hold.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnfold.capture import Switch
from bnfold.errors import OTHER_NETWORK, ModelError, UnsupportedError
from bnfold.text import first_line

from .closures import close_over, closures, without_closure

COPIED = "its copy"  # by Python's own means
_one_at_a_time = Switch(lambda: None, lambda before: None, alone=True)  # two would put back each other's hooks

WAY_OUT = "give the model as an exported program (torch.export.export), or as a .pt2 or .onnx file"


def shared_twin(module: nn.Module) -> nn.Module:
    """A copy of a module's structure that shares its parameters and buffers."""
    return _copied(module, {id(t): t for t in itertools.chain(module.parameters(), module.buffers())})


def runnable_twin(module: nn.Module) -> nn.Module:
    """A copy that can be run, in evaluation mode: it shares the parameters, but has buffers of its own, into which code may write."""
    return _copied(module, {id(t): t for t in module.parameters()}).eval()


def duplicate(module: nn.Module) -> nn.Module:
    """A copy of a module, its tensors included; a buffer whose numbers lie in one place gets room for each, into which others can go."""
    expanded = [each for each in module.buffers() if each.layout == torch.strided and 0 in each.stride() and each.numel() > 1]
    return _copied(module, {id(each): each.detach().clone() for each in expanded})


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """For the run of a copy: the original's attributes, and what its dicts and lists hold, are as before when this ends.

    Raises UnsupportedError where the copy called a module of the original, by a name that no copy can have: a global, say.
    """
    with _one_at_a_time():
        yield from _unchanged(module)


def _unchanged(module: nn.Module) -> Iterator[None]:
    attributes = [vars(each) for each in module.modules()]
    held = [*attributes, *(value for each in attributes for value in each.values())]
    lists = [(each, list(each)) for each in held if isinstance(each, list)]
    dicts = [(each, dict(each)) for each in held if isinstance(each, dict)]
    reached: list[str] = []
    here = threading.get_ident()
    names = {each: name for name, each in module.named_modules()}

    def seen(called: nn.Module, _: Any) -> None:
        if called in names and threading.get_ident() == here:  # a copy may share the records of its hooks
            reached.append(names[called])

    for each in names:
        each.register_forward_pre_hook(seen)
    try:
        yield
    finally:
        for found, entries in lists:
            found[:] = entries
        for named, values in dicts:
            for added in named.keys() - values.keys():
                del named[added]
            named.update(values)
    if reached:
        raise UnsupportedError(
            f"{type(module).__name__} can't be copied, and bnfold works on a copy: its code reaches {reached[0] or 'the module itself'} "
            f"by another name than its own (a global, say), so a copy would run the original's; {WAY_OUT}"
        )


def require_copies(folded: nn.Module) -> None:
    """Who copies a folded module, or saves and loads it, must not get the unfolded one with new weights, wrong as that is.

    Raises UnsupportedError for one whose classes make copies in a way of their own, in which what was changed is lost.
    """
    if any(map(_own_copy, folded.modules())):
        _copied(folded, {}, "can't be folded as a module, since a copy of the folded one would compute something else")


def _copied(module: nn.Module, memo: dict[int, Any], consequence: str = "can't be copied, and bnfold works on a copy") -> nn.Module:
    """A deep copy, also of a tensor that is an attribute and was computed (as weight_norm's), which copy.deepcopy refuses.

    And of functions that it holds, as a patched forward or a hook, in whose closures copy.deepcopy leaves the original's modules.

    Raises UnsupportedError, which names what is in the way, where there is no copy that can be changed without changing the original.
    """
    shared = dict(memo)
    for each in module.modules():
        for value in vars(each).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    own = dict(memo)
    told = f"{type(module).__name__} {consequence}"
    try:
        for layer in outermost(module):
            memo[id(layer)] = copied(layer, memo)
        functions = closures(module)
        for function in functions:
            memo[id(function)] = without_closure(function)
        made = copy.deepcopy(module, memo)
        for function in functions:
            close_over(memo[id(function)], function, memo)
    except Exception as error:  # what an attribute holds may raise anything
        why = f"{_uncopied(module, own)} ({first_line(error)})"
        raise UnsupportedError(f"{told}: {why}; take it off before, or {WAY_OUT}") from error
    if why := _no_copy(module, made, shared):
        raise UnsupportedError(f"{told}: {why}; {WAY_OUT}")
    return made


def _uncopied(module: nn.Module, memo: dict[int, Any]) -> str:
    """Which attribute has no deep copy, or which module."""

    def fails(value: Any) -> bool:
        try:
            copy.deepcopy(value, dict(memo))
        except Exception:  # as above
            return True
        return False

    innermost = "the module itself"
    for path, each in module.named_modules():
        tensors = {**each._parameters, **each._buffers}
        rest = {name: value for name, value in vars(each).items() if name not in ("_parameters", "_buffers", "_modules")}
        for name, value in (*tensors.items(), *rest.items()):
            if fails(value):
                named = f"{path}.{name}" if path else name
                return f"its hooks, {named}, have no deep copy" if name.endswith("_hooks") else f"its attribute {named} has no deep copy"
        if fails(each):
            innermost = f"its module {path} ({type(each).__name__}) has no deep copy" if path else innermost + " has no deep copy"
    return innermost


def _no_copy(module: nn.Module, copied: Any, shared: Mapping[int, Any]) -> str:
    """What a module's own way of copying gave that is no copy of it, "" where all was copied. shared: tensors that both shall hold."""
    if not isinstance(copied, nn.Module):
        return f"its {_own_copy(module)} gives {type(copied).__name__}, not a module"
    mine, theirs = dict(module.named_modules()), dict(copied.named_modules())
    for path, each in mine.items():
        what = _copier(mine, path)
        if path not in theirs or _kind(each) != _kind(theirs[path]):
            return f"{what} gives something else" + ("" if _own_copy(each) else f" for {path}")
        if theirs[path] is each:
            return f"{what} gives the module itself"
        theirs[path].training = each.training
        others = {**theirs[path]._parameters, **theirs[path]._buffers}
        for name, tensor in {**each._parameters, **each._buffers}.items():
            other, named = others.get(name), f"{path}.{name}".lstrip(".")
            if tensor is None and other is None:
                continue
            if tensor is None or other is None or tensor.shape != other.shape:
                return f"{what} leaves out {named}, or gives it another shape"
            if other is tensor and id(tensor) not in shared:
                return f"{what} shares {name} with the original"
            if other is not tensor and what != COPIED and not _equal(tensor, other):
                return f"{what} gives {named} other values"
    return "" if len(mine) == len(theirs) else f"its {_own_copy(module)} gives more modules than there are"


def _copier(modules: Mapping[str, nn.Module], path: str) -> str:
    """Whose own way of copying made the copy of the module at a path: its own, or that of one that holds it."""
    while path and not _own_copy(modules[path]):
        path = path.rpartition(".")[0]
    own = _own_copy(modules[path])
    return COPIED if not own else f"the {own} of its module {path} ({type(modules[path]).__name__})" if path else f"its {own}"


def _kind(module: nn.Module) -> str:
    """The name of a module's class; torch.fx makes one of its own for each of its modules."""
    return "GraphModule" if isinstance(module, torch.fx.GraphModule) else type(module).__name__


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.is_meta or other.is_meta:
        return one.dtype == other.dtype
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _own_copy(module: nn.Module) -> str:
    """The method by which a class makes copies in another way than Python does; "" without one."""
    kind = type(module)
    if hasattr(kind, "__deepcopy__"):
        return "__deepcopy__"
    return next((name for name in ("__reduce_ex__", "__reduce__") if getattr(kind, name) is not getattr(object, name)), "")


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


def average(models: Sequence[Any], shares: Sequence[float]) -> nn.Module:
    """A copy of the first module with the mean of all their parameters and buffers, in float64; integers are the first one's.

    Raises ModelError where the others have other weights, UnsupportedError where one is no module.
    """
    if not all(isinstance(model, nn.Module) for model in models):
        raise UnsupportedError("exported programs aren't averaged, nor modules with other kinds of models: give the checkpoints")
    states = [model.state_dict() for model in models]
    for number, state in enumerate(states[1:], 2):
        if odd := next((name for name in states[0].keys() ^ state.keys()), None):
            raise ModelError(f"{OTHER_NETWORK.format(number)}: one of the two has no weight {odd}")
        if odd := next((name for name, tensor in states[0].items() if tensor.shape != state[name].shape), None):
            raise ModelError(f"{OTHER_NETWORK.format(number)}: {odd} has another shape in it")
    made = duplicate(models[0])
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if tensor.is_floating_point():
                mean = sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
                tensor.copy_(mean)
    return made
