"""A model on ONNX Runtime: what it takes, and a session on a named execution provider.

The provider that was asked for is the one that runs, or there is a `DeviceError`: ONNX Runtime itself drops a provider that it
can't load and carries on on the CPU. TF32, whose rounding hides real defects, is off.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto

from ...errors import DataError, DeviceError, UnsupportedError, UsageError
from ...feeds import check_feeds, listed, random_feeds
from ...values import shape_text
from .feeds import inputs

if TYPE_CHECKING:
    from ...data import Batch

__all__ = ["Session", "check_feeds", "inputs", "random_feeds", "resolve", "self_contained", "stored_bytes"]

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

_ALIASES = {"directml": "dml", "trt": "tensorrt", "gpu": "cuda", "amd": "migraphx", "onednn": "dnnl", "trtrtx": "nvtensorrtrtx"}
_WHEELS = {
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu (and TensorRT)",
    "nvtensorrtrtx": "onnxruntime-trt-rtx",
    "openvino": "onnxruntime-openvino",
    "dml": "onnxruntime-directml",
    "rocm": "onnxruntime-rocm",
    "migraphx": "onnxruntime-migraphx",
    "qnn": "onnxruntime-qnn",
    "cann": "onnxruntime-cann",
    "webgpu": "onnxruntime-webgpu",
}
# The provider itself must be asked for TF32; for TensorRT's own kernels the driver's switch is NVIDIA_TF32_OVERRIDE=0.
_OPTIONS = {"cuda": {"use_tf32": "0"}}
_BENEATH = {"tensorrt": ("cuda",), "nvtensorrtrtx": ("cuda",)}  # what runs the operators that the provider doesn't have
# ROCm left the list of names in ONNX Runtime 1.24, and is still in use with older ones.
_FORMER = ("ROCMExecutionProvider",)


class Session:
    """A model loaded into ONNX Runtime on one execution provider. The model itself isn't touched.

    provider: "cpu", "cuda", "tensorrt", "openvino", "coreml", "dml" and so on, or ONNX Runtime's own name. What the provider has no
    kernel for runs on the CPU, as ONNX Runtime does it. optimise: all of ONNX Runtime's graph optimisations, or none.
    outputs: inner values to return besides the model's outputs. threads: per operator; 0 leaves it to ONNX Runtime.
    Raises UsageError (no such provider), DeviceError (not built in, not loadable or not honoured) or UnsupportedError (ONNX Runtime
    refuses the model).
    """

    def __init__(
        self, model: ir.Model, *, provider: str = "cpu", optimise: bool = False, outputs: Iterable[str] = (), threads: int = 0
    ) -> None:
        import onnxruntime as ort  # type: ignore[import-untyped]

        ort.set_default_logger_severity(4)
        self.provider = resolve(provider)
        self._model = model
        self._optional = set(model.graph.initializers)
        self._widened: dict[str, np.dtype[Any]] = {}

        options = ort.SessionOptions()
        options.log_severity_level = 4  # fatal only: everything else comes back as an exception, or is checked below
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
        options.use_deterministic_compute = True
        options.intra_op_num_threads = threads
        chain = [
            p for p in (self.provider, *map(_full_name, _BENEATH.get(_short(self.provider), ()))) if p in ort.get_available_providers()
        ]
        providers = [(p, dict(_OPTIONS.get(_short(p), {}))) for p in chain]

        self._folder: tempfile.TemporaryDirectory[str] | None = None  # ONNX Runtime may map the weights: they live as long as the session
        source = self._source(model, tuple(outputs))
        try:
            # Without fallback: else ONNX Runtime prints to standard output and tries again on the CPU.
            self._session = ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
        except Exception as error:  # onnxruntime raises its own classes, which share no base but Exception
            if self.provider != "CPUExecutionProvider" and not _is_about_the_model(error):
                raise DeviceError(
                    f"execution provider {_short(self.provider)} could not start: {_one_line(error)}; {_advice(self.provider)}"
                ) from None
            raise UnsupportedError(f"ONNX Runtime can't run this model: {_one_line(error)}") from None
        running = self._session.get_providers()
        if self.provider not in running:
            raise DeviceError(
                f"execution provider {_short(self.provider)} is built in but ONNX Runtime dropped it and would run on "
                f"{listed(map(_short, running))} instead: its libraries don't load here; {_advice(self.provider)}"
            )
        self._session.disable_fallback()
        self._outputs = [o.name for o in self._session.get_outputs()]

    def run(self, feeds: Batch) -> dict[str, np.ndarray]:
        """The outputs by name, in the model's order, then the extra ones. Raises DataError for feeds that don't fit."""
        check_feeds(feeds, inputs(self._model, feeds), self._optional)
        given = {k: np.ascontiguousarray(v.astype(np.float32) if k in self._widened else v) for k, v in feeds.items()}
        try:
            results = self._session.run(self._outputs, given)
        except Exception as error:
            shapes = ", ".join(f"{k} {shape_text(v.shape)}" for k, v in feeds.items())
            text = _one_line(error)
            if "llocate memory" in text or "out of memory" in text.lower():
                raise DeviceError(f"not enough memory on {_short(self.provider)} for {shapes}: {text}; use a smaller batch") from None
            raise DataError(f"ONNX Runtime can't run the model on {shapes}: {text}") from None
        named = zip(self._outputs, results, strict=True)
        return {k: v.astype(self._widened[k]) if k in self._widened else v for k, v in named}

    def _source(self, model: ir.Model, extra: tuple[str, ...]) -> bytes | str:
        """What ONNX Runtime loads: bytes, or past the limit of protocol buffers a file with external data."""
        large = stored_bytes(model) > PROTO_LIMIT
        proto = self_contained(model, initializers=not large)
        _expose(proto, model, extra)
        self._widened = _widen_interface(proto)
        if not large:
            return bytes(proto.SerializeToString())
        self._folder = tempfile.TemporaryDirectory(prefix="bnfold-", ignore_cleanup_errors=True)
        path = Path(self._folder.name, "model.onnx")
        with open(path.with_suffix(".data"), "wb") as file:
            for name, value in model.graph.initializers.items():
                tensor = value.const_value
                assert tensor is not None
                data = tensor.tobytes()
                file.write(b"\0" * (-file.tell() % 4096))  # aligned to pages, so that it can be mapped
                entry = TensorProto(
                    name=name, data_type=tensor.dtype.value, dims=list(tensor.shape.numpy()), data_location=TensorProto.EXTERNAL
                )
                for key, text in (("location", "model.data"), ("offset", file.tell()), ("length", len(data))):
                    entry.external_data.add(key=key, value=str(text))
                proto.graph.initializer.append(entry)
                file.write(data)
        path.write_bytes(proto.SerializeToString())
        return str(path)


def resolve(provider: str) -> str:
    """ONNX Runtime's name of a provider that is built in. UsageError: nobody knows it. DeviceError: this build hasn't got it."""
    import onnxruntime as ort

    known = {_short(name): name for name in (*ort.get_all_providers(), *_FORMER, *ort.get_available_providers())}
    short = _short(provider)
    short = _ALIASES.get(short, short)
    if short not in known:
        close = difflib.get_close_matches(short, known, n=3, cutoff=0.5)
        hint = f"did you mean {listed(close, 'or')}?" if close else f"ONNX Runtime knows {listed(known)}"
        raise UsageError(f"no execution provider is called {provider!r}; {hint}")
    name: str = known[short]
    available = ort.get_available_providers()
    if name not in available:
        have = listed(_short(p) for p in available)
        raise DeviceError(f"execution provider {short} is not in this ONNX Runtime {ort.__version__}, which has {have}; {_advice(name)}")
    return name


def self_contained(model: ir.Model, *, initializers: bool = True) -> onnx.ModelProto:
    """The model as a proto with all its data inside, or without the main graph's initializers. The model isn't touched."""
    proto = ir.to_proto(model)
    del proto.graph.initializer[:]
    if initializers:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            entry = ir.to_proto(tensor)
            if entry.data_location == TensorProto.EXTERNAL:
                entry = TensorProto(data_type=tensor.dtype.value, dims=list(tensor.shape.numpy()), raw_data=tensor.tobytes())
            entry.name = name
            proto.graph.initializer.append(entry)
    else:
        lean = onnx.ModelProto()
        lean.CopyFrom(proto)  # what is deleted from a proto stays in its memory
        proto = lean
    base = next((str(t.base_dir) for t in _tensors(model) if isinstance(t, ir.ExternalTensor)), "")
    for tensor in _tensor_protos(proto.graph):
        if tensor.data_location == TensorProto.EXTERNAL:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, base)
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    return proto


def stored_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, those of subgraphs too."""
    return sum(t.nbytes for t in _tensors(model))


