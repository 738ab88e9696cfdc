"""Write an ONNX file: atomically, and one weight at a time.

A protocol buffer is a sequence of fields, each a key (number << 3 | type), for bytes and messages (type 2) a length, and the content
(https://protobuf.dev/programming-guides/encoding). So the graph is serialised without its initializers, and these follow one by one: the
peak of memory is the model and one tensor, not three models.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import onnx
import onnx_ir as ir

from ...errors import InputError, UsageError

GRAPH, INITIALIZER = 7, 5  # field numbers in ModelProto and GraphProto (onnx.proto)
ONE_FILE = 1_900_000_000  # bytes: a protocol buffer can't pass 2 GiB
ALIGNMENT = 4096  # of tensors in an external file, so that they can be mapped
EMBEDDED = 1024  # bytes: smaller tensors stay in the model file


def save(model: ir.Model, path: str | Path, *, force: bool = False) -> None:
    """Write a model. Weights go beside it into `<name>.data` where the model had such a file, or would pass 2 GB.

    Nothing is half-written: the file appears when it is whole. Raises UsageError where it exists and `force` isn't given, InputError
    where it can't be written.
    """
    path = Path(path)
    if path.exists() and not force:
        raise UsageError(f"{path} exists; give another name, or --force to overwrite it")
    weights = [value for value in model.graph.initializers.values() if value.const_value is not None]
    total = sum(value.const_value.nbytes for value in weights if value.const_value is not None)
    outside = total > ONE_FILE or any(isinstance(value.const_value, ir.ExternalTensor) for value in weights)
    data_path = path.with_name(path.name + ".data")
    try:
        with contextlib.ExitStack() as stack:
            target = stack.enter_context(_replacing(path))
            data = stack.enter_context(_replacing(data_path)) if outside else None
            _write(model, weights, target, data, data_path.name)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror or error}); choose another folder") from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once it is whole; on any error nothing is left of it."""
    path = path.resolve() if path.is_symlink() else path
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write(model: ir.Model, weights: list[ir.Value], target: IO[bytes], data: IO[bytes] | None, data_name: str) -> None:
    skeleton = _skeleton(model, weights)
    graph = skeleton.graph.SerializeToString()
    skeleton.ClearField("graph")
    entries = [_entry(value, data, data_name) for value in weights] if data is not None else None
    sizes = [len(e) for e in entries] if entries is not None else [_header_size(value) for value in weights]
    length = len(graph) + sum(1 + len(_varint(n)) + n for n in sizes)
    target.write(skeleton.SerializeToString())
    target.write(_key(GRAPH) + _varint(length))
    target.write(graph)
    for i, value in enumerate(weights):
        entry = entries[i] if entries is not None else _tensor(value).SerializeToString()
        target.write(_key(INITIALIZER) + _varint(len(entry)))
        target.write(entry)
        if len(entry) != sizes[i]:
            raise RuntimeError(f"tensor {value.name} took {len(entry)} bytes, {sizes[i]} were announced")


def _skeleton(model: ir.Model, weights: list[ir.Value]) -> onnx.ModelProto:
    """The model without its initializers."""
    held = [value.const_value for value in weights]
    names = [value.name or "" for value in weights]
    try:
        for name in names:
            del model.graph.initializers[name]
        return ir.to_proto(model)
    finally:
        for value, tensor in zip(weights, held, strict=True):
            value.const_value = tensor
            model.graph.register_initializer(value)


def _tensor(value: ir.Value) -> onnx.TensorProto:
    assert value.const_value is not None
    proto = ir.to_proto(value.const_value)
    proto.name = value.name
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        proto = ir.to_proto(ir.Tensor(value.const_value.numpy(), dtype=value.const_value.dtype, name=value.name))
    return proto


def _header_size(value: ir.Value) -> int:
    """The size of a serialised tensor, without its content wherever that can be told from its shape."""
    tensor = value.const_value
    assert tensor is not None
    if isinstance(tensor, ir.Tensor) and tensor.nbytes > EMBEDDED:
        empty = onnx.TensorProto(
            dims=tensor.shape.numpy(), data_type=int(tensor.dtype), name=value.name, doc_string=tensor.doc_string or ""
        )
        if not tensor.doc_string:
            empty.ClearField("doc_string")
        return len(empty.SerializeToString()) + 1 + len(_varint(tensor.nbytes)) + tensor.nbytes
    return _tensor(value).ByteSize()


def _entry(value: ir.Value, data: IO[bytes], data_name: str) -> bytes:
    """A serialised tensor whose content went to the external file."""
    proto = _tensor(value)
    if len(proto.raw_data) > EMBEDDED:
        content = proto.raw_data
        offset = -(-data.tell() // ALIGNMENT) * ALIGNMENT
        data.write(b"\0" * (offset - data.tell()))
        data.write(content)
        proto.ClearField("raw_data")
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", data_name), ("offset", str(offset)), ("length", str(len(content)))):
            proto.external_data.add(key=key, value=text)
    return proto.SerializeToString()


def _key(field: int) -> bytes:
    return _varint(field << 3 | 2)


def _varint(n: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])
