"""A model on ONNX Runtime: what it takes, and a session on a named execution provider (see `providers`).

And which nodes of it run on the provider that was asked for, and whether those that don't may.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import TensorProto

from bnfold.capture import overhearing
from bnfold.data import Batch, InputSpec
from bnfold.data.inputs import check_feeds, samples_of
from bnfold.data.memory import enough_memory
from bnfold.errors import DeviceError, ModelError, UsageError
from bnfold.files import Workplace
from bnfold.running import Placement
from bnfold.text import unused

from ..files.save import WrittenWeight, write
from ..graph.proto import self_contained, skeleton, stored_bytes
from ..graph.ranges import inputs
from ..graph.walk import all_nodes
from .providers import CPU, resolve, run_failed, runtime, settings, start

SHOWN = 3  # nodes that a message names
# How the types or names of nodes begin that ONNX Runtime itself puts between others.
INSERTED = ("Memcpy", "ReorderInput", "ReorderOutput", "InsertedPrecisionFreeCast", "InsertedCast")
FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}
_allowed: ContextVar[frozenset[str]] = ContextVar("allowed_on_the_cpu", default=frozenset())


@contextlib.contextmanager
def cpu_fallback(names: Iterable[str]) -> Iterator[None]:
    """Let nodes of these operator types or names run on the CPU, whatever the provider."""
    token = _allowed.set(frozenset(names))
    try:
        yield
    finally:
        _allowed.reset(token)


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own, so that what is said of it can be told."""
    taken = {node.name for node in graph.node}
    seen: set[str] = set()
    for number, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = unused(f"{node.name or node.op_type}_{number}", taken)
        seen.add(node.name)


def assigned(session: Any, provider: str) -> Placement | None:
    """Which nodes are on the provider, from the session itself; None where this ONNX Runtime can't say (before 1.24)."""
    try:
        parts = list(session.get_provider_graph_assignment_info())
    except Exception:  # it isn't there, or says that nothing was recorded
        return None
    nodes = [(part.ep_name, node.op_type, node.name) for part in parts for node in part.get_nodes()]
    return _placement(nodes, resolve(provider), "session") if nodes else None


def profiled(path: str, provider: str) -> Placement | None:
    """The same from the profile of one run, in which a part that a provider took over whole counts as one node. The file is removed."""
    try:
        events = json.loads(Path(path).read_text(encoding="utf-8"))
        os.unlink(path)
    except (OSError, ValueError):
        return None
    suffix = "_kernel_time"
    found = {
        event["name"]: (event["args"]["provider"], event["args"].get("op_name", ""), event["name"].removesuffix(suffix))
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith(suffix) and event.get("args", {}).get("provider")
    }
    return _placement(list(found.values()), resolve(provider), "profile") if found else None


def _placement(nodes: list[tuple[str, str, str]], full: str, source: str) -> Placement:
    on_cpu = () if full == CPU else tuple((op, name) for where, op, name in nodes if where == CPU)
    return Placement(sum(where == full for where, *_ in nodes), len(nodes), source, on_cpu)


def honoured(placement: Placement | None, provider: str, graph: Callable[[], onnx.ModelProto]) -> None:
    """Raise DeviceError where compute nodes are left to the CPU that nobody allowed to. graph: the model, for the types of its values.

    A compute node is one with a floating-point output, or an output whose type can't be told; what only works out shapes and indices is
    the CPU's by ONNX Runtime's own choice.
    """
    if placement is None:
        return
    allowed = _allowed.get()
    left = [(op, name) for op, name in placement.on_cpu if not {op, op.removeprefix("Fused"), name} & allowed]
    left = [(op, name) for op, name in left if not op.startswith(INSERTED) and not name.startswith(INSERTED)]
    if left:
        idle = _without_floats(graph())
        left = [(op, name) for op, name in left if name not in idle]
    if not left:
        return
    by_type = Counter(op for op, _ in left)
    names = [f"{op} {name!r}" for op, name in left[:SHOWN]]
    more = f" and {len(left) - SHOWN:,} more" if len(left) > SHOWN else ""
    allow = " ".join(f"--allow-cpu-fallback {op}" for op in by_type)
    raise DeviceError(
        f"execution provider {provider} leaves {len(left):,} of {placement.of:,} nodes to the CPU: {', '.join(names)}{more}; "
        f"allow them by type or name, with {allow}, or take another provider"
    )


def _without_floats(proto: onnx.ModelProto) -> set[str]:
    """The names, as `name_nodes` gives them, of the nodes that are known to compute no floating-point number."""
    name_nodes(proto.graph)
    known = {info.name: info.type.tensor_type.elem_type for info in _inferred(proto)}
    found = set()
    for node in proto.graph.node:
        kinds = {known.get(name, 0) for name in node.output if name}
        if 0 not in kinds and not kinds & FLOATS:
            found.add(node.name)
    return found


