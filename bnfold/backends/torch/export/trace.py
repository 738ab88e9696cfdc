"""What bnfold knows of a PyTorch model: its data flow, read by `torch.export`, and how to call it with flat, named tensors.

The user's module is traced through a twin that shares its tensors, so that nothing of the module itself changes. All axes of the inputs
are dynamic where the model lets them be; where it doesn't, the batch alone, and where even that is refused, the sizes of the example hold.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from bnfold.data import InputSpec
from bnfold.errors import UnsupportedError, UsageError
from bnfold.verification.inputs import is_several

from .call import Call, Model, arguments_of, as_call, formed, known_example, parameters_of
from .copies import shared_twin, unchanged
from .functional import graph_copy, settled, with_graph, with_known_sizes
from .observers import note_on, settled_quantisers, without_observers
from .program import export, require_readable
from .ranges import integer_range
from .regions import written_out
from .tensors import NUMPY, as_tree, axis_of, output_name, parts


@dataclass(eq=False)
class Traced:
    """A model and its data flow. program: the graph in ATen operators; of a module it holds the module's own tensors, not copies.

    specs: the tensors that a caller feeds, flat and in order, with a symbol or None for an axis that may change. names: those of the
    outputs that are tensors, "output" where there is one, else "output.0" or "output.logits" by their place. evaluation, one_size: how a
    module was read (see `trace`). exported: what torch.export gave for a module, where `program` isn't that (see `regions.written_out`).
    calls: how a module is called, of which the first was traced. opened: how many of the first axes of its inputs were left open for that,
    all for None. note: what a user should know of how it was read. aliases: see `_by_name`.
    """

    model: Model
    program: ExportedProgram
    evaluation: bool = False
    one_size: bool = False
    exported: ExportedProgram | None = None
    calls: tuple[Call, ...] = ()
    opened: int | None = None
    note: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def runnable(self) -> ExportedProgram:
        """The program that computes by itself what the model does."""
        return self.program if self.exported is None else self.exported

    def identity(self) -> str:
        """The same for two models of the same operators, with the same arguments, and the same numbers, whatever their names."""
        digest, program = hashlib.sha256(), self.program
        for op in program.graph.nodes:
            if op.op == "call_function":
                rest = [each for each in (*op.args, *op.kwargs.items()) if not isinstance(each, torch.fx.Node)]
                digest.update(f"{op.target}{rest}".encode())
        for each in (*program.state_dict.values(), *program.constants.values()):
            for tensor in parts(each) if isinstance(each, Tensor) else ():
                found = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + found.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def others(self) -> list[Traced]:
        """The data flow in the other calls."""
        model = self.model
        return [_read(model, (call,), self.evaluation, self.one_size) for call in self.calls[1:]] if isinstance(model, nn.Module) else []

    @cached_property
    def specs(self) -> list[InputSpec]:
        found = []
        for node in self.input_nodes:
            value = node.meta["val"]
            found.append(InputSpec(node.name, NUMPY[value.dtype], tuple(map(axis_of, value.shape)), integer_range(self.program, node)))
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
        found, labels = arguments_of(item, like)
        if found is None:
            return None
        filled = {name: formed(found.get(name, value), value, name) for name, value in like.items()}
        flat = dict(zip(self.flat_names, pytree.tree_leaves(list(filled.values())), strict=True))
        return {spec.name: flat[spec.name] for spec in self.specs} | labels

    @property
    def _places(self) -> list[str]:
        """The names of a module's positional arguments; of a program's, which doesn't say, their places."""
        parameters = parameters_of(self.model).values() if isinstance(self.model, nn.Module) else ()
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        given = self.example.args if self.example is not None else ()
        return [*named, *(str(place) for place in range(len(named), len(given)))]

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
    if isinstance(model, ExportedProgram):
        program, note = without_observers(model)
        return Traced(model, settled(with_known_sizes(written_out(program, casts=True))), note=note)
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
            theirs, own = (tuple(as_call(model, call, keep=keep) for call in calls) for keep in (True, False))
            if _types(theirs) != _types(own):  # the code may cast what it is given
                with contextlib.suppress(UnsupportedError):
                    return _read(model, theirs, evaluation, one_size, opened, patient)
            return _read(model, own, evaluation, one_size, opened, patient)
        example = None
    given: Any = example if example is not None else known_example(model)
    calls = tuple(as_call(model, each) for each in (given if is_several(given) else [given]))
    return _read(model, calls, evaluation, one_size, patient=patient)


def _types(calls: Iterable[Call]) -> list[torch.dtype]:
    return [tensor.dtype for call in calls for tensor in call.tensors]


def at_its_sizes(traced: Traced, call: Call) -> Traced:
    """The data flow of the same module in another call, at that call's sizes and no others."""
    assert isinstance(traced.model, nn.Module)
    return _read(traced.model, (call,), traced.evaluation, True, 0)


def _read(
    model: nn.Module, calls: tuple[Call, ...], evaluation: bool, one_size: bool, opened: int | None = None, patient: bool = False
) -> Traced:
    """The data flow of a module in the first of some calls. opened: the axes that are left open at most."""
    require_readable(model)
    twin = settled_quantisers(shared_twin(model))
    if evaluation:
        twin.eval()
    twin.register_forward_hook(lambda module, given, returned: as_tree(returned))
    most = 1 if one_size and opened is None else opened
    with unchanged(model):
        exported, opened, note = export(twin, model, calls[0], most, patient)
    note = "; ".join(filter(None, (note, note_on(model))))
    named, aliases = _by_name(exported, model)
    program = settled(with_known_sizes(written_out(named, casts=False)))
    return Traced(model, program, evaluation, one_size, exported if program is not exported else None, calls, opened, note, aliases)


def _by_name(program: ExportedProgram, model: nn.Module) -> tuple[ExportedProgram, dict[str, str]]:
    """The same program, which reads a module's tensors by their names also where the code holds them in another way, in a list, say.

    And for each name of such a tensor the one by which it is read: it can't be replaced by its name, but others can be written into it.
    """
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
    same = {name: each for each in names.values() for name in each}
    return with_graph(program, module), {each: name for name in found.values() for each in same[name]}


def _storage(tensor: Tensor) -> Any:
    return tensor.data_ptr() or id(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype
