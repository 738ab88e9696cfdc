"""What bnfold knows of a PyTorch model: its data flow, read by `torch.export`, and how to call it with flat, named tensors.

The user's module is traced through a twin that shares its tensors, so that nothing of the module itself changes. All axes of the inputs
are dynamic where the model lets them be; where it doesn't, the batch alone, and where even that is refused, the sizes of the example hold.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from bnfold.capture import Switch
from bnfold.data import LABELS, Batch, InputSpec
from bnfold.data.samples import ROWS, rows_are_samples
from bnfold.errors import DataError, UnsupportedError, UsageError
from bnfold.text import first_line
from bnfold.verification.inputs import is_several

from .ranges import taken
from .regions import written_out

MOST_TERMS = 45  # of a size; what follows it grows with every layer, and so does the time that each takes

COPIED = "its copy"  # by Python's own means
WAY_OUT = "give the model as an exported program (torch.export.export), or as a .pt2 or .onnx file"

Model = nn.Module | ExportedProgram

NUMPY = {
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.complex64: np.dtype(np.complex64),
    torch.complex128: np.dtype(np.complex128),
    torch.bool: np.dtype(np.bool_),
    torch.uint8: np.dtype(np.uint8),
    torch.int8: np.dtype(np.int8),
    torch.int16: np.dtype(np.int16),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
}
TORCH = {numpy: kind for kind, numpy in NUMPY.items()}


@dataclass(frozen=True)
class Call:
    """How a model is called: positional and keyword arguments, in which tensors may be nested."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Traced:
    """A model and its data flow. program: the graph in ATen operators; of a module it holds the module's own tensors, not copies.

    specs: the tensors that a caller feeds, flat and in order, with a symbol or None for an axis that may change. names: those of the
    outputs that are tensors, "output" where there is one, else "output.0" or "output.logits" by their place. evaluation, one_size: how a
    module was read (see `trace`). exported: what torch.export gave for a module, where `program` isn't that (see `regions.written_out`).
    calls: how a module is called, of which the first was traced. opened: how many of the first axes of its inputs were left open for that,
    all for None. note: what a user should know of how it was read. held: see `_by_name`.
    """

    model: Model
    program: ExportedProgram
    evaluation: bool = False
    one_size: bool = False
    exported: ExportedProgram | None = None
    calls: tuple[Call, ...] = ()
    opened: int | None = None
    note: str = ""
    held: Mapping[str, str] = field(default_factory=dict)

    @property
    def runnable(self) -> ExportedProgram:
        """The program that computes by itself what the model does."""
        return self.program if self.exported is None else self.exported

    @cached_property
    def others(self) -> list[Traced]:
        """The data flow in the other calls."""
        assert isinstance(self.model, nn.Module) or not self.calls
        return [_read(self.model, (call,), self.evaluation, self.one_size) for call in self.calls[1:]]  # type: ignore[arg-type]

    @cached_property
    def specs(self) -> list[InputSpec]:
        found = []
        for node in self.input_nodes:
            value = node.meta["val"]
            found.append(InputSpec(node.name, NUMPY[value.dtype], tuple(map(_axis, value.shape)), taken(self.program, node)))
        return found

    @cached_property
    def input_nodes(self) -> list[torch.fx.Node]:
        """The graph's placeholders of the tensors that a caller feeds."""
        wanted = set(self.program.graph_signature.user_inputs)
        nodes = [node for node in self.program.graph.nodes if node.op == "placeholder" and node.name in wanted]
        return [node for node in nodes if isinstance(node.meta.get("val"), Tensor)]

    @cached_property
    def output_nodes(self) -> dict[str, torch.fx.Node]:
        """The graph's nodes that a caller gets, by the name of the output."""
        spec = self.program.call_spec.out_spec
        assert spec is not None
        by_name = {node.name: node for node in self.program.graph.nodes}
        places = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))[0]
        found = {}
        for (path, _), name in zip(places, self.program.graph_signature.user_outputs, strict=True):
            node = by_name.get(name) if isinstance(name, str) else None
            if node is not None and isinstance(node.meta.get("val"), Tensor):
                found[output_name(path)] = node
        return found

    @property
    def names(self) -> list[str]:
        return list(self.output_nodes)

    @property
    def example(self) -> Call | None:
        """How the model was called; None for an exported program that doesn't say."""
        given = self.program.example_inputs
        return None if given is None else Call(tuple(given[0]), dict(given[1]))

    def call(self, tensors: Mapping[str, Tensor]) -> Call:
        """The arguments for flat tensors by name; what isn't a tensor is as it was in the example."""
        spec = self.program.call_spec.in_spec
        assert spec is not None
        given = self.program.example_inputs
        leaves = pytree.tree_leaves(given) if given is not None else [None] * spec.num_leaves
        flat = [tensors.get(name, leaf) for name, leaf in zip(self.flat_names, leaves, strict=True)]
        args, kwargs = pytree.tree_unflatten(flat, spec)
        return Call(tuple(args), dict(kwargs))

    def flat(self, item: Any) -> dict[str, Any] | None:
        """An item of somebody's data as tensors by name, where the model takes more than plain tensors: lists, dicts, numbers among them.

        The item has the form of the example, its labels last or by a name of their own. None where the model takes plain tensors alone, or
        where the item names them one by one. Raises DataError where the item calls the model in another way than the one that was read.
        """
        given, spec = self.example, self.program.call_spec.in_spec
        if given is None or spec is None or all(isinstance(value, Tensor) for value in (*given.args, *given.kwargs.values())):
            return None
        names = [*self._places[: len(given.args)], *given.kwargs]
        like = dict(zip(names, (*given.args, *given.kwargs.values()), strict=True))
        found, labels = _arguments(item, like)
        if found is None:
            return None
        filled = {name: _formed(found.get(name, value), value, name) for name, value in like.items()}
        split = list(filled.values())
        args, kwargs = tuple(split[: len(given.args)]), dict(zip(given.kwargs, split[len(given.args) :], strict=True))
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = {name: leaf for name, leaf in zip(self.flat_names, leaves, strict=True) if name in {s.name for s in self.specs}}
        return tensors | labels

    @property
    def _places(self) -> list[str]:
        """The names of a module's positional arguments; of a program's, which doesn't say, their places."""
        if isinstance(self.model, ExportedProgram):
            return [str(place) for place in range(len(self.example.args if self.example is not None else ()))]
        parameters = list(inspect.signature(self.model.forward).parameters.values())
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        return [*named, *(str(place) for place in range(len(named), len(self.flat_names)))]

    @property
    def flat_names(self) -> list[str]:
        """A name for each leaf of the arguments; of what isn't a tensor it is one that no tensor has."""
        return [str(getattr(s.arg, "name", "")) for s in self.program.graph_signature.input_specs if s.kind.name == "USER_INPUT"]


