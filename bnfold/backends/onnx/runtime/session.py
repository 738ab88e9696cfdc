"""A model on ONNX Runtime: what it takes, and a session on a named execution provider (see `providers`)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto

from bnfold.capture import overhearing
from bnfold.data import Batch, InputSpec
from bnfold.data.inputs import check_feeds, samples_of
from bnfold.data.memory import enough_memory
from bnfold.errors import ModelError, UsageError
from bnfold.files import Workplace
from bnfold.model import Placement

from ..files.save import Weight, write
from ..files.validate import tensors
from ..graph.proto import self_contained, skeleton, stored_bytes
from ..graph.ranges import inputs
from ..graph.walk import all_nodes
from .placement import assigned, honoured, name_nodes, profiled
from .providers import CPU, resolve, run_failed, runtime, start

LONGEST = 60  # seconds of a run with loops in it
# Protocol buffers can't hold more; the margin is for the graph around the weights.
PROTO_LIMIT = 2**31 - 2**24
# numpy has these types only through ml_dtypes, which ONNX Runtime's Python interface doesn't take.
WIDENED: set[int] = {
    TensorProto.BFLOAT16,
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E4M3FNUZ,
    TensorProto.FLOAT8E5M2,
    TensorProto.FLOAT8E5M2FNUZ,
}


class Session:
    """A model loaded into ONNX Runtime on one execution provider. The model itself isn't touched.

    provider: "cpu", "cuda", "tensorrt", "openvino", "coreml", "dml" and so on, or ONNX Runtime's own name, with options as
    "openvino:device_type=CPU". optimise: all of ONNX Runtime's graph optimisations, or none. precision: "full", or "as deployed", with the
    coarser arithmetic that is the provider's default, such as TF32. outputs: inner values to return besides the model's outputs. threads:
    per operator; 0 leaves it to ONNX Runtime. placement: which nodes run there; for ONNX Runtime before 1.24 known after the first run.
    Raises UsageError (no such provider), DeviceError (not built in, not loadable or not honoured) or UnsupportedError (ONNX Runtime
    refuses the model).
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        provider: str = "cpu",
        optimise: bool = False,
        outputs: Iterable[str] = (),
        threads: int = 0,
        precision: str = "full",
    ) -> None:
        ort = runtime()

        self._requested = provider
        self.provider = resolve(provider)
        self._model = model
        self._optional = set(model.graph.initializers)
        self._loops = any(node.op_type == "Loop" for node in all_nodes(model.graph))
        self._widened: dict[str, np.dtype[Any]] = {}

        options = ort.SessionOptions()
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
        options.use_deterministic_compute = True
        options.intra_op_num_threads = threads

        self._folder: Workplace | None = None  # ONNX Runtime may map the weights: they live as long as the session
        source = self._source(model, tuple(outputs))
        self._profiling = self.provider != CPU and not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")
        if self._profiling:
            self._profile = Workplace()
            options.enable_profiling = True
            options.profile_file_prefix = str(self._profile.path / "run")
        self._session = start(source, options, provider, precision=precision)
        self.placement: Placement | None = assigned(self._session, provider)
        honoured(self.placement, provider, lambda: skeleton(model))
        self._outputs = [o.name for o in self._session.get_outputs()]

    @property
    def specs(self) -> list[InputSpec]:
        return inputs(self._model)

    def run(self, feeds: Batch) -> dict[str, np.ndarray]:
        """The outputs by name, in the model's order, then the extra ones. Raises DataError for feeds that don't fit,
        DeviceError where the provider fails on what the CPU runs."""
        check_feeds(feeds, inputs(self._model, feeds), self._optional)
        given = {k: np.ascontiguousarray(v.astype(np.float32) if k in self._widened else v) for k, v in feeds.items()}
        with enough_memory(samples_of(feeds)), overhearing(), self._ending() as options:
            try:
                results = self._session.run(self._outputs, given, options)
            except Exception as error:
                if options is not None and options.terminate:
                    raise ModelError(f"a loop of the model doesn't end within {LONGEST} s; don't use this file") from None
                raise run_failed(error, self._requested, feeds, lambda: Session(self._model).run(feeds)) from None
        if self._profiling:
            self._profiling = False
            self.placement = profiled(self._session.end_profiling(), self._requested)
            honoured(self.placement, self._requested, lambda: skeleton(self._model))
        named = zip(self._outputs, results, strict=True)
        return {k: v.astype(self._widened[k]) if k in self._widened else v for k, v in named}

    @contextlib.contextmanager
    def _ending(self) -> Iterator[Any]:
        """The options of a run, by which one is ended whose loop goes on and on; None for a model without loops."""
        if not self._loops:
            yield None
            return
        options = runtime().RunOptions()
        timer = threading.Timer(LONGEST, setattr, (options, "terminate", True))
        timer.start()
        try:
            yield options
        finally:
            timer.cancel()

    def _source(self, model: ir.Model, extra: tuple[str, ...]) -> bytes | str:
        """What ONNX Runtime loads: bytes, or past the limit of protocol buffers a file with external data."""
        large = stored_bytes(model) > PROTO_LIMIT
        proto = self_contained(model, initializers=not large)
        name_nodes(proto.graph)
        _expose(proto, model, extra)
        self._widened = _widen_interface(proto)
        if not large:
            return bytes(proto.SerializeToString())
        self._folder = Workplace()
        path = self._folder.path / "model.onnx"
        weights = [Weight(value) for value in model.graph.initializers.values()]
        with open(path.with_suffix(".data"), "wb") as data, open(path, "wb") as file:
            for weight in weights:
                weight.move(data, "model.data")
            write(proto, weights, file)
        return str(path)