def _tensors(model: ir.Model) -> Iterable[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value


def _tensor_protos(graph: onnx.GraphProto) -> Iterable[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensor_protos(body)


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
    return any(i.type.tensor_type.elem_type in types for i in proto.graph.input) or any(
        t.data_type in types for t in _tensor_protos(proto.graph)
    )


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


def _short(name: str) -> str:
    return name.lower().removesuffix("executionprovider")


def _full_name(short: str) -> str:
    import onnxruntime as ort

    return next((name for name in ort.get_all_providers() if _short(name) == short), short)


def _advice(name: str) -> str:
    short = _short(name)
    if short == "coreml":
        return "it comes with the onnxruntime wheel for macOS"
    if short not in _WHEELS:
        return "it needs an ONNX Runtime that is built with it (https://onnxruntime.ai/docs/execution-providers)"
    guide = "https://onnxruntime.ai/docs/execution-providers"
    return f"pip uninstall onnxruntime, then pip install {_WHEELS[short]}, and its libraries as {guide} says"


def _is_about_the_model(error: Exception) -> bool:
    return type(error).__name__ in ("InvalidGraph", "InvalidProtobuf", "NotImplemented", "InvalidArgument")


def _one_line(error: BaseException, limit: int = 300) -> str:
    """The message in one line, without ONNX Runtime's prefix of its status code."""
    text = " ".join(str(error).split())
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    return text if len(text) <= limit else text[: limit - 1] + "…"
