"""Read an ONNX file: what it is, whether it is whole, and whether onnx_ir would lose any of it.

The weights are not parsed: the file's bytes stay as they were read, and each weight is a view of them. So memory holds the file once.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from bnfold.backends.kinds import check_readable
from bnfold.errors import ModelError, UnsupportedError
from bnfold.text import one_line

from . import wire
from .external import Files, is_external
from .fit import misfit, refused
from .quantisation import check_quantisation
from .save import EXTERNAL, MAPS, save, to_proto
from .schemas import check_operators
from .sniff import sniff
from .validate import check_complete, check_names, check_values, data_type, tensors, without_maps

__all__ = ["checked", "from_proto", "load", "save", "to_proto"]

LARGE = 1024  # bytes: smaller weights are parsed with the rest


def load(path: str | Path) -> ir.Model:
    """The model in an ONNX file. Weights in external files are mapped, not read.

    Raises ModelError where the file can't be read, is damaged, or reaches outside its folder; UnsupportedError for what would be lost.
    """
    path = Path(path)
    data = _read(path)
    try:
        proto, views = _parse(data)
        del data
        return _model(proto, views, Files(path))
    except (ModelError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from None


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """onnx_ir's model of a proto, which isn't changed. Raises ModelError and UnsupportedError as `load` does."""
    return _model(proto, [], None)


def checked(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The proto itself; UnsupportedError where it holds something that onnx_ir would silently drop."""
    check_complete(proto)
    return proto


def _read(path: Path) -> bytes:
    check_readable(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: can't be read ({error.strerror or error})") from None
    if not data:
        raise ModelError(f"{path}: an empty file; export or download it again")
    if known := sniff(data):
        raise ModelError(f"{path}: {known[0]}; {known[1]}")
    return data


def _parse(data: bytes) -> tuple[onnx.ModelProto, list[memoryview | None]]:
    """The model without its large weights, and for each initializer a view of its raw data where it is large."""
    view = memoryview(data)
    parts: list[bytes | memoryview] = []
    views: list[memoryview | None] = []
    try:
        for field in wire.fields(data):
            if field.number != wire.GRAPH or field.kind != wire.BYTES:
                parts.append(view[field.key : field.end])
                continue
            inner = [part for entry in wire.fields(data, field.start, field.end) for part in _entry(data, entry, views)]
            parts += (wire.opening(wire.GRAPH, sum(map(len, inner))), *inner)
        proto = onnx.ModelProto.FromString(b"".join(parts))
    except wire.CutShort as cut:
        if len(data) < cut.end < 1 << 40 and data[:1] == b"\x08":  # the IR version comes first in all files met so far
            raise ModelError(f"cut short: it has {len(data):,} bytes of at least {cut.end:,}; export or download it again") from None
        raise ModelError("not an ONNX model, or a damaged one; export or download it again") from None
    except Exception:  # the parsers of protocol buffers differ in what they raise
        raise ModelError("not an ONNX model, or a damaged one; export or download it again") from None
    if not proto.ir_version or not proto.graph.node:
        raise ModelError("not an ONNX model: it has no version or no nodes; export or download it again")
    return proto, views


def _entry(data: bytes, entry: wire.Field, views: list[memoryview | None]) -> list[bytes | memoryview]:
    """The bytes of a graph's field; of a large weight only what describes it, and its raw data go to `views`."""
    view = memoryview(data)
    if entry.number != wire.INITIALIZER or entry.kind != wire.BYTES:
        return [view[entry.key : entry.end]]
    large = entry.end - entry.start > LARGE
    found = [f for f in wire.fields(data, entry.start, entry.end) if f.number == wire.RAW_DATA] if large else []
    if len(found) != 1 or found[0].kind != wire.BYTES or found[0].end - found[0].start < LARGE:
        views.append(None)
        return [view[entry.key : entry.end]]
    raw = found[0]
    views.append(view[raw.start : raw.end])
    size = entry.end - entry.start - (raw.end - raw.key)
    return [wire.opening(wire.INITIALIZER, size), view[entry.start : raw.key], view[raw.end : entry.end]]


def _model(proto: onnx.ModelProto, views: list[memoryview | None], files: Files | None) -> ir.Model:
    """views: the raw data of the initializers, where they were taken out. files: where external data are; without it there are none."""
    if not proto.opset_import and proto.ir_version >= 3:
        raise ModelError("not an ONNX model: it names no operator set; export or download it again")
    check_complete(proto)
    proto, maps = without_maps(proto)
    in_order = check_names(proto)
    aside: dict[str, tuple[memoryview, Path | None]] = {}
    external = False
    initializers = proto.graph.initializer
    for i, tensor in enumerate(list(tensors(proto))):  # the initializers come first
        view, file = views[i] if i < len(views) else None, None
        if is_external(tensor):
            if files is None:
                raise ModelError(f"the data of tensor '{tensor.name}' are in a file that isn't loaded; load them with onnx.load")
            external = True
            view, file = files.read(tensor)
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            if i >= len(initializers):  # in a subgraph or an attribute
                tensor.raw_data, view = bytes(view), None
        check_values(tensor, None if view is None else len(view))
        if view is not None:
            aside[tensor.name] = view, file
    check_operators(proto)
    why = misfit(proto)
    try:
        model = ir.from_proto(proto)
        if not in_order:
            model.graph.sort()
            for function in model.functions.values():
                function.sort()
    except Exception as error:
        raise ModelError(f"its graph makes no sense ({_line(error)}); export it again") from None
    for tensor in initializers:
        if tensor.name in aside:
            model.graph.initializers[tensor.name].const_value = _weight(tensor, *aside[tensor.name])
    for imports in (model.graph.opset_imports, *(f.opset_imports for f in model.functions.values())):
        if "ai.onnx" in imports:  # another name of the standard operators, which onnx_ir shortens in nodes only
            imports.setdefault("", imports.pop("ai.onnx"))
    model.graph.meta[EXTERNAL] = external
    check_quantisation(model)
    if why and refused(model):
        raise ModelError(f"its operators don't fit each other ({why}); export it again")
    model.graph.meta[MAPS] = maps
    return model


class Stored(ir.LazyTensor):
    """A weight as its file has it. path: of the file, where it lies beside the model's; only then is it there."""

    __slots__ = ("path",)
    path: Path


def _weight(tensor: onnx.TensorProto, view: memoryview, file: Path | None) -> Stored:
    dtype, shape = data_type(tensor), ir.Shape(tensor.dims, frozen=True)
    metadata = {entry.key: entry.value for entry in tensor.metadata_props}
    read = partial(_array, view, dtype, shape)
    weight = Stored(read, dtype, shape, name=tensor.name, doc_string=tensor.doc_string or None, metadata_props=metadata)
    if file is not None:
        weight.path = file
    return weight


def _array(view: memoryview, dtype: ir.DataType, shape: ir.Shape) -> ir.TensorProtocol:
    """The weight as an array, a copy only where the file doesn't align it."""
    if dtype.bitwidth < 8:
        return ir.PackedTensor(np.frombuffer(view, np.uint8), dtype, shape=shape)
    array = np.frombuffer(view, dtype.numpy().newbyteorder("<"))
    return ir.Tensor((array if array.flags.aligned else array.copy()).reshape(shape.numpy()), dtype=dtype)


def _line(error: Exception) -> str:
    """The root of an error in one line."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return one_line(error)
