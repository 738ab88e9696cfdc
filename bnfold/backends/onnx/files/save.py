"""Write an ONNX file: whole or not at all, and one weight at a time.

The graph is serialised without its initializers, and these follow one by one, each behind the few bytes that describe it (see `storage`).
So the peak of memory is the model and one weight, not three models, and a weight that is computed on demand is computed once.
"""

from __future__ import annotations

import contextlib
import copy
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import onnx
import onnx_ir as ir

from bnfold.errors import ModelError, UnsupportedError, UsageError
from bnfold.files import may_write, replacing, unreadable

from . import storage
from .validate import with_maps

EXTERNAL = "bnfold.external_data"  # in a graph's meta: whether its file kept weights in other files
MAPS = "bnfold.maps"  # there too: the types that onnx_ir has no object for, by value
ONE_FILE = 1_900_000_000  # bytes: readers refuse a protocol buffer of 2 GiB
ALIGNMENT = 4096  # of weights in an external file, so that they can be mapped
EMBEDDED = 1024  # bytes: smaller weights stay in the model file
NOTHING = ir.Tensor(np.zeros(0))  # in the place of a weight, where a copy needs none


def save(model: ir.Model, path: str | Path, *, force: bool = False) -> list[Path]:
    """Write a model, and say which files these are. Weights go beside it into `<name>.data` where the model had such a file, or would pass
    2 GB; where the file that is replaced has its own there, into `<name>.1.data`.

    Nothing is half-written: files appear when all are whole. A link is followed. The model isn't changed, and may have been read from
    the same files. Raises UsageError where one exists and `force` isn't given, InputError where it can't be written.
    """
    path = Path(path)
    target = path.resolve() if path.is_symlink() else path
    weights = [WrittenWeight(value) for value in model.graph.initializers.values()]
    outside = bool(model.graph.meta.get(EXTERNAL)) or any(isinstance(w.tensor, ir.ExternalTensor) for w in weights)
    apart = outside or sum(w.nbytes for w in weights) > ONE_FILE
    names: tuple[str, ...] = _data_names(target) if apart and any(w.movable for w in weights) else ()
    targets = [*(target.with_name(name) for name in names[:1]), target]
    for file in targets:
        may_write(file, force=force)
    replaced = target.exists()
    with replacing(*targets) as parts, contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(part, "xb")) for part in parts]
        for weight in weights if names else ():
            weight.move(files[0], names[0])
        write(_skeleton(model), weights, files[-1])
    for name in names[1:] if replaced else ():
        with contextlib.suppress(OSError):  # Windows keeps a file that is still mapped
            target.with_name(name).unlink()
    return [path, *(path.with_name(name) for name in names[:1])]


