"""One stage of a model as an ONNX Runtime session of its own, with just its weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import TensorProto

from bnfold.capture import overhearing
from bnfold.errors import BnfoldError, UnsupportedError
from bnfold.recalibration.distributed import threads
from bnfold.recalibration.moments import Moments, Pointwise, Samples, measure_samples, measure_through
from bnfold.recalibration.plan import NOTHING, Reading, Values

from ..graph.sequences import parts_of, without_sequences
from ..graph.walk import attribute, open_axes, opset
from ..runtime.placement import assigned, honoured, name_nodes
from ..runtime.providers import resolve, run_failed, runtime, runtime_message, settings, start
from ..runtime.session import outputs_of
from .operations import OnnxCut, sources

OLDEST = 7  # the first opset that ONNX Runtime has kernels for
LARGE = 1 << 10  # bytes: weights from here on are lent to the session, not copied into the proto
LENT = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)
Arrays = dict[str, npt.NDArray[Any]]
Measured = Mapping[ir.Node, Sequence[npt.NDArray[Any]]]
Given = Mapping[ir.Node, tuple[int, Sequence[npt.NDArray[Any]]]]


class OnnxStage:
    """A session over the nodes of a part (none where there are no nodes: a BatchNorm right at the model's input).

    kinds: the type of each value, as ONNX's number, as far as it is known; what the stage makes is added. measured: the mean and variance
    that BatchNormalization nodes have now. given: for those that are normalised with what `run` is given, the place of the call and arrays
    of the types and shapes of its mean and variance. lacks: empty where ONNX Runtime runs the stage; where it has no kernel for an operator
    in its type (float64 and bfloat16 convolutions on the CPU, anything below opset 7), what it said: the stage then runs in the float64
    oracle, which is slow, and its results are rounded to their own types.
    """

    def __init__(
        self,
        model: ir.Model,
        part: OnnxCut,
        readings: list[Reading],
        measured: Measured,
        kinds: dict[str, int],
        provider: str,
        given: Given,
    ) -> None:
        self.readings = readings
        self.needs = [str(value.name) for value in part.reads]
        self.keeps = dict.fromkeys(str(value.name) for value in part.keeps)
        self.lacks = ""
        self._run: Callable[[Arrays], Values] = lambda _: {}
        self._takes: list[str] = []
        here = [(node, *given[node]) for node in part.nodes if node in given]
        self._given = {_parameter(node, i): (call, i, array) for node, call, arrays in here for i, array in enumerate(arrays)}
        if not part.nodes:
            return
        proto, lent = _proto(model, part, measured, kinds, given)
        self._provider, self._on = provider, partial(_Session, proto, lent, kinds)
        self._instead = partial(_evaluator, proto, lent, kinds)
        self._takes = [info.name for info in proto.graph.input if info.name not in self._given]
        self.lacks = "" if opset(model) >= OLDEST else f"there are none below opset {OLDEST}"
        if not self.lacks:
            try:
                self._run = self._on(provider)
                return
            except _NoKernelError as error:
                self.lacks = str(error)
        resolve(provider)
        self._run = self._instead()

    def measure(self, array: npt.NDArray[Any], through: Pointwise | None = None) -> Moments | Samples:
        return measure_samples(array) if through is None else measure_through(array, through)

    def waiting(self, array: npt.NDArray[Any], room: int) -> npt.NDArray[Any]:
        return array

    def run(self, values: Values, own: Mapping[int, Moments] = NOTHING) -> Values:
        feeds = {name: np.ascontiguousarray(values[name]) for name in self._takes}
        for name, (call, index, stored) in self._given.items():
            feeds[name] = (own[call].variance() if index else own[call].mean).astype(stored.dtype).reshape(stored.shape)
        try:
            return self._run(feeds)
        except BnfoldError:
            raise
        except Exception as error:  # onnxruntime raises its own classes, which share no base but Exception
            text = runtime_message(error)
            if "does not support" in text or "not implemented" in text.lower():  # as recurrent kernels in float64 say when they run
                self.lacks, self._run = text, self._instead()
                return self._run(feeds)
            raise run_failed(error, self._provider, feeds, lambda: self._on("cpu")(feeds)) from None


class _NoKernelError(Exception):
    """ONNX Runtime knows the operator, but not in this type or opset."""


class _Session:
    """ONNX Runtime over one stage, without graph optimisation."""

    def __init__(self, proto: onnx.ModelProto, lent: Arrays, kinds: dict[str, int], provider: str) -> None:
        ort = runtime()
        options = settings(threads=threads())
        options.enable_cpu_mem_arena = False  # an arena gives nothing back while one of its values is held
        # Threads that spin between two runs take the cores from whoever measures the results.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        name_nodes(proto.graph)
        self._lent = [ort.OrtValue.ortvalue_from_numpy(array) for array in lent.values()]  # the session reads the weights where they are
        if lent:
            options.add_external_initializers(list(lent), self._lent)
        try:
            self._session = start(proto.SerializeToString(), options, provider)
        except UnsupportedError as error:
            text = str(error).partition(": ")[2]
            if "Could not find an implementation" in text or "only *guarantees* support" in text:  # an opset newer than the runtime
                raise _NoKernelError(text) from None
            raise UnsupportedError(f"ONNX Runtime can't run this model on {provider}: {text}") from None
        honoured(assigned(self._session, provider), provider, lambda: proto)
        kinds.update({output.name: _kind(output.type, output.name) for output in self._session.get_outputs()})

    def __call__(self, feeds: Arrays) -> Values:
        with overhearing():
            return outputs_of(self._session, feeds)


def _evaluator(proto: onnx.ModelProto, lent: Arrays, kinds: dict[str, int]) -> Callable[[Arrays], Values]:
    """The stage in the float64 oracle. Raises UnsupportedError, naming the operator, where that lacks one too."""
    from ..oracle.evaluator import Oracle

    for tensor in proto.graph.initializer:
        if tensor.name in lent:
            tensor.CopyFrom(ir.to_proto(ir.Tensor(lent[tensor.name], name=tensor.name)))
    oracle = Oracle(ir.from_proto(proto))

    def run(feeds: Arrays) -> Values:
        made = oracle.run(feeds)
        for name, array in made.items():
            own = onnx.helper.tensor_dtype_to_np_dtype(kinds[name]) if name in kinds else array.dtype
            made[name] = array.astype(own, copy=False)
            kinds[name] = onnx.helper.np_dtype_to_tensor_dtype(own)
        return made

    return run


def _proto(model: ir.Model, part: OnnxCut, measured: Measured, kinds: dict[str, int], given: Given) -> tuple[onnx.ModelProto, Arrays]:
    """The stage as a model, and the large weights that go to the session beside it."""
    nodes, stored = _with_constants(part, {*measured, *given})
    graph = onnx.GraphProto(name="stage")
    names: set[str] = set()
    for node in nodes:
        made = ir.to_proto(node)
        if made.name in names:  # ONNX Runtime refuses it
            made.name = f"{made.name}:{node.outputs[0].name!s}"
        names.add(made.name)
        for index, array in enumerate(given[node][1] if node in given else measured.get(node, ())):
            name = made.input[3 + index] = _parameter(node, index)
            if node in given:
                kinds[name] = ir.DataType.from_numpy(array.dtype).value
                graph.input.append(onnx.helper.make_tensor_value_info(name, kinds[name], array.shape))
            else:
                graph.initializer.append(ir.to_proto(ir.Tensor(array, name=name)))
        if node.op_type == "BatchNormalization":
            _as_it_runs(node, made, opset(model), fresh=node in given or node in measured)
        graph.node.append(made)
    read = {value for node in part.nodes for value in sources(node)}
    for value in part.reads:
        if value in read:  # others are only measured
            info = onnx.ValueInfoProto(name=str(value.name))
            if value.is_graph_input() and value.type is not None:
                info = ir.to_proto(value)
            else:
                info.type.tensor_type.elem_type = kinds[str(value.name)]
            graph.input.append(info)
    open_axes(graph)
    without_sequences(graph, {str(node.outputs[0].name): parts for node in nodes if (parts := parts_of(node))}, opset(model))
    graph.output.extend(onnx.ValueInfoProto(name=str(value.name)) for value in part.makes)
    lent: Arrays = {}
    for value in stored:
        tensor = value.const_value
        if tensor is None:
            raise UnsupportedError(f"{value.name!r} is read by the model but neither computed nor given")
        entry = graph.initializer.add(name=str(value.name), data_type=tensor.dtype.value, dims=list(tensor.shape.numpy()))
        if tensor.dtype == ir.DataType.STRING:
            entry.string_data.extend(tensor.string_data())  # type: ignore[attr-defined]  # onnx_ir's protocol leaves it out
        elif tensor.dtype in LENT and tensor.nbytes >= LARGE:
            entry.data_location = TensorProto.EXTERNAL
            entry.external_data.add(key="location", value="in-memory")
            lent[entry.name] = np.require(tensor.numpy(), requirements=["C", "A"])
        else:
            entry.raw_data = tensor.tobytes()
    proto = onnx.ModelProto(ir_version=max(model.ir_version or 8, 4), graph=graph)
    proto.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items())
    proto.functions.extend(ir.to_proto(function) for function in model.functions.values())
    return proto, lent


def _with_constants(part: OnnxCut, fresh: Collection[ir.Node]) -> tuple[list[ir.Node], list[ir.Value]]:
    """The stage's nodes and those that compute the constants they read, and the stored values that all of these read.

    fresh: BatchNormalization nodes whose own means and variances aren't read.
    """
    wanted: dict[ir.Node, None] = {}
    stored: dict[ir.Value, None] = {}
    given = set(part.reads)
    for last in part.nodes:
        stack = [(last, False)]
        while stack:  # each behind those whose values it reads
            node, ready = stack.pop()
            if node in wanted:
                continue
            if ready:
                wanted[node] = None
                continue
            stack.append((node, True))
            for value in list(sources(node))[: 3 if node in fresh else None]:
                maker = value.producer()
                if value in given:
                    continue
                if maker is None:
                    stored[value] = None
                else:
                    stack.append((maker, False))
    return list(wanted), list(stored)


def _as_it_runs(node: ir.Node, made: onnx.NodeProto, version: int, fresh: bool) -> None:
    """fresh: whether it has its statistics from outside, and so is out of training mode here.

    Opset 7 and 8: spatial = 0 with one parameter per channel is a known malformation, which means spatial = 1.
    """
    mean = node.inputs[3].shape if node.inputs[3] is not None else None
    drop = {"spatial"} if mean is not None and mean.rank() == 1 else set()
    if fresh:
        drop |= {"training_mode", "is_test"}
        del made.output[1:]
    kept = [a for a in made.attribute if a.name not in drop]
    del made.attribute[:]
    made.attribute.extend(kept)
    if not fresh and attribute(node, "training_mode", 0):  # ONNX Runtime wants all outputs of it
        made.output.extend(f"{made.output[0]}:unused:{i}" for i in range(len(made.output), 3))
    if fresh and version < 7:
        made.attribute.append(onnx.helper.make_attribute("is_test", 1))


def _parameter(node: ir.Node, index: int) -> str:
    return f"{node.outputs[0].name!s}:{('mean', 'variance')[index]}"


def _kind(text: str, name: str) -> int:
    """ONNX's number of ONNX Runtime's "tensor(float16)"."""
    inner = text.removeprefix("tensor(").removesuffix(")")
    if f"tensor({inner})" != text:
        raise UnsupportedError(f"{name!r} is a {text} that would have to wait between two BatchNorms; only tensors can")
    return int(TensorProto.DataType.Value(inner.upper()))
