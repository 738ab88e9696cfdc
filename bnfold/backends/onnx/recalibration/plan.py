"""Recalibrate an ONNX model in lockstep: what its BatchNorms are, and the new statistics written into a copy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bnfold.algebra.rounding import narrowed
from bnfold.errors import HOW_TO_KEEP, NothingToDoError
from bnfold.recalibration.methods import Statistics
from bnfold.recalibration.protocol import Layer, Reading
from bnfold.recalibration.selection import Select, every

from ..graph.constants import Constants
from ..graph.inline import inlined
from ..graph.inputs import inputs
from ..graph.sequences import Sequences
from ..graph.shapes import Shapes
from ..graph.walk import all_graphs, all_nodes, arg, attribute, batchnorms, in_training, is_batchnorm, is_standard, name_of, number
from ..runtime.session import Session
from ..write import numpy_type
from .operations import OnnxCall, cut
from .pointwise import passes, read
from .stage import OnnxStage

if TYPE_CHECKING:
    from bnfold.data import Batch, InputSpec

Parameters = tuple[npt.NDArray[Any], npt.NDArray[Any]]  # mean and variance, as stored


def plan_of(model: ir.Model, *, select: Select = every, freeze: bool = False, provider: str = "cpu") -> OnnxPlan:
    """A copy of the model, cut into stages. select: whether a BatchNorm of this name is measured. freeze: those in training mode too.

    Only means and variances change. A BatchNorm that can't be measured (training mode, in a control-flow body, with parameters that the
    caller may override or that depend on the data) keeps its statistics, with a note in the report. Frozen ones normalise with theirs from
    then on.

    A layer that is called several times has the pooled statistics of all its calls. Where one call depends on the outcome of another,
    each is normalised, on the way, with the pooled statistics of the calls measured up to it.

    Raises NothingToDoError where there is no BatchNorm to measure.
    """
    functions = any(is_batchnorm(n) for f in model.functions.values() for n in all_nodes(f.graph))
    fresh = inlined(model) if functions else model.clone()
    _name_values(fresh)
    return OnnxPlan(fresh, provider, select, freeze)


class OnnxPlan:
    """A model cut into stages (see `bnfold.recalibrate.Plan`). It isn't touched before `write`."""

    def __init__(self, model: ir.Model, provider: str = "cpu", select: Select = every, freeze: bool = False) -> None:
        self.model = model
        self.provider = provider
        self._select, self._freeze = select, freeze
        self._shapes = Shapes(model)
        self.constants = Constants(model, self._shapes)
        Sequences(model, self.constants, self._shapes).note()
        self.notes: list[str] = []
        self.layers: list[Layer] = []
        self.calls: list[OnnxCall] = []
        self.statistics: dict[int, Parameters] = {}  # by layer, final after the last stage
        self.frozen: set[int] = set()  # the layers that came in training mode
        self._find()
        if not self.calls:
            why = "; ".join(self.notes) or (
                f"the model holds no BatchNorm. {HOW_TO_KEEP}" if select is every else "no BatchNorm is selected"
            )
            raise NothingToDoError(f"there are no statistics to measure: {why}")
        self._cuts, dependent = cut(model.graph, [self._short(call) for call in self.calls], self._is_fixed, self._shapes)
        for layer in sorted(dependent):
            self.notes.append(
                f"{self.layers[layer].name} is called several times, and one call depends on another: its statistics are those of all "
                f"calls, and each call was normalised with those of the calls up to it"
            )

    @property
    def specs(self) -> list[InputSpec]:
        """What the model is fed."""
        return inputs(self.model)

    def outputs(self, batch: Batch) -> dict[str, npt.NDArray[Any]]:
        """What the model gives as it came, by output name; none of it where a BatchNorm in training mode mixes the samples of a batch."""
        made = self._session.run(batch)
        mixes = any(is_batchnorm(node) and in_training(node, _opset(self.model)) for node in all_nodes(self.model.graph))
        return {} if mixes else made

    @cached_property
    def _session(self) -> Session:
        return Session(self.model.clone())

    device_room = 0  # ONNX Runtime hands its results over in the host's memory

    @property
    def stage_count(self) -> int:
        return len(self._cuts)

    def stages(self, own: bool = False) -> Iterator[OnnxStage]:
        values = itertools.chain(self.model.graph.inputs, *(node.outputs for node in self.model.graph))
        types = {value.name or "": self._shapes.dtype(value) for value in values}
        kinds = {name: dtype.value for name, dtype in types.items() if dtype is not None}
        replaced: dict[ir.Node, dict[int, npt.NDArray[Any]]] = {}
        place = {call.node: i for i, call in enumerate(self.calls)}
        told = {node: (i, self._value(node, 3), self._value(node, 4)) for node, i in place.items()} if own else {}
        lacking = []
        # Where nothing waits, nothing runs twice.
        cuts = cut(self.model.graph, self.calls, self._is_fixed, self._shapes, once=True)[0] if own else self._cuts
        for each in cuts:
            readings = [self._reading(call, place[call.node]) for call in each.calls]
            stage = OnnxStage(self.model, each, readings, replaced, kinds, self.provider, told)
            yield stage
            lacking += [stage.lacks] * bool(stage.lacks)
            for call in each.calls:
                if call.layer in self.statistics:
                    mean, variance = self.statistics[call.layer]
                    replaced[call.node] = {3: mean, 4: variance}
        if lacking:
            self.notes.append(
                f"{len(lacking)} of {len(self._cuts)} stages ran in the float64 reference evaluator, which is slow, since ONNX Runtime "
                f"lacks a kernel on {self.provider}: {lacking[0]}"
            )

    def set(self, layer: int, statistics: Statistics) -> str | None:
        node = next(call.node for call in self.calls if call.layer == layer)
        stored = narrowed(statistics, [numpy_type(self.constants.dtype(value)) for value in node.inputs[3:5] if value is not None])
        if isinstance(stored, str):
            self.statistics.pop(layer, None)
            return stored
        mean, variance = (array.reshape(self._value(node, index).shape) for array, index in zip(stored, (3, 4), strict=True))
        self.statistics[layer] = (mean, variance)
        return None

    def write(self) -> ir.Model:
        """The copy, with the statistics that were set."""
        for call in self.calls:
            if call.layer in self.frozen and call.layer in self.statistics:
                _freeze(call.node, _opset(self.model))
        _write(self.model, self)
        return self.model

    def _is_fixed(self, value: ir.Value) -> bool:
        """Whether the value doesn't depend on the data; what the caller may override has its stored value here."""
        return value.is_initializer() or self.constants.is_constant(value)

    def _per_activation(self, node: ir.Node) -> bool:
        return attribute(node, "spatial", 1) == 0 and self._value(node, 3).ndim > 1

    def _short(self, call: OnnxCall) -> OnnxCall:
        """A call that is measured without running the pointwise convolution before it, where nothing else reads that one's result."""
        made = call.source.producer()
        alone = len(call.source.uses()) == 1 and self.provider == "cpu" and not self._per_activation(call.node)
        if made is None or not alone or not made.inputs or self._is_fixed(arg(made)) or not passes(made, self.constants, self._shapes):
            return call
        return OnnxCall(call.node, arg(made), call.layer, through=made)

    def _reading(self, call: OnnxCall, place: int) -> Reading:
        through = None if call.through is None else read(call.through, self.constants)
        return Reading(call.source.name or "", call.layer, place, self._per_activation(call.node), through)

    def _find(self) -> None:
        """The calls and the layers that they belong to; a note for each BatchNorm that can't be measured."""
        found: dict[Any, int] = {}
        for inner, where in batchnorms(self.model):
            if inner.graph is not self.model.graph and self._wanted(inner):
                self._leave(inner, where)
        for node in filter(self._wanted, self.model.graph):
            why = self._why_not(node)
            if why is not None:
                self._leave(node, why)
                continue
            key = self._identity(node)
            if key not in found:
                found[key] = len(self.layers)
                mean, variance = (np.ravel(self._value(node, index)) for index in (3, 4))
                self.layers.append(Layer(name_of(node), mean.astype(np.float64), variance.astype(np.float64)))
                if in_training(node, _opset(self.model)):
                    self.frozen.add(found[key])
                    self.notes.append(f"{name_of(node)} was in training mode, and has statistics of its own now")
            source = node.inputs[0]
            assert source is not None
            self.calls.append(OnnxCall(node, source, found[key]))

    def _wanted(self, node: ir.Node) -> bool:
        return is_batchnorm(node) and self._select(name_of(node))

    def _leave(self, node: ir.Node, why: str) -> None:
        self.notes.append(f"{name_of(node)} keeps its statistics: {why}")

    def _why_not(self, node: ir.Node) -> str | None:
        if in_training(node, _opset(self.model)):
            if not self._freeze:
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

    def _value(self, node: ir.Node, index: int) -> npt.NDArray[Any]:
        array = self.constants.get(node.inputs[index])
        assert array is not None
        return array

    def _identity(self, node: ir.Node) -> Any:
        """What makes two calls one layer: the same stored mean and variance, and equal gamma, beta and epsilon.

        Tools that store equal tensors once (zeros and ones, in a network that was never trained) make different layers share them. Such
        a layer betrays itself where its own gamma and variance, or its beta and mean, are one tensor, or its gamma or beta differs.
        """
        gamma, beta, mean, variance = map(_root, node.inputs[1:5])
        if gamma is variance or beta is mean or gamma is beta or mean is variance:
            return node
        values = [self.constants.get(v) for v in (gamma, beta)]
        equal = tuple(v if a is None else a.tobytes() for v, a in zip((gamma, beta), values, strict=True))
        return (mean, variance, number(node, "epsilon", 1e-5), *equal)


