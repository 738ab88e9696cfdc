"""How a PyTorch model is called: as an example shows, an item of somebody's data, or shapes alone."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from bnfold.capture import quiet
from bnfold.data import LABELS
from bnfold.data.samples import ROWS, rows_are_samples
from bnfold.errors import EXAMPLE, DataError, UsageError
from bnfold.text import first_line, listed

from .copies import runnable_twin
from .tensors import flat_outputs, to_numpy, to_tensor

Model = nn.Module | ExportedProgram


@dataclass(frozen=True)
class Call:
    """How a model is called: positional and keyword arguments, in which tensors may be nested."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def map(self, change: Callable[[Any], Any]) -> Call:
        """The same with other leaves."""
        return Call(*pytree.tree_map(change, (self.args, self.kwargs)))

    def map_tensors(self, change: Callable[[Tensor], Any]) -> Call:
        return self.map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf)

    def on(self, module: nn.Module) -> Any:
        """What a module returns."""
        return module(*self.args, **self.kwargs)


def parameters_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Of a module's forward; of one that hands all that it is given to what it wraps (AveragedModel, DataParallel), of that one's."""
    found = inspect.signature(module.forward).parameters
    wrapped = list(module.children())
    if len(wrapped) == 1 and found and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found.values()):
        return parameters_of(wrapped[0])
    return found


def known_example(module: nn.Module) -> Call:
    """Random data of the shape that the model itself states. Raises UsageError where it states none."""
    stated = getattr(module, "example_input_array", None)
    if stated is not None:
        return as_call(module, stated)
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(module, name, None)
        size = config.get("input_size") if isinstance(config, Mapping) else None
        if isinstance(size, Sequence) and all(isinstance(n, int) for n in size):
            generator = torch.Generator().manual_seed(0)
            return as_call(module, torch.randn((2, *size), generator=generator))
    raise UsageError(f"{type(module).__name__} doesn't say what it takes: give an example of its input, {EXAMPLE}")


def _call_of(module: nn.Module, example: Any) -> Call:
    """The arguments that an example stands for, as they were given."""
    if isinstance(example, Call):
        return example
    if isinstance(example, Mapping):
        names = parameters_of(module)
        by_name = all(key in names for key in example) or any(p.kind is p.VAR_KEYWORD for p in names.values())
        return Call((), dict(example)) if by_name else Call((dict(example),))
    return Call(tuple(example)) if isinstance(example, (tuple, list)) else Call((example,))


def as_call(module: nn.Module, example: Any, *, keep: bool = False) -> Call:
    """An example in one of the forms that `trace` takes as arguments: tensors on the module's device, floats in the module's type.

    That is the type of its first weight, or a narrower one of the example's that other weights have. keep: whether floats stay as they are.
    """
    call = _call_of(module, example)
    own = [t for t in itertools.chain(module.parameters(), module.buffers()) if t.is_floating_point()]
    device, kind = (own[0].device, own[0].dtype) if own else (torch.device("cpu"), None)
    narrower = {t.dtype for t in own if kind is not None and t.dtype.itemsize < kind.itemsize}

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = to_tensor(leaf)
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().to(device, None if keep or not leaf.is_floating_point() or leaf.dtype in narrower else kind)

    return call.map(convert)


def example_of(model: Model, item: Any) -> Any:
    """How a model is called with one item of somebody's data, which may hold more than the model takes: labels, at the end or by name."""
    if isinstance(model, ExportedProgram):
        return None
    parameters = parameters_of(model).values()
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(item, Mapping):
        named = {p.name for p in parameters}
        known = {str(key): value for key, value in item.items() if str(key) in named}
        left = {key: value for key, value in item.items() if key not in LABELS} or dict(item)
        more = Call((), known | left if any(p.kind is p.VAR_KEYWORD for p in parameters) else known)
        if len(more.kwargs) > len(known) and not _runs(model, Call((), known)) and _runs(model, more):
            return more
        if known:
            return known
        alone, whole = Call((next(iter(left.values())),)), Call((left,))
        return whole if len(left) > 1 or (not _runs(model, alone) and _runs(model, whole)) else alone
    if isinstance(item, (tuple, list)) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        required = sum(p.default is p.empty for p in places) or sum(p.name not in LABELS for p in places[: len(item)])
        labelled = len(item) == required + 1 and (hasattr(item[-1], "__array__") or isinstance(item[-1], (list, int)))
        return tuple(item[: required if labelled and not isinstance(item[-1], bool) else len(places)])
    return item


def _runs(model: nn.Module, call: Call) -> bool:
    """Whether the model takes what it is called with."""
    twin = runnable_twin(model)
    try:
        with quiet(), torch.no_grad():
            as_call(model, call).on(twin)
    except Exception:  # the model's code raises what it likes
        return False
    return True