def _inferred(proto: onnx.ModelProto) -> Iterable[onnx.ValueInfoProto]:
    try:
        graph = onnx.shape_inference.infer_shapes(proto).graph
    except Exception:  # past 2 GB, or an operator that it stumbles on
        graph = proto.graph
    return (*graph.value_info, *graph.input, *graph.output)


# --- the session -------------------------------------------------------------------------------------------------------------------------


LONGEST = 60  # seconds of a run with loops in it
# Protocol buffers can't hold more; the margin is for the graph around the weights.
PROTO_LIMIT = 2**31 - 2**24
# By ONNX Runtime's names, the types that numpy has only through ml_dtypes: its Python interface takes them by their bits.
BY_BITS = {
    f"tensor({name.replace('_', '')})": np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
}
Arrays = Mapping[str, npt.NDArray[Any]]


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

        options = settings(optimise=optimise, threads=threads)
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

    @property
    def specs(self) -> list[InputSpec]:
        return inputs(self._model)

    def run(self, feeds: Batch) -> dict[str, np.ndarray]:
        """The outputs by name, in the model's order, then the extra ones. Raises DataError for feeds that don't fit,
        DeviceError where the provider fails on what the CPU runs."""
        check_feeds(feeds, inputs(self._model, feeds), self._optional)
        with enough_memory(samples_of(feeds)), overhearing(), self._ending() as options:
            try:
                found = outputs_of(self._session, {name: np.ascontiguousarray(array) for name, array in feeds.items()}, options)
            except Exception as error:
                if options is not None and options.terminate:
                    raise ModelError(f"a loop of the model doesn't end within {LONGEST} s; don't use this file") from None
                raise run_failed(error, self._requested, feeds, lambda: Session(self._model).run(feeds)) from None
        if self._profiling:
            self._profiling = False
            self.placement = profiled(self._session.end_profiling(), self._requested)
            honoured(self.placement, self._requested, lambda: skeleton(self._model))
        return found

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
        if not large:
            return bytes(proto.SerializeToString())
        self._folder = Workplace()
        path = self._folder.path / "model.onnx"
        weights = [WrittenWeight(value) for value in model.graph.initializers.values()]
        with open(path.with_suffix(".data"), "wb") as data, open(path, "wb") as file:
            for weight in weights:
                weight.move(data, "model.data")
            write(proto, weights, file)
        return str(path)


def _expose(proto: onnx.ModelProto, model: ir.Model, names: tuple[str, ...]) -> None:
    """Make inner values outputs. ONNX Runtime infers their types where the model doesn't state them."""
    inner = {value.name: value for node in model.graph for value in node.outputs}
    there = {info.name for info in proto.graph.output}
    for name in dict.fromkeys(names):
        if name not in inner:
            raise UsageError(f"the model computes no value {name!r}")
        if name not in there:
            info = proto.graph.output.add(name=name)
            dtype = inner[name].dtype
            if dtype is not None and isinstance(inner[name].type, ir.TensorType):
                info.type.tensor_type.elem_type = dtype.value


def outputs_of(session: Any, feeds: Arrays, options: Any = None) -> dict[str, npt.NDArray[Any]]:
    """What a session of ONNX Runtime gives, by name. feeds: C-contiguous arrays."""
    outputs = session.get_outputs()
    names = [output.name for output in outputs]
    if not any(each.type in BY_BITS for each in (*session.get_inputs(), *session.get_overridable_initializers(), *outputs)):
        return dict(zip(names, session.run(names, feeds, options), strict=True))
    values = session.run_with_ort_values(names, {name: _lent(array) for name, array in feeds.items()}, options)
    return {output.name: _borrowed(value, BY_BITS.get(output.type)) for output, value in zip(outputs, values, strict=True)}


def _lent(array: npt.NDArray[Any]) -> Any:
    """An OrtValue over the memory of an array."""
    lend = runtime().OrtValue
    if array.dtype not in BY_BITS.values():
        return lend.ortvalue_from_numpy(array)
    bits = array.view(f"u{array.itemsize}")
    return lend.ortvalue_from_numpy_with_onnx_type(bits, onnx.helper.np_dtype_to_tensor_dtype(array.dtype))


def _borrowed(value: Any, dtype: np.dtype[Any] | None) -> npt.NDArray[Any]:
    """An array over the memory of an OrtValue, which lives as long as the array. dtype: of one that is taken by its bits."""
    if dtype is None:
        array: npt.NDArray[Any] = value.numpy()
        return array
    shape = tuple(value.shape())
    buffer = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(value.data_ptr())
    buffer.owner = value
    bits: npt.NDArray[Any] = np.ctypeslib.as_array(buffer)
    return bits.view(dtype).reshape(shape)