def _freeze(node: ir.Node, opset: int) -> None:
    """Out of training mode. An output of the model that was the running mean or variance of training is the one that is kept now."""
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


def _opset(model: ir.Model) -> int:
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))


def _root(value: ir.Value | None) -> ir.Value | None:
    """The value that an Identity only hands on."""
    while value is not None and (node := value.producer()) is not None and node.op_type == "Identity" and is_standard(node):
        value = node.inputs[0]
    return value


def _names(model: ir.Model) -> set[str]:
    graphs = list(all_graphs(model.graph))
    return {v.name for g in graphs for v in itertools.chain(g.inputs, g.initializers.values(), *(n.outputs for n in g)) if v.name}


def _name_values(model: ir.Model) -> None:
    """Every value gets a name: the stages know them by it."""
    taken = _names(model)
    for graph in all_graphs(model.graph):
        for value in itertools.chain.from_iterable(node.outputs for node in graph):
            if not value.name and (value.uses() or value.is_graph_output()):
                value.name = _unused("value", taken)


def _unused(stem: str, taken: set[str]) -> str:
    name = next(n for n in itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(1))) if n not in taken)
    taken.add(name)
    return name


def _write(model: ir.Model, plan: OnnxPlan) -> None:
    """Put the final statistics in the places of the old: under the same name where nobody else reads the old ones."""
    taken = _names(model)
    old: dict[ir.Value, None] = {}
    for layer, arrays in plan.statistics.items():
        nodes = [call.node for call in plan.calls if call.layer == layer]
        for index, array in zip((3, 4), arrays, strict=True):
            value = nodes[0].inputs[index]
            assert value is not None
            uses = {(node, index) for node in nodes}
            alone = value.is_initializer() and value.graph is model.graph and not value.is_graph_output()
            if alone and {(use.node, use.idx) for use in value.uses()} == uses:
                value.const_value = ir.tensor(array, name=value.name)
                continue
            name = _unused(f"{value.name or name_of(nodes[0])}_recalibrated", taken)
            fresh = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            fresh.shape, fresh.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
            model.graph.register_initializer(fresh)
            if (model.ir_version or 4) < 4:  # there, every initializer is listed among the inputs
                model.graph.inputs.append(fresh)
            for node in nodes:
                old[node.inputs[index]] = None  # type: ignore[index]
                node.replace_input_with(index, fresh)
    for value in old:
        _drop_idle(model.graph, value)


def _drop_idle(graph: ir.Graph, value: ir.Value | None) -> None:
    """Take out what computed or stored a value that nobody reads any more."""
    if value is None or value.uses() or value.is_graph_output():
        return
    node = value.producer()
    if node is None:
        if value.is_initializer() and not value.is_graph_input():
            del graph.initializers[value.name or ""]
    elif node.graph is graph and not any(v.uses() or v.is_graph_output() for v in node.outputs):
        inputs_of = list(node.inputs)
        graph.remove(node, safe=True)
        for source in inputs_of:
            _drop_idle(graph, source)
