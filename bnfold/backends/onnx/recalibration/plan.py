"""Recalibrate an ONNX model in lockstep: what its BatchNorms are, how its stages run, and the new statistics written into it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bnfold.data import Batch, InputSpec
from bnfold.errors import HOW_TO_KEEP
from bnfold.recalibration.moments import Pointwise
from bnfold.recalibration.plan import BatchNorm, Reading, Select, StagePlan, every
from bnfold.text import unused

from ..folded import numpy_type
from ..graph.constants import Constants
from ..graph.edit import inlined, is_read
from ..graph.proto import identity
from ..graph.ranges import inputs
from ..graph.sequences import Sequences
from ..graph.shapes import Shapes
from ..graph.walk import (
    all_graphs,
    all_nodes,
    arg,
    attribute,
    batchnorms,
    behind_identity,
    in_training,
    is_batchnorm,
    name_of,
    number,
    opset,
)
from ..runtime.session import Session
from . import operations
from .operations import OnnxCall, OnnxCut, OnnxOperation
from .stage import OnnxStage


def plan_of(model: ir.Model, *, select: Select = every, freeze: bool = False, provider: str = "cpu") -> OnnxPlan:
    """A copy of the model, cut into stages. select: whether a BatchNorm of this name is measured. freeze: those in training mode too.

    Only means and variances change. A BatchNorm that can't be measured (training mode, in a control-flow body, with parameters that the
    caller may override or that depend on the data) keeps its statistics, with a note in the report. Frozen ones normalise with theirs from
    then on.

    Raises NothingToDoError where there is no BatchNorm to measure.
    """
    functions = any(is_batchnorm(n) for f in model.functions.values() for n in all_nodes(f.graph))
    fresh = inlined(model) if functions else model.clone()
    name_values(fresh)
    return OnnxPlan(fresh, select, freeze, provider)


class OnnxPlan(StagePlan[ir.Node, ir.Value]):
    """A model of its own, cut into stages."""

    none_found = f"{StagePlan.none_found}. {HOW_TO_KEEP}. Keras writes them out as arithmetic: recalibrate its own model, in Python"

    def __init__(self, model: ir.Model, select: Select, freeze: bool, provider: str) -> None:
        super().__init__(select, freeze)
        self.model, self.provider = model, provider
        self._shapes = Shapes(model)
        self.constants = Constants(model, self._shapes)
        Sequences(model, self.constants, self._shapes).note()
        self.cut()

    # --- what there is to measure ---------------------------------------------------------------------------------------------

    def find(self) -> None:
        for inner, where in batchnorms(self.model):
            if inner.graph is not self.model.graph and self.select(name_of(inner)):
                self.keeps(name_of(inner), where)
        for node in self.model.graph:
            if not is_batchnorm(node) or not self.select(name_of(node)):
                continue
            if why := self._why_not(node):
                self.keeps(name_of(node), why)
            else:
                place = self.place(self._identity(node), partial(self._layer, node))
                per_activation = attribute(node, "spatial", 1) == 0 and self._value(node, 3).ndim > 1
                self.calls.append(OnnxCall(node, arg(node), place, per_activation))

    def _layer(self, node: ir.Node) -> BatchNorm:
        if self._in_training(node):
            self.frozen.add(len(self.layers))
            self.notes.append(f"{name_of(node)} was in training mode, and has statistics of its own now")
        mean, variance = (np.ravel(self._value(node, index)).astype(np.float64) for index in (3, 4))
        return BatchNorm(name_of(node), mean, variance, number(node, "epsilon", 1e-5))

    def _why_not(self, node: ir.Node) -> str | None:
        if self._in_training(node):
            if not self.freeze:
                return "it is in training mode: it normalises each batch by itself (--freeze gives it statistics of its own)"
            if any(v.uses() for v in node.outputs[1:]) or any(v.is_graph_output() for v in node.outputs[3:]):
                return "it is in training mode, and the statistics of each batch are used elsewhere in the model, or are outputs of it"
        elif any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
            return "its further outputs are read, which only training mode gives"
        for index, role in ((3, "mean"), (4, "variance")):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is None or not self.constants.is_constant(value):
                overridable = value is not None and value.is_graph_input()
                return (
                    f"its {role} {'may be overridden by the caller (it is also an input of the model)' if overridable else 'is computed'}"
                )
        if self._value(node, 3).shape != self._value(node, 4).shape:
            return "its mean and its variance have different shapes"
        if self.constants.is_constant(node.inputs[0]):
            return "its input doesn't depend on the data"
        return None

    def _in_training(self, node: ir.Node) -> bool:
        return in_training(node, opset(self.model))

    def _value(self, node: ir.Node, index: int) -> npt.NDArray[Any]:
        array = self.constants.get(node.inputs[index])
        assert array is not None
        return array

    def _identity(self, node: ir.Node) -> Any:
        """What makes two calls one layer: the same stored mean and variance, and equal gamma, beta and epsilon.

        Tools that store equal tensors once (zeros and ones, in a network that was never trained) make different layers share them. Such
        a layer betrays itself where its own gamma and variance, or its beta and mean, are one tensor, or its gamma or beta differs.
        """
        gamma, beta, mean, variance = (None if value is None else behind_identity(value) for value in node.inputs[1:5])
        if gamma is variance or beta is mean or gamma is beta or mean is variance:
            return node
        values = [self.constants.get(v) for v in (gamma, beta)]
        equal = tuple(v if a is None else a.tobytes() for v, a in zip((gamma, beta), values, strict=True))
        return (mean, variance, number(node, "epsilon", 1e-5), *equal)

    # --- how it is cut and runs -----------------------------------------------------------------------------------------------

    def operations(self) -> Iterator[OnnxOperation]:
        return operations.operations(self.model.graph, self.constants, self._shapes, self.provider)

    def nbytes(self, value: ir.Value) -> int | None:
        return operations.nbytes(value, self._shapes)

    def weights(self, convolution: ir.Node) -> Pointwise:
        return operations.pointwise(convolution, self.constants)

    def stages(self, own: bool = False, done: int = 0, known: Mapping[str, np.dtype[Any]] | None = None) -> Iterator[OnnxStage]:
        values = itertools.chain(self.model.graph.inputs, *(node.outputs for node in self.model.graph))
        types = {value.name or "": self._shapes.dtype(value) for value in values}
        self._kinds = {name: dtype.value for name, dtype in types.items() if dtype is not None}
        self._kinds |= {name: ir.DataType.from_numpy(dtype).value for name, dtype in (known or {}).items()}
        set_already = [call for part in self._cuts[:done] for call in part.calls if call.layer in self.statistics]
        self._measured: dict[ir.Node, list[npt.NDArray[Any]]] = {call.node: self.statistics[call.layer] for call in set_already}
        empty = [[np.empty(shape, dtype) for dtype, shape in self.forms(layer)] for layer in range(len(self.layers))]
        self._given = {call.node: (i, empty[call.layer]) for i, call in enumerate(self.calls)} if own else {}
        lacking = []
        for stage in super().stages(own, done):
            assert isinstance(stage, OnnxStage)
            yield stage
            lacking += [stage.lacks] * bool(stage.lacks)
            for reading in stage.readings:
                if reading.layer in self.statistics:
                    self._measured[self.calls[reading.call].node] = self.statistics[reading.layer]
        if lacking:
            self.notes.append(
                f"{len(lacking)} of {self.stage_count} stages ran in the float64 reference evaluator, which is slow, since ONNX Runtime "
                f"lacks a kernel on {self.provider}: {lacking[0]}"
            )

    def stage(self, part: OnnxCut, readings: list[Reading], own: bool, *, first: bool, last: bool) -> OnnxStage:
        return OnnxStage(self.model, part, readings, self._measured, self._kinds, self.provider, self._given)

    # --- the model ------------------------------------------------------------------------------------------------------------

    def identity(self) -> str:
        return identity(self.model)

    @property
    def specs(self) -> list[InputSpec]:
        return inputs(self.model)

    def outputs(self, batch: Batch) -> dict[str, npt.NDArray[Any]]:
        made = self._session.run(batch)
        return {} if any(is_batchnorm(node) and self._in_training(node) for node in all_nodes(self.model.graph)) else made

    @cached_property
    def _session(self) -> Session:
        return Session(self.model.clone())

    def forms(self, layer: int) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
        node = self.nodes[layer][0]
        return [(numpy_type(self.constants.dtype(arg(node, index))), self._value(node, 3).shape) for index in (3, 4)]

    def write(self) -> ir.Model:
        for layer in self.frozen & self.statistics.keys():
            for node in self.nodes[layer]:
                leave_training(node, opset(self.model))
        replace(self.model, [(self.nodes[layer], arrays) for layer, arrays in self.statistics.items()])
        return self.model


# --- the new statistics ---------------------------------------------------------------------------------------------------------------


def name_values(model: ir.Model) -> None:
    """Every value gets a name: the stages know them by it."""
    taken = _names(model)
    for graph in all_graphs(model.graph):
        for value in chain.from_iterable(node.outputs for node in graph):
            if not value.name and (value.uses() or value.is_graph_output()):
                value.name = unused("value", taken)
                taken.add(value.name)


def replace(model: ir.Model, statistics: Iterable[tuple[Sequence[ir.Node], Sequence[npt.NDArray[Any]]]]) -> None:
    """Put means and variances in the places of the old, under the same name where nobody else reads the old ones.

    statistics: for each layer the nodes of its calls, and the arrays as they are stored.
    """
    taken = _names(model)
    old: dict[ir.Value | None, None] = {}
    for nodes, arrays in statistics:
        for index, array in zip((3, 4), arrays, strict=True):
            value = nodes[0].inputs[index]
            assert value is not None
            alone = value.is_initializer() and value.graph is model.graph and not value.is_graph_output()
            if alone and {(use.node, use.idx) for use in value.uses()} == {(node, index) for node in nodes}:
                value.const_value = ir.tensor(array, name=value.name)
                continue
            name = unused(f"{value.name or name_of(nodes[0])}_recalibrated", taken)
            taken.add(name)
            fresh = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            fresh.shape, fresh.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
            model.graph.register_initializer(fresh)
            if (model.ir_version or 4) < 4:  # there, every initializer is listed among the inputs
                model.graph.inputs.append(fresh)
            for node in nodes:
                old[node.inputs[index]] = None
                node.replace_input_with(index, fresh)
    for each in old:
        _drop_idle(model.graph, each)


def leave_training(node: ir.Node, opset: int) -> None:
    """An output of the model that was the running mean or variance of training is the one that is kept now."""
    for name in ("training_mode", "is_test"):
        node.attributes.pop(name, None)
    if opset < 7:
        node.attributes["is_test"] = ir.AttrInt64("is_test", 1)
    graph = node.graph
    assert graph is not None
    for output, source in zip(node.outputs[1:3], node.inputs[3:5], strict=False):
        if output.is_graph_output():
            made = ir.Node("", "Identity", [source], name=f"{name_of(node)}:{output.name}")
            made.outputs[0].name, output.name = output.name, None
            made.outputs[0].type, made.outputs[0].shape = output.type, output.shape
            graph.outputs[:] = [made.outputs[0] if each is output else each for each in graph.outputs]
            graph.insert_after(node, made)
    node.resize_outputs(1)


def _names(model: ir.Model) -> set[str]:
    graphs = list(all_graphs(model.graph))
    return {v.name for g in graphs for v in chain(g.inputs, g.initializers.values(), *(n.outputs for n in g)) if v.name}


def _drop_idle(graph: ir.Graph, value: ir.Value | None) -> None:
    """Take out what computed or stored a value that nobody reads any more."""
    if value is None or value.uses() or value.is_graph_output():
        return
    node = value.producer()
    if node is None:
        if value.is_initializer() and not value.is_graph_input():
            del graph.initializers[value.name or ""]
    elif node.graph is graph and not is_read(node):
        sources = list(node.inputs)
        graph.remove(node, safe=True)
        for source in sources:
            _drop_idle(graph, source)