def arguments_of(item: Any, like: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What an item of data gives for each argument, and its labels by name. None where it names the tensors one by one.

    Raises DataError where it is too short.
    """
    tensors = {name for name, value in like.items() if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))}
    if isinstance(item, Mapping):
        if tensors <= item.keys():
            return {name: item[name] for name in like if name in item}, {name: item[name] for name in LABELS if name in item.keys() - like}
        if len(like) == 1 and isinstance(value := next(iter(like.values())), Mapping) and value.keys() <= item.keys():
            return {next(iter(like)): item}, {name: item[name] for name in LABELS if name in item.keys() - value}
        return None, {}
    items = list(item) if isinstance(item, (tuple, list)) else [item]
    last = items[len(like) :] if len(items) == len(like) + 1 else []
    if not last and len(items) == len(tensors) + 1 and list(like)[: len(tensors)] == [name for name in like if name in tensors]:
        constant = [name for name in like if name not in tensors]
        if constant and isinstance(items[-1], (Tensor, np.ndarray)):  # what follows the tensors has the values of the example
            last = items[-1:]
            items = items[:-1]
    if lacking := [name for name in list(like)[len(items) :] if name in tensors]:
        raise DataError(f"it gives {len(items)} of the model's arguments, and none for {listed(lacking)}")
    return dict(zip(like, items, strict=False)), {LABELS[0]: last[0]} if last else {}


def formed(value: Any, like: Any, where: str) -> Any:
    """An argument in the form of the example's: what isn't a tensor must be the same, since it may decide what is computed."""
    if isinstance(like, Tensor):
        if isinstance(value, (Tensor, np.ndarray, np.generic, int, float, list)) or hasattr(value, "__array__"):
            return value
    elif isinstance(like, Mapping):
        if isinstance(value, Mapping) and like.keys() <= value.keys():
            return {name: formed(value[name], each, f"{where}[{name!r}]") for name, each in like.items()}
    elif isinstance(like, (list, tuple)):
        if isinstance(value, (list, tuple)) and len(value) == len(like):
            return [formed(one, other, f"{where}[{i}]") for i, (one, other) in enumerate(zip(value, like, strict=True))]
    else:
        (mine, form), (theirs, other) = pytree.tree_flatten(value), pytree.tree_flatten(like)
        if form == other and all(isinstance(b, Tensor) or a == b for a, b in zip(mine, theirs, strict=True)):
            return value
    raise DataError(
        f"argument {where} is {_described(value)} where the model was read with {_described(like)}: it is read for one form of "
        f"its arguments, so give items of that form alone"
    )


def _described(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(repr, value)) or 'nothing'}"
    return f"a {type(value).__name__}" if isinstance(value, (Tensor, np.ndarray)) else repr(value)[:60]


def forward_names(model: nn.Module) -> list[str]:
    """The names of the arguments that a module's forward needs; the first, where it needs none."""
    parameters = [p for p in parameters_of(model).values() if p.kind is not p.VAR_KEYWORD]
    needed = [p.name for p in parameters if p.default is p.empty]
    return needed or [p.name for p in parameters[:1]]


def random_example(model: nn.Module, shapes: Mapping[str, Sequence[int]], types: Mapping[str, str] = MappingProxyType({})) -> Call:
    """Random data by the names of the forward's parameters; in their order where the names aren't its own.

    types: of those that aren't floating point, which are 0 and 1, as any embedding takes.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator) if kind.is_floating_point else torch.randint(2, shape, generator=generator).to(kind)

    made = {name: draw(tuple(shape), getattr(torch, types.get(name, "float32"))) for name, shape in shapes.items()}
    known = parameters_of(model)
    return as_call(model, made if all(name in known for name in made) else tuple(made.values()))


def in_places(model: nn.Module, call: Call) -> Call:
    """The same call with what it states by name stated by position, as far as that goes.

    An exported program is called just as it was traced: so it is called as its module is, although data name their arrays.
    """
    args, rest = list(call.args), dict(call.kwargs)
    for parameter in list(parameters_of(model).values())[len(args) :]:
        if parameter.name not in rest or parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            break
        args.append(rest.pop(parameter.name))
    return Call(tuple(args), rest)


def shortened_call(model: nn.Module, example: Any, count: int = 2) -> Call:
    """A call with the first samples of its arrays or tensors alone, where a trial shows that these are samples (see `data.samples`)."""
    call = _call_of(model, example)
    leaves, form = pytree.tree_flatten((call.args, call.kwargs))
    arrays: dict[str, Any] = {str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim}
    rows = {len(array) for array in arrays.values()}
    if len(rows) != 1 or max(rows) <= max(count, ROWS):
        return call
    twin = runnable_twin(model)

    def cut(parts: Mapping[str, Any]) -> Call:
        return Call(*pytree.tree_unflatten([parts.get(str(i), leaf) for i, leaf in enumerate(leaves)], form))

    def run(parts: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        try:
            with quiet(), torch.no_grad():
                return {name: to_numpy(t) for name, t in flat_outputs(as_call(model, cut(parts)).on(twin)).items()}
        except Exception as error:  # the model's code raises what it likes
            raise DataError(first_line(error)) from None

    samples = rows_are_samples(arrays, set(arrays), run)
    if samples or (samples is None and len(arrays) == 1):
        return cut({name: array[:count] for name, array in arrays.items()})
    return call
