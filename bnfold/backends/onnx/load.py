"""Read an ONNX file: what it is, whether it is whole, and whether onnx_ir would lose any of it.

A file is looked at before it is parsed, since almost any bytes are a valid protocol buffer of some kind, and an empty file is a
valid model without nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from ...errors import ModelError, UnsupportedError
from .save import save

__all__ = ["checked", "load", "save"]

LOOKS = (  # how other files begin, what they are, and what to do
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run 'git lfs pull'"),
    (b"<!doctype html", "an HTML page, probably of a failed download", "download the model again"),
    (b"<html", "an HTML page, probably of a failed download", "download the model again"),
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint, TorchScript or .pt2 file)", "export it to ONNX first"),
    (b"\x80\x02", "a Python pickle (an old PyTorch checkpoint)", "export it to ONNX first"),
    (b"\x89HDF", "an HDF5 file (Keras)", "convert it with tf2onnx first"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
)
# Bytes of one element, for the types whose elements fill whole bytes (onnx.proto, TensorProto.DataType).
SIZES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 14: 8, 15: 16, 16: 2, 17: 1, 18: 1, 19: 1, 20: 1}


def load(path: str | Path) -> ir.Model:
    """The model in an ONNX file. Weights in external files are mapped, not read.

    Raises ModelError where the file can't be read, is damaged, or reaches outside its folder; UnsupportedError for what would be lost.
    """
    path = Path(path)
    data = _read(path)
    try:
        proto = onnx.ModelProto.FromString(data)
    except Exception:  # the parsers differ in what they raise
        raise ModelError(f"{path}: not an ONNX model, or cut short ({len(data):,} bytes); export or download it again") from None
    del data
    if not proto.ir_version or not (proto.opset_import or proto.ir_version < 3) or not proto.HasField("graph") or not proto.graph.node:
        raise ModelError(f"{path}: not an ONNX model (no version, no operator set or no nodes in it); export or download it again")
    try:
        checked(proto)
        base = path.resolve().parent
        for tensor in _tensors(proto):
            _check_data(tensor, base)
    except (ModelError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from None
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        raise ModelError(f"{path}: its graph makes no sense ({_line(error)}); export it again") from None
    ir.external_data.set_base_dir(model.graph, base)
    return model


def checked(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The proto itself; UnsupportedError where it holds something that onnx_ir would silently drop."""
    if proto.training_info:
        raise UnsupportedError("it holds training information (training_info), which would be lost; export the model for inference")
    if any(graph.sparse_initializer for graph in _graphs(proto)):
        raise UnsupportedError("it holds sparse weights (sparse_initializer), which would be lost; make them dense first")
    return proto


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ModelError(f"{path}: a folder, not a model file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: can't be read ({error.strerror or error})") from None
    if not data:
        raise ModelError(f"{path}: an empty file; export or download it again")
    start = data[:64].lstrip().lower()
    for prefix, kind, remedy in LOOKS:
        if data.startswith(prefix) or start.startswith(prefix):
            raise ModelError(f"{path}: {kind}; {remedy}")
    if data[8:10] == b'{"' and int.from_bytes(data[:8], "little") < len(data):
        raise ModelError(f"{path}: a safetensors file, which holds weights without a network; export the model to ONNX first")
    return data


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    def inner(nodes: list[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
        for node in nodes:
            for attribute in node.attribute:
                for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    yield graph
                    yield from inner(graph.node)

    yield proto.graph
    yield from inner(proto.graph.node)
    for function in proto.functions:
        yield from inner(function.node)


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor: initializers, and those in attributes."""
    node_lists = [graph.node for graph in _graphs(proto)] + [function.node for function in proto.functions]
    for graph in _graphs(proto):
        yield from graph.initializer
    for nodes in node_lists:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _check_data(tensor: onnx.TensorProto, base: Path) -> None:
    """The tensor's bytes are there, as many as its shape says, and in its own folder."""
    width = SIZES.get(tensor.data_type)
    expected = None if width is None else width * math.prod(tensor.dims)
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        if tensor.HasField("raw_data") and expected is not None and len(tensor.raw_data) != expected:
            raise ModelError(
                f"tensor '{tensor.name}' holds {len(tensor.raw_data):,} bytes, its shape {list(tensor.dims)} asks for {expected:,}; "
                "the file is damaged"
            )
        return
    info = {entry.key: entry.value for entry in tensor.external_data}
    location = info.get("location", "")
    where = Path(location)
    if not location or where.is_absolute() or ".." in where.parts or "\\" in location:
        raise ModelError(f"tensor '{tensor.name}' points outside the model's folder ('{location}'), which is not safe")
    file = base / where
    try:
        real = file.resolve(strict=True)
        size = real.stat().st_size
    except OSError:
        raise ModelError(f"the file '{location}' with the data of tensor '{tensor.name}' is missing from {base}; copy it there") from None
    if not real.is_relative_to(base) or not real.is_file():
        raise ModelError(f"tensor '{tensor.name}' points outside the model's folder ('{location}' is a link to {real}), which is not safe")
    try:
        offset = int(info.get("offset", 0))
        length = int(info.get("length", size - offset))
    except ValueError:
        raise ModelError(f"tensor '{tensor.name}' has an offset or length that is no number") from None
    if offset < 0 or length < 0 or offset + length > size:
        raise ModelError(
            f"tensor '{tensor.name}' needs bytes {offset:,} to {offset + length:,} of '{location}', which has {size:,}; copy the whole file"
        )
    if expected is not None and length != expected:
        raise ModelError(
            f"tensor '{tensor.name}' takes {length:,} bytes of '{location}', its shape {list(tensor.dims)} asks for {expected:,}"
        )


def _line(error: Exception) -> str:
    """The root of an error in one line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return " ".join(str(error).split())[:200] or type(error).__name__