def _data_names(target: Path) -> tuple[str, str]:
    """The name of the file for the weights, and of the one that it takes the place of.

    Two names take turns, so that who reads the file that is there now, or comes after a power cut, never meets the weights of another.
    """
    names = f"{target.name}.data", f"{target.name}.1.data"
    if not all(map(str.isprintable, names)):
        raise UsageError(f"{target}: the weights go into a file beside it, whose name has to be plain text; choose another name")
    if not unreadable(target) and target.stat().st_size:
        with open(target, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as now:
            if now.find(names[0].encode()) >= 0:
                return names[1], names[0]
    return names


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as a proto, with the types that onnx_ir doesn't hold."""
    return with_maps(ir.to_proto(model), model.graph.meta.get(MAPS) or {})


class WrittenWeight:
    """An initializer on its way into a file: what describes it, serialised, and its bytes, which are asked for once."""

    def __init__(self, value: ir.Value) -> None:
        if value.const_value is None:
            raise ModelError(f"weight '{value.name}' has no data")
        self.tensor = tensor = value.const_value
        self.nbytes = tensor.nbytes if tensor.dtype != ir.DataType.STRING else 0
        self.moved = False
        if isinstance(tensor, (ir.TensorProtoTensor, ir.StringTensor)):  # kept as it is stored
            self.proto = ir.to_proto(tensor)
            self.proto.name = value.name or ""
            self.raw = False
            return
        self.proto = onnx.TensorProto(dims=tensor.shape.numpy(), data_type=int(tensor.dtype), name=value.name)
        if tensor.doc_string:
            self.proto.doc_string = tensor.doc_string
        for key, text in tensor.metadata_props.items():
            self.proto.metadata_props.add(key=key, value=text)
        self.raw = True

    @property
    def movable(self) -> bool:
        """Whether its bytes may be in another file."""
        return self.nbytes > EMBEDDED and (self.raw or self.proto.HasField("raw_data"))

    @property
    def size(self) -> int:
        """The bytes that it will take in the model file, as the content of a field."""
        return int(self.proto.ByteSize()) + (storage.framed(storage.RAW_DATA, self.nbytes) if self.raw else 0)

    def move(self, data: IO[bytes], location: str) -> None:
        """Put its bytes into an external file, unless they are few."""
        if not self.movable:
            return
        data.write(bytes(-data.tell() % ALIGNMENT))
        offset = data.tell()
        self._put(data)
        self.proto.ClearField("raw_data")
        self.proto.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", location), ("offset", str(offset)), ("length", str(self.nbytes))):
            self.proto.external_data.add(key=key, value=text)
        self.raw = False

    def write(self, out: IO[bytes]) -> None:
        """Write it as the content of a field, `size` bytes."""
        out.write(self.proto.SerializeToString())
        if self.raw:
            out.write(storage.opening(storage.RAW_DATA, self.nbytes))
            self._put(out)

    def _put(self, file: IO[bytes]) -> None:
        start = file.tell()
        self.tensor.tofile(file)  # type: ignore[attr-defined]  # onnx_ir's protocol leaves it out
        if file.tell() - start != self.nbytes:
            raise RuntimeError(f"weight {self.proto.name} has {file.tell() - start} bytes, {self.nbytes} were announced")


def write(skeleton: onnx.ModelProto, weights: list[WrittenWeight], out: IO[bytes]) -> None:
    """Write a model as a file. skeleton: all but the weights; it is used up."""
    graph = skeleton.graph.SerializeToString()
    functions = onnx.ModelProto(functions=skeleton.functions).SerializeToString()
    skeleton.ClearField("graph")
    skeleton.ClearField("functions")
    head = skeleton.SerializeToString()
    sizes = [weight.size for weight in weights]
    length = len(graph) + sum(storage.framed(storage.INITIALIZER, size) for size in sizes)
    if len(head) + length + len(functions) > ONE_FILE + (1 << 27):
        raise UnsupportedError("the weights within subgraphs pass 2 GB, which a file can't hold; make them weights of the graph")
    out.write(head + storage.opening(storage.GRAPH, length) + graph)
    for weight, size in zip(weights, sizes, strict=True):
        out.write(storage.opening(storage.INITIALIZER, size))
        weight.write(out)
    out.write(functions)


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model without its initializers, but with what is said about them elsewhere. The model isn't changed."""
    shadows = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        plain = value.type == ir.TensorType(tensor.dtype) and value.shape == tensor.shape
        shadow = ir.Value(name=value.name, type=None if plain else value.type, shape=None if plain else value.shape)
        shadow.doc_string = value.doc_string
        shadow.metadata_props.update(value.metadata_props)
        shadow.meta.update(value.meta)
        shadow.const_value = NOTHING
        shadows.append(shadow)
    proto = bare(model, shadows)
    del proto.graph.initializer[:]
    return proto


def bare(model: ir.Model, initializers: Iterable[ir.Value] = ()) -> onnx.ModelProto:
    """The model as a proto with these initializers instead of its graph's own. The model isn't changed."""
    graph = model.graph
    view = ir.GraphView(
        graph.inputs,
        graph.outputs,
        nodes=graph,
        initializers=tuple(initializers),
        doc_string=graph.doc_string,
        opset_imports=graph.opset_imports,
        name=graph.name,
        metadata_props=graph.metadata_props,
    )
    whole = copy.copy(model)
    whole.graph = view  # type: ignore[assignment]  # a GraphView is serialised as a Graph is, by onnx_ir's documentation
    return with_maps(ir.to_proto(whole), graph.meta.get(MAPS) or {})
