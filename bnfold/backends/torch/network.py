"""The inner values of a PyTorch model (see `bnfold.verification.normal_form`)."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph as Ops
from torch.fx import GraphModule
from torch.fx import Node as Op

from bnfold.algebra.graph import Graph, Value
from bnfold.data.inputs import check_feeds
from bnfold.errors import UnsupportedError
from bnfold.verification.normal_form import Part, Stream

from .export.functional import entangled, functional
from .export.regions import under
from .export.trace import NUMPY, Traced, quiet, to_numpy, to_tensor
from .export.walk import dtype_of, function, mutates
from .lowering.table import lowering as lowering_of
from .runtime.session import Oracle, Session, precise

if TYPE_CHECKING:
    from bnfold.data import Batch

    from .model import TorchSubject


class TorchNetwork:
    """See `bnfold.verification.normal_form.Network`. The names are those of the exported graph that `lower` reads."""

    kind = "torch"

    def __init__(self, subject: TorchSubject) -> None:
        program = subject.traced.program
        self.program = functional(program) if entangled(program) else program

    @cached_property
    def _traced(self) -> Traced:
        return Traced(self.program, self.program)

    def lowered(self) -> tuple[Graph, Mapping[str, Value]]:
        lowering = lowering_of(self._traced)
        graph = lowering.graph()
        for op in self._traced.input_nodes:
            lowering.value(op).name = op.name
        return graph, lowering.outputs

    def stream(self, feeds: Batch, wanted: Iterable[str], *, jitter: int | None = None, exact: bool = True) -> Stream:
        steps = _Exact(self._traced, jitter=jitter) if exact else _Stored(self._traced, jitter=jitter)
        check_feeds(feeds, self._traced.specs, any_float=exact)
        names = set(wanted)
        last = _last_uses(self.program.graph)
        values: dict[Op, Any] = {}
        for op in self.program.graph.nodes:
            with precise():
                steps.step(op, values, feeds)
            if op.name in names and isinstance(values.get(op), Tensor):
                written = any(mutates(user) for user in op.users) or mutates(op)
                yield op.name, to_numpy(values[op].clone() if written else values[op])
            for dead in last.get(op, ()):
                values.pop(dead, None)

    def edge(self, output: str, stops: Collection[str]) -> list[str]:
        by_name = {op.name: op for op in self.program.graph.nodes}
        inputs = {op.name for op in self._traced.input_nodes}
        found: dict[str, None] = {}
        seen, stack = {output}, [by_name[output]]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source.name not in seen:
                    seen.add(source.name)
                    if source.name in stops or source.name in inputs:
                        found[source.name] = None
                    else:
                        stack.append(source)
        return list(found)

    def types(self, names: Iterable[str]) -> dict[str, Any]:
        wanted = set(names)
        return {op.name: NUMPY[kind] for op in self.program.graph.nodes if op.name in wanted and (kind := dtype_of(op)) in NUMPY}

    def part(self, inputs: Mapping[str, npt.NDArray[Any]], output: str, also: Iterable[str] = ()) -> Part:
        """As an exported program."""
        by_name = {op.name: op for op in self.program.graph.nodes}
        held, root, ops, made = held_tensors(self.program), nn.Module(), Ops(), dict[Op, Op]()
        for name in inputs:
            made[by_name[name]] = ops.placeholder(name)
        wanted: set[Op] = set()
        stack = [by_name[name] for name in (output, *also)]
        while stack:
            op = stack.pop()
            if op not in wanted and op not in made:
                wanted.add(op)
                stack.extend(op.all_input_nodes)
        for op in self.program.graph.nodes:
            if op not in wanted:
                continue
            if op.op in ("placeholder", "get_attr"):
                tensor = held.get(op.name) if op.op == "placeholder" else attrgetter(str(op.target))(self.program.graph_module)
                if not isinstance(tensor, Tensor):
                    raise UnsupportedError(f"value {op.name!r} of the model comes from outside the part")
                root.register_buffer(op.name, tensor.detach().cpu().clone())
                made[op] = ops.get_attr(op.name)
            else:
                made[op] = ops.node_copy(op, lambda source: made[source])
        ops.output(tuple(made[by_name[name]] for name in (output, *also)))
        module = GraphModule(root, ops)
        file = io.BytesIO()
        with quiet(), torch.no_grad():
            try:
                program = torch.export.export(module, tuple(to_tensor(a.copy()) for a in inputs.values()), strict=False)
                torch.export.save(program, file)
            except Exception as error:  # torch.export raises what it likes
                raise UnsupportedError(f"torch.export can't write the part: {str(error).splitlines()[0]}") from None
        return Part(".pt2", file.getvalue())


class _Exact(Oracle):
    """The float64 oracle, one operator at a time."""

    def step(self, op: Op, values: dict[Op, Any], feeds: Batch) -> None:
        if op.op == "placeholder":
            if op.name in feeds:
                values[op] = to_tensor(feeds[op.name].astype("float64") if feeds[op.name].dtype.kind in "fV" else feeds[op.name].copy())
            else:
                held = self._held.get(op.name)
                values[op] = held.clone() if isinstance(held, Tensor) else held
        elif op.op == "get_attr":
            values[op] = self.attribute(op)
        elif op.op == "call_function":
            values[op] = self._call(op, values)


class _Stored:
    """The model in its stored types, one operator at a time."""

    def __init__(self, traced: Traced, *, jitter: int | None = None) -> None:
        self._program = traced.program
        self._held = held_tensors(traced.program)
        if jitter is not None:
            module = Session(traced, jitter=jitter)._module
            moved = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            for spec in traced.program.graph_signature.input_specs:
                if spec.target in moved:
                    self._held[spec.arg.name] = moved[spec.target].detach()

    def step(self, op: Op, values: dict[Op, Any], feeds: Batch) -> None:
        if op.op == "placeholder":
            held = self._held.get(op.name)
            values[op] = to_tensor(feeds[op.name].copy()) if op.name in feeds else held.clone() if isinstance(held, Tensor) else held
        elif op.op == "get_attr":
            found = attrgetter(str(op.target))(self._program.graph_module)
            values[op] = found.detach().clone() if isinstance(found, Tensor) else found
        elif op.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((op.args, op.kwargs), lambda source: values[source])
            try:
                with under(op):
                    values[op] = function(op)(*args, **kwargs)
            except Exception as error:  # operators raise what they like
                raise UnsupportedError(f"{op.target} doesn't run in the stored type: {str(error)[:200]}") from None


def held_tensors(program: ExportedProgram) -> dict[str, Any]:
    """The tensors that a program holds, by the names of their placeholders."""
    found: dict[str, Any] = {}
    for spec in program.graph_signature.input_specs:
        if spec.target is not None:
            held = program.state_dict.get(spec.target)
            held = program.constants.get(spec.target) if held is None else held
            found[spec.arg.name] = held.detach() if isinstance(held, Tensor) else held
    return found


def _last_uses(graph: Ops) -> dict[Op, list[Op]]:
    """The values that nobody reads after an operator, itself included where nobody reads it."""
    found: dict[Op, list[Op]] = {}
    seen: set[Op] = set()
    for op in reversed(graph.nodes):
        for each in (op, *op.all_input_nodes):
            if each not in seen:
                seen.add(each)
                found.setdefault(op, []).append(each)
    return found