def trace(model: Model, example: Any = None, *, evaluation: bool = False, one_size: bool = False, patient: bool = False) -> Traced:
    """The data flow of a module, called as in the example, or of an exported program, which has it already.

    example: a tensor or array; a tuple of arguments; a dict of them by name; a `Call`; or several calls, a list of tuples and dicts. A
    model that says itself what it takes (timm's pretrained_cfg, Lightning's example_input_array) needs none. Or another model's data flow,
    whose example it is called with, and with as many open axes: this very module's, read the same way, is given back as it is, so it must
    not have been changed since. evaluation: whether the module is traced in evaluation mode, whatever mode it is in. one_size: whether
    nothing but the batch need have another size than in the example, which takes a third of the time in a deep network. patient: whether
    all sizes are left open that can be, though it may take minutes where they are long formulas; else the example's hold there, and the
    `note` says so. Raises UnsupportedError where torch.export can't read it, UsageError where an example is needed.
    """
    from .functional import settled  # it reads what was traced

    if isinstance(model, ExportedProgram):
        return Traced(model, settled(written_out(model, casts=True)))
    if not isinstance(model, nn.Module):
        raise UsageError(f"a torch.nn.Module or an ExportedProgram is expected, not {type(model).__name__}")
    evaluation = evaluation and any(module.training for module in model.modules())
    if isinstance(example, Traced):
        fits = one_size or not (example.one_size or (patient and example.note))
        if example.model is model and example.evaluation == evaluation and fits:
            return example
        calls = example.calls or (() if example.example is None else (example.example,))
        if calls:
            opened = None if patient and example.note else example.opened
            return _read(model, tuple(as_call(model, call) for call in calls), evaluation, one_size, opened, patient)
        example = None
    given: Any = example if example is not None else known_example(model)
    calls = tuple(as_call(model, each) for each in (given if is_several(given) else [given]))
    return _read(model, calls, evaluation, one_size, patient=patient)


def at_its_sizes(traced: Traced, call: Call) -> Traced:
    """The data flow of the same module in another call, at that call's sizes and no others."""
    assert isinstance(traced.model, nn.Module)
    return _read(traced.model, (call,), traced.evaluation, True, 0)


def _read(
    model: nn.Module, calls: tuple[Call, ...], evaluation: bool, one_size: bool, opened: int | None = None, patient: bool = False
) -> Traced:
    """The data flow of a module in the first of some calls. opened: the axes that are left open at most."""
    from .functional import settled  # it reads what was traced

    _require_shapes(model)
    twin = shared_twin(model)
    if evaluation:
        twin.eval()
    most = 1 if one_size and opened is None else opened
    exported, opened, note = _exported(twin, model, calls[0], most, patient)
    named, held = _by_name(exported, model)
    program = settled(written_out(named, casts=False))
    return Traced(model, program, evaluation, one_size, exported if program is not exported else None, calls, opened, note, held)


def _by_name(program: ExportedProgram, model: nn.Module) -> tuple[ExportedProgram, dict[str, str]]:
    """The same program, which reads a module's tensors by their names also where the code holds them in another way, in a list, say.

    And for each name of such a tensor the one by which it is read: it can't be replaced by its name, but others can be written into it.
    """
    from .functional import graph_copy

    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names: dict[Any, list[str]] = {}
    for name, tensor in tensors:
        names.setdefault(_storage(tensor), []).append(name)
    places = {spec.target: spec.arg.name for spec in program.graph_signature.input_specs if spec.target is not None}
    found = {}
    for spec in program.graph_signature.input_specs:
        constant = program.constants.get(spec.target or "") if spec.kind.name == "CONSTANT_TENSOR" else None
        if isinstance(constant, Tensor) and (known := [n for n in names.get(_storage(constant), []) if n in places]):
            found[spec.arg.name] = known[0]
    if not found:
        return program, {}
    module, _ = graph_copy(program)
    by_name = {node.name: node for node in module.graph.nodes}
    for lifted, name in found.items():
        by_name[lifted].replace_all_uses_with(by_name[places[name]])
    module.recompile()
    same = {name: each for each in names.values() for name in each}
    with quiet():
        return program._update(module, program.graph_signature), {each: name for name in found.values() for each in same[name]}


def _storage(tensor: Tensor) -> Any:
    return tensor.data_ptr() or id(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype


def shared_twin(module: nn.Module) -> nn.Module:
    """A copy of a module's structure that shares its parameters and buffers."""
    return _copied(module, {id(t): t for t in itertools.chain(module.parameters(), module.buffers())})


def duplicate(module: nn.Module) -> nn.Module:
    """A copy of a module, its tensors included."""
    return _copied(module, {})


def require_copies(folded: nn.Module) -> None:
    """Who copies a folded module, or saves and loads it, must not get the unfolded one with new weights, wrong as that is.

    Raises UnsupportedError for one whose classes make copies in a way of their own, in which what was changed is lost.
    """
    if any(map(_own_copy, folded.modules())):
        _copied(folded, {}, "can't be folded as a module, since a copy of the folded one would compute something else")


def _copied(module: nn.Module, memo: dict[int, Any], consequence: str = "can't be copied, and bnfold works on a copy") -> nn.Module:
    """A deep copy, also of a tensor that is an attribute and was computed (as weight_norm's), which copy.deepcopy refuses.

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
        copied = copy.deepcopy(module, memo)
    except Exception as error:  # what an attribute holds may raise anything
        why = f"{_uncopied(module, own)} ({first_line(error)})"
        raise UnsupportedError(f"{told}: {why}; take it off before, or {WAY_OUT}") from error
    if why := _no_copy(module, copied, shared):
        raise UnsupportedError(f"{told}: {why}; {WAY_OUT}")
    return copied


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
                held = f"{path}.{name}" if path else name
                return f"its hooks, {held}, have no deep copy" if name.endswith("_hooks") else f"its attribute {held} has no deep copy"
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
            other, held = others.get(name), f"{path}.{name}".lstrip(".")
            if tensor is None and other is None:
                continue
            if tensor is None or other is None or tensor.shape != other.shape:
                return f"{what} leaves out {held}, or gives it another shape"
            if other is tensor and id(tensor) not in shared:
                return f"{what} shares {name} with the original"
            if other is not tensor and what != COPIED and not _equal(tensor, other):
                return f"{what} gives {held} other values"
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
    raise UsageError(
        f"{type(module).__name__} doesn't say what it takes: give an example of its input (example=batch in Python, "
        f"--input-shape 1,3,224,224 or --data on the command line)"
    )


def _call_of(module: nn.Module, example: Any) -> Call:
    """The arguments that an example stands for, as they were given."""
    if isinstance(example, Call):
        return example
    if isinstance(example, Mapping):
        names = inspect.signature(module.forward).parameters
        by_name = all(key in names for key in example) or any(p.kind is p.VAR_KEYWORD for p in names.values())
        return Call((), dict(example)) if by_name else Call((dict(example),))
    return Call(tuple(example)) if isinstance(example, (tuple, list)) else Call((example,))


def as_call(module: nn.Module, example: Any) -> Call:
    """An example in one of the forms that `trace` takes as arguments: tensors on the module's device, floats in the module's type."""
    call = _call_of(module, example)
    tensor = next((t for t in itertools.chain(module.parameters(), module.buffers()) if t.is_floating_point()), None)
    device, kind = (torch.device("cpu"), None) if tensor is None else (tensor.device, tensor.dtype)

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = to_tensor(leaf)
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().to(device, kind if leaf.is_floating_point() else None)

    args, kwargs = pytree.tree_map(convert, (call.args, call.kwargs))
    return Call(args, kwargs)


def example_of(model: Model, item: Any) -> Any:
    """How a model is called with one item of somebody's data, which may hold more than the model takes: labels, at the end or by name."""
    if isinstance(model, ExportedProgram):
        return None
    parameters = inspect.signature(model.forward).parameters.values()
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(item, Mapping):
        named = {p.name for p in parameters}
        known = {str(key): value for key, value in item.items() if str(key) in named}
        if known:
            return known
        left = {key: value for key, value in item.items() if key not in LABELS} or dict(item)
        return Call((next(iter(left.values())),)) if len(left) == 1 else Call((left,))
    if isinstance(item, (tuple, list)) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        required = sum(p.default is p.empty for p in places)
        labelled = len(item) == required + 1 and (hasattr(item[-1], "__array__") or isinstance(item[-1], (list, int)))
        return tuple(item[: required if labelled and not isinstance(item[-1], bool) else len(places)])
    return item


def _arguments(item: Any, like: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What an item of data gives for each argument, and its labels by name. None where it names the tensors one by one."""
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
    return dict(zip(like, items, strict=False)), {LABELS[0]: last[0]} if last else {}


def _formed(value: Any, like: Any, where: str) -> Any:
    """An argument in the form of the example's: what isn't a tensor must be the same, since it may decide what is computed."""
    if isinstance(like, Tensor):
        if isinstance(value, (Tensor, np.ndarray, np.generic, int, float, list)) or hasattr(value, "__array__"):
            return value
    elif isinstance(like, Mapping):
        if isinstance(value, Mapping) and like.keys() <= value.keys():
            return {name: _formed(value[name], each, f"{where}[{name!r}]") for name, each in like.items()}
    elif isinstance(like, (list, tuple)):
        if isinstance(value, (list, tuple)) and len(value) == len(like):
            return [_formed(one, other, f"{where}[{i}]") for i, (one, other) in enumerate(zip(value, like, strict=True))]
    else:
        (mine, form), (theirs, other) = pytree.tree_flatten(value), pytree.tree_flatten(like)
        if form == other and all(isinstance(b, Tensor) or a == b for a, b in zip(mine, theirs, strict=True)):
            return value
    raise DataError(
        f"argument {where} is {_told(value)} where the model was read with {_told(like)}: it is read for one form of its arguments, so "
        f"give items of that form alone"
    )


def _told(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(repr, value)) or 'nothing'}"
    return f"a {type(value).__name__}" if isinstance(value, (Tensor, np.ndarray)) else repr(value)[:60]


def forward_names(model: nn.Module) -> list[str]:
    """The names of the arguments that a module's forward needs; the first, where it needs none."""
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
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
    known = inspect.signature(model.forward).parameters
    return as_call(model, made if all(name in known for name in made) else tuple(made.values()))


def in_places(model: nn.Module, call: Call) -> Call:
    """The same call with what it states by name stated by position, as far as that goes.

    An exported program is called just as it was traced: so it is called as its module is, although data name their arrays.
    """
    args, rest = list(call.args), dict(call.kwargs)
    for parameter in list(inspect.signature(model.forward).parameters.values())[len(args) :]:
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
    twin = shared_twin(model).eval()

    def cut(parts: Mapping[str, Any]) -> Call:
        args, kwargs = pytree.tree_unflatten([parts.get(str(i), leaf) for i, leaf in enumerate(leaves)], form)
        return Call(args, kwargs)

    def run(parts: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        part = as_call(model, cut(parts))
        try:
            with quiet(), torch.no_grad():
                return {name: to_numpy(tensor) for name, tensor in flat_outputs(twin(*part.args, **part.kwargs)).items()}
        except Exception as error:  # the model's code raises what it likes
            raise DataError(first_line(error)) from None

    told = rows_are_samples(arrays, set(arrays), run)
    return cut({name: array[:count] for name, array in arrays.items()}) if told or (told is None and len(arrays) == 1) else call


def to_tensor(array: npt.NDArray[Any]) -> Tensor:
    """A tensor that shares the array's memory where it can."""
    if array.dtype == NUMPY[torch.bfloat16]:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    if array.dtype not in TORCH:
        raise DataError(f"the data are {array.dtype}, which PyTorch has no type for; convert them")
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the memory format of another one of its shape: channels_last, say."""
    strides = like.stride()
    dense = all(isinstance(n, int) for n in strides) and sum((n - 1) * step for n, step in zip(like.shape, strides, strict=True)) + 1
    if tensor.shape != like.shape or tensor.stride() == strides or dense != tensor.numel():
        return tensor
    return torch.empty_strided(tuple(like.shape), strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """An array on the CPU; bfloat16 becomes ml_dtypes' type."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(NUMPY[torch.bfloat16])
    return tensor.numpy()


def feeds_of(batch: Batch, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A batch by input name as tensors on a device."""
    return {name: to_tensor(array).to(device) for name, array in batch.items()}


def output_name(path: Sequence[Any]) -> str:
    """The name of an output by its place in what the model returns."""
    keys = [next(str(getattr(p, a)) for a in ("key", "idx", "name") if hasattr(p, a)) for p in path]
    return ".".join(["output", *keys])


def flat_outputs(returned: Any) -> dict[str, Tensor]:
    """The tensors that a model returned, by output name."""
    return {output_name(path): leaf for path, leaf in pytree.tree_flatten_with_path(returned)[0] if isinstance(leaf, Tensor)}


def _axis(size: Any) -> int | str:
    """A size, or the symbol of one that may change."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else str(expression)


# --- export ---------------------------------------------------------------------------------------------------------------------------


def _require_shapes(model: nn.Module) -> None:
    """A lazy parameter gets its shape in the first call, which is the user's to make."""
    if any(nn.parameter.is_lazy(t) for t in itertools.chain(model.parameters(), model.buffers())):
        raise UsageError(f"{type(model).__name__} has lazy parameters without a shape yet: call it once on a batch, then give it here")


def _exported(twin: nn.Module, model: nn.Module, call: Call, most: int | None, patient: bool) -> tuple[ExportedProgram, int | None, str]:
    """The program, how many axes are open in it, and what is to be said of that. most: the most axes that are tried."""
    failure: Exception | None = None
    note = ""
    for axes in (None, 1, 0) if most is None else range(most, -1, -1):
        candidate = _doubled(call) if axes != 0 else call
        try:
            with quiet(), torch.no_grad(), _watched(twin) if axes is None and not patient else nullcontext():
                shapes = _dynamic(twin, candidate, axes)
                return torch.export.export(twin, candidate.args, candidate.kwargs, dynamic_shapes=shapes, strict=False), axes, note
        except _TooManyTerms as error:
            note = f"{error}, so it was read at the example's sizes, and others were only tried"
        except Exception as error:  # torch.export raises whatever the model's code raises
            failure = error
    assert failure is not None
    where = _failing_module(failure, twin)
    raise UnsupportedError(
        f"torch.export can't read {type(model).__name__}{where}: {first_line(failure)}; give an example of the input as the model is "
        f"called in deployment, or export it to ONNX and give that file"
    ) from failure


class _TooManyTerms(Exception):
    """A size is so long a formula of the open axes that reading the model would take many times as long as it takes at one size."""


@contextmanager
def _watched(twin: nn.Module) -> Iterator[None]:
    """While it lasts, a module whose output has a size of too many terms ends the reading."""

    def look(name: str, output: Any) -> None:
        for leaf in pytree.tree_leaves(output):
            for size in leaf.shape if isinstance(leaf, Tensor) else ():
                if isinstance(size, torch.SymInt) and has_more_terms(size.node.expr, MOST_TERMS):
                    raise _TooManyTerms(f"the sizes of what {name or 'it'} gives are long formulas of the input's")

    hooks = [
        module.register_forward_hook(lambda module, given, output, name=name: look(name, output)) for name, module in twin.named_modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def has_more_terms(expression: Any, most: int) -> bool:
    """Whether a formula has more than so many terms, those that occur several times counted as often."""
    stack, count = [expression], 0
    while stack and count <= most:
        count += 1
        stack.extend(stack.pop().args)
    return count > most


def _doubled(call: Call) -> Call:
    """A batch of one would be taken for a constant: two of it."""
    leaves = [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
    if not leaves or any(len(leaf) != 1 for leaf in leaves):
        return call
    args, kwargs = pytree.tree_map(
        lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim else leaf, (call.args, call.kwargs)
    )
    return Call(args, kwargs)


def _dynamic(twin: nn.Module, call: Call, axes: int | None) -> Any:
    """The first `axes` axes of every tensor are dynamic, all of them for None."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        return dict.fromkeys(range(leaf.ndim if axes is None else min(axes, leaf.ndim)), Dim.AUTO)

    bound = inspect.signature(twin.forward).bind(*call.args, **call.kwargs).arguments
    named = {}
    for name, value in bound.items():
        kind = inspect.signature(twin.forward).parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update({key: pytree.tree_map(of, each) for key, each in value.items()})
        else:
            named[name] = pytree.tree_map(of, value)
    return named


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's own remarks on what it does inside, and without what a model's code prints while it is only read; one thread at a
    time."""
    with _quiet():
        yield


class _Muted:
    """A stream without what one thread writes."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else int(self._stream.write(text))


def _mute() -> tuple[Any, ...]:
    before = logging.root.manager.disable, warnings.catch_warnings(), sys.stdout, sys.stderr
    logging.disable(logging.CRITICAL)
    before[1].__enter__()
    warnings.simplefilter("ignore")
    sys.stdout, sys.stderr = map(_Muted, before[2:])  # where the data decide what is computed, torch.export prints the whole graph
    return before


def _unmute(before: tuple[Any, ...]) -> None:
    logging.disable(before[0])
    before[1].__exit__(None, None, None)
    sys.stdout, sys.stderr = before[2:]


# torch.export and its kin change what belongs to the whole process too, and aren't made for several threads.
_quiet = Switch(_mute, _unmute, alone=True)


def _failing_module(error: Exception, twin: nn.Module) -> str:
    """The innermost module of the model in whose forward the error rose."""
    names = {id(module): name for name, module in twin.named_modules()}
    found, step = "", error.__traceback__
    while step is not None:
        module = step.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and names.get(id(module)):
            found = f", in its module {names[id(module)]} ({type(module).__name__})"
        step = step.tb_next
    return found
