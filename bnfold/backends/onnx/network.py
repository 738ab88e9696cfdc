"""The inner values of an ONNX model (see `bnfold.verification.normal_form`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import onnx
import onnx_ir as ir

from bnfold.algebra.graph import Graph, Value
from bnfold.errors import UnsupportedError
from bnfold.verification.normal_form import Part, Stream

from .graph.inline import inlined
from .graph.proto import self_contained
from .graph.walk import all_graphs
from .lowering.table import lower
from .oracle.evaluator import Oracle
from .runtime.session import Session

if TYPE_CHECKING:
    from bnfold.data import Batch

    from .model import OnnxSubject
    from .runtime.bisect import Culprit

CHUNK = 8  # values that one run in the stored types gives out, for ONNX Runtime gives all of them at the end


class OnnxNetwork:
    """See `bnfold.verification.normal_form.Network`. Functions are put in the places of their calls."""

    kind = "onnx"

    def __init__(self, subject: OnnxSubject) -> None:
        self._subject = subject

    @cached_property
    def model(self) -> ir.Model:
        return inlined(self._subject.model)

    def lowered(self) -> tuple[Graph, Mapping[str, Value]]:
        graph = lower(self.model)
        named = {v.name: v for node in graph.nodes for v in node.outputs}
        outputs = {str(v.name): named[v.name] for g in all_graphs(self.model.graph) for v in g.outputs if v.name in named}
        return graph, outputs

    def stream(self, feeds: Batch, wanted: Iterable[str], *, jitter: int | None = None, exact: bool = True) -> Stream:
        known = {v.name for node in self.model.graph for v in node.outputs}
        names = [name for name in wanted if name in known]
        if exact:
            yield from Oracle(self.model, jitter=jitter).stream(feeds, names)
            return
        order = [v.name for node in self.model.graph for v in node.outputs if v.name in set(names)]
        model = self.model if jitter is None else type(self._subject)(self.model)._moved(jitter)
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            found = Session(model, outputs=[name for name in chunk if name]).run(feeds)
            for name in chunk:
                if name:
                    yield name, found.pop(name)

    def edge(self, output: str, stops: Collection[str]) -> list[str]:
        graph = self._skeleton.graph
        made = {name: node for node in graph.node for name in node.output if name}
        stored = set(self.model.graph.initializers)
        found: dict[str, None] = {}
        seen, stack = {output}, [output]
        while stack:
            for name in sorted(_reads(made[stack.pop()])):
                if name and name not in seen and name not in stored:
                    seen.add(name)
                    if name in stops or name not in made:
                        found[name] = None
                    else:
                        stack.append(name)
        return list(found)

    @cached_property
    def _skeleton(self) -> onnx.ModelProto:
        return self_contained(self.model, initializers=False)

    def types(self, names: Iterable[str]) -> dict[str, Any]:
        wanted = set(names)
        values = [*self.model.graph.inputs, *(v for node in self.model.graph for v in node.outputs)]
        return {str(v.name): v.dtype.numpy() for v in values if v.name in wanted and v.dtype is not None}

    def part(self, inputs: Mapping[str, npt.NDArray[Any]], output: str, also: Iterable[str] = ()) -> Part:
        proto = extract(self_contained(self.model), inputs, [output, *also])
        return Part(".onnx", proto.SerializeToString())

    def culprit(self, feeds: Batch, provider: str, unit: float) -> Culprit | None:
        """Which optimisation of ONNX Runtime harms the model (see `bisect`)."""
        from .runtime.bisect import culprit

        return culprit(self.model, feeds, provider, unit)


def extract(model: onnx.ModelProto, inputs: Mapping[str, npt.NDArray[Any]], outputs: list[str]) -> onnx.ModelProto:
    """The nodes between some values and others, as a model of their own. Raises UnsupportedError where more goes into them."""
    graph = model.graph
    made = {name: i for i, node in enumerate(graph.node) for name in node.output}
    weights = {t.name: t for t in graph.initializer}
    sparse = {t.values.name: t for t in graph.sparse_initializer}
    chosen: set[int] = set()
    used: set[str] = set()
    seen: set[str] = set()
    stack = list(outputs)
    while stack:
        name = stack.pop()
        if not name or name in seen or name in inputs:
            continue
        seen.add(name)
        if name in weights or name in sparse:
            used.add(name)
        elif name not in made:
            raise UnsupportedError(f"value {name!r} of the model comes from outside the part")
        elif made[name] not in chosen:
            chosen.add(made[name])
            stack.extend(_reads(graph.node[made[name]]))
    infos = {v.name: v for v in (*graph.input, *graph.output, *graph.value_info)}
    part = onnx.ModelProto()
    part.CopyFrom(model)
    for each in ("node", "initializer", "sparse_initializer", "input", "output", "value_info", "quantization_annotation"):
        part.graph.ClearField(each)
    part.graph.node.extend(node for i, node in enumerate(graph.node) if i in chosen)
    part.graph.initializer.extend(t for name, t in weights.items() if name in used)
    part.graph.sparse_initializer.extend(t for name, t in sparse.items() if name in used)
    for name, array in inputs.items():
        part.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape))
    if (part.ir_version or 8) < 4:
        for tensor in part.graph.initializer:
            part.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    for name in dict.fromkeys(outputs):
        info = onnx.ValueInfoProto(name=name)
        if name in infos and infos[name].type.HasField("tensor_type"):
            info.type.tensor_type.elem_type = infos[name].type.tensor_type.elem_type
        elif name in weights:
            info = onnx.helper.make_tensor_value_info(name, weights[name].data_type, list(weights[name].dims))
        part.graph.output.append(info)
    return part


def _reads(node: onnx.NodeProto) -> set[str]:
    """What a node reads from around it, its subgraphs included."""
    names = set(node.input)
    for attribute in node.attribute:
        for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            own = {i.name for i in body.input} | {t.name for t in body.initializer} | {o for n in body.node for o in n.output}
            names |= set().union(*(_reads(n) for n in body.node)) - own
            names |= {o.name for o in body.output} - own
    return names