def _expose(proto: onnx.ModelProto, model: ir.Model, names: tuple[str, ...]) -> None:
    """Make inner values outputs. ONNX Runtime infers their types; those that must pass as another type are inferred here."""
    inner = {value.name: value for node in model.graph for value in node.outputs}
    there = {info.name for info in proto.graph.output}
    infos = {}
    for name in dict.fromkeys(names):
        if name not in inner:
            raise UsageError(f"the model computes no value {name!r}")
        if name not in there:
            infos[name] = onnx.ValueInfoProto(name=name)
            dtype = inner[name].dtype
            if dtype is not None and isinstance(inner[name].type, ir.TensorType):
                infos[name].type.tensor_type.elem_type = dtype.value
    if any(not info.HasField("type") for info in infos.values()) and _uses(proto, WIDENED):
        bare = onnx.ModelProto()
        bare.CopyFrom(proto)
        inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=False).graph.value_info
        infos.update({info.name: info for info in inferred if info.name in infos})
    proto.graph.output.extend(infos.values())


def _uses(proto: onnx.ModelProto, types: set[int]) -> bool:
    return any(i.type.tensor_type.elem_type in types for i in proto.graph.input) or any(t.data_type in types for t in tensors(proto))


def _widen_interface(proto: onnx.ModelProto) -> dict[str, np.dtype[Any]]:
    """Let inputs and outputs of types that numpy hasn't got pass as float32, which holds them exactly. Returns their own types by name."""
    graph, own = proto.graph, {}
    casts: tuple[list[onnx.NodeProto], list[onnx.NodeProto]] = ([], [])
    filled = {t.name for t in graph.initializer}
    for values, is_output in ((graph.input, False), (graph.output, True)):
        for info in values:
            kind = info.type.tensor_type.elem_type
            if kind not in WIDENED or (not is_output and info.name in filled):
                continue
            own[info.name] = onnx.helper.tensor_dtype_to_np_dtype(kind)
            info.type.tensor_type.elem_type = TensorProto.FLOAT
            inner = info.name + ":stored"
            _rename(graph, info.name, inner)
            ends = (inner, info.name) if is_output else (info.name, inner)
            casts[is_output].append(onnx.helper.make_node("Cast", ends[:1], ends[1:], to=TensorProto.FLOAT if is_output else kind))
    for node in reversed(casts[0]):
        graph.node.insert(0, node)
    graph.node.extend(casts[1])
    return own


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Rename a value in all nodes that write or read it, in subgraphs too."""
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _rename(body, old, new)
                for info in body.output:
                    if info.name == old:
                        info.name = new
