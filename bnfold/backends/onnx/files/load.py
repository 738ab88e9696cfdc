"""Read an ONNX file: what it is, whether it is whole, and whether onnx_ir would lose any of it.

The weights are not parsed: the file's bytes stay as they were read, and each weight is a view of them. So memory holds the file once.
"""

from __future__ import annotations

import io
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from bnfold.backends.kinds import check_readable
from bnfold.errors import ModelError, UnsupportedError
from bnfold.files import DAMAGED_ZIP
from bnfold.text import one_line

from . import storage
from .fit import misfit, refused
from .parameters import check_quantisation
from .save import EXTERNAL, MAPS, save, to_proto
from .schemas import check_operators
from .storage import Files, is_external
from .validate import check_complete, check_names, check_values, data_type, tensors, without_maps

__all__ = ["from_proto", "load", "save", "to_proto"]

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
    except NotOnnxError as error:
        kind, remedy = BY_NAME.get(path.suffix.lower(), ("", ""))
        raise ModelError(f"{path}: not an ONNX model, but by its name {kind}; {remedy}" if kind else f"{path}: {error}") from None
    except (ModelError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from None


class NotOnnxError(ModelError):
    """No ONNX model, nor anything else that is known by its content."""

    def __init__(self) -> None:
        super().__init__("not an ONNX model, or a damaged one; export or download it again")


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """onnx_ir's model of a proto, which isn't changed. Raises ModelError and UnsupportedError as `load` does."""
    return _model(proto, [], None)


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
        for field in storage.fields(data):
            if field.number != storage.GRAPH or field.kind != storage.BYTES:
                parts.append(view[field.key : field.end])
                continue
            inner = [part for entry in storage.fields(data, field.start, field.end) for part in _entry(data, entry, views)]
            parts += (storage.opening(storage.GRAPH, sum(map(len, inner))), *inner)
        proto = onnx.ModelProto.FromString(b"".join(parts))
    except storage.CutShort as cut:
        if len(data) < cut.end < 1 << 40 and data[:1] == b"\x08":  # the IR version comes first in all files met so far
            raise ModelError(f"cut short: it has {len(data):,} bytes of at least {cut.end:,}; export or download it again") from None
        raise NotOnnxError from None
    except Exception:  # the parsers of protocol buffers differ in what they raise
        raise NotOnnxError from None
    if not proto.ir_version or not proto.graph.node:
        raise ModelError("not an ONNX model: it has no version or no nodes; export or download it again")
    return proto, views


def _entry(data: bytes, entry: storage.Field, views: list[memoryview | None]) -> list[bytes | memoryview]:
    """The bytes of a graph's field; of a large weight only what describes it, and its raw data go to `views`."""
    view = memoryview(data)
    if entry.number != storage.INITIALIZER or entry.kind != storage.BYTES:
        return [view[entry.key : entry.end]]
    large = entry.end - entry.start > LARGE
    found = [f for f in storage.fields(data, entry.start, entry.end) if f.number == storage.RAW_DATA] if large else []
    if len(found) != 1 or found[0].kind != storage.BYTES or found[0].end - found[0].start < LARGE:
        views.append(None)
        return [view[entry.key : entry.end]]
    raw = found[0]
    views.append(view[raw.start : raw.end])
    size = entry.end - entry.start - (raw.end - raw.key)
    return [storage.opening(storage.INITIALIZER, size), view[entry.start : raw.key], view[raw.end : entry.end]]


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

    __slots__ = ("_view", "path")
    _view: memoryview
    path: Path

    def as_stored(self) -> npt.NDArray[Any]:
        """A view of the file's bytes, which the file needn't align: `numpy` makes a copy of those. Packed types are unpacked."""
        if self.dtype.bitwidth < 8:
            return self.numpy()
        return np.frombuffer(self._view, self.dtype.numpy().newbyteorder("<")).reshape(self.shape.numpy())


def _weight(tensor: onnx.TensorProto, view: memoryview, file: Path | None) -> Stored:
    dtype, shape = data_type(tensor), ir.Shape(tensor.dims, frozen=True)
    metadata = {entry.key: entry.value for entry in tensor.metadata_props}
    read = partial(_array, view, dtype, shape)
    weight = Stored(read, dtype, shape, name=tensor.name, doc_string=tensor.doc_string or None, metadata_props=metadata)
    weight._view = view
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


KERAS = "load it in Python with KERAS_BACKEND=torch, and give bnfold the model, or write it with model.export('m.onnx', format='onnx')"
BEGINNINGS = (  # the first bytes, in lower case and without leading blanks; what the file is; what to do
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run 'git lfs pull'"),
    (b"<!doctype html", "an HTML page, probably of a failed download", "download the model again"),
    (b"<html", "an HTML page, probably of a failed download", "download the model again"),
    (b"<?xml", "an XML file, such as an OpenVINO model", "give the ONNX model that it was made from"),
    (b"ir_version", "ONNX in text form", "convert it with onnx.save(onnx.load(path, format='textproto'), 'model.onnx')"),
    (b"<", "ONNX in text form, or a web page", "convert it with onnx.save(onnx.load(path, format='onnxtxt'), 'model.onnx')"),
    (b"{", "a JSON file", "if it is ONNX in JSON form, convert it with onnx.save(onnx.load(path, format='json'), 'model.onnx')"),
    (b"\x89hdf", "an HDF5 file, such as a Keras model", KERAS),
    (b"\x1f\x8b", "a gzip archive", "unpack it with gunzip"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it"),
    (b"gguf", "a GGUF file, which holds weights without a network", "give the model in ONNX form"),
    (b"\x93numpy", "not an ONNX model but a NumPy array", "give the model first and the array with --data"),
    (b"\x89png", "an image", "give the model first and a folder of images with --data"),
    (b"\xff\xd8\xff", "an image", "give the model first and a folder of images with --data"),
)
BUILT = "give the ONNX model that it was built from"
BY_NAME = {  # of what no beginning tells
    ".pb": ("a TensorFlow graph", "convert it to ONNX with tf2onnx"),
    ".pdmodel": ("a PaddlePaddle model", "convert it to ONNX with paddle2onnx"),
    ".mlmodel": ("a Core ML model", BUILT),
    ".engine": ("a TensorRT engine", BUILT),
    ".plan": ("a TensorRT engine", BUILT),
    ".prototxt": ("a Caffe network", "convert it to ONNX"),
    ".caffemodel": ("a Caffe network", "convert it to ONNX"),
    ".py": ("a Python file", "give the weights, and the file by --arch FILE.py:FACTORY"),
}
ZIPS = (  # the end of a member's name, what the archive is, what to do
    (".onnx", "a zip archive that holds an ONNX model", "unpack it"),
    ("model.weights.h5", "a Keras model", KERAS),
    (".npy", "a NumPy .npz archive", "give the model first and the arrays with --data"),
)
AT_FOUR = {  # the identifier of a FlatBuffer, at byte 4
    b"TFL3": ("a TensorFlow Lite model", "convert it to ONNX with tf2onnx"),
    b"ORTM": ("a model in ONNX Runtime's own format (.ort)", "give the ONNX model that it was made from"),
}


def sniff(data: bytes) -> tuple[str, str] | None:
    """What the file is and what to do about it; None where nothing but ONNX is recognised. PyTorch's don't come here."""
    if data.startswith(b"PK\x03\x04"):
        return _sniff_zip(data)
    if data[2:4] == b"\0\0" and data[4:8] in AT_FOUR:
        return AT_FOUR[data[4:8]]
    start = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for first, kind, remedy in BEGINNINGS:
        if start.startswith(first):
            return kind, remedy
    return None


def _sniff_zip(data: bytes) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
    except DAMAGED_ZIP:
        return "a zip archive (a PyTorch checkpoint, TorchScript or .pt2 file), cut short or damaged", "save or download it again"
    for ending, kind, remedy in ZIPS:
        if any(name.endswith(ending) for name in names):
            return kind, remedy
    return "a zip archive", "unpack it"
