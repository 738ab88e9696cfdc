"""A model on ONNX Runtime: what it takes, and a session on a named execution provider (see `providers`)."""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from bnfold.capture import overhearing
from bnfold.data import Batch, InputSpec
from bnfold.data.inputs import check_feeds, samples_of
from bnfold.data.memory import enough_memory
from bnfold.errors import ModelError, UsageError
from bnfold.files import Workplace
from bnfold.running import Placement

from ..files.save import WrittenWeight, write
from ..graph.proto import self_contained, skeleton, stored_bytes
from ..graph.ranges import inputs
from ..graph.walk import all_nodes
from .placement import assigned, honoured, name_nodes, profiled
from .providers import CPU, resolve, run_failed, runtime, settings, start

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
