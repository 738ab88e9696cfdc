"""Whether a proto is a sound model, and whether onnx_ir would lose any of it.

onnx_ir reads some invalid models with no more than a warning, and drops what it has no object for; both are refused here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import onnx
import onnx_ir as ir
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto

from bnfold.errors import ModelError, UnsupportedError

OLDEST = 3  # the IR version of ONNX 1.0; before it, a model didn't say which operator set it uses
SPARSE = (AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS)
# Where onnx.proto keeps the values of a tensor without raw_data, and how many of them an element takes; else int32_data, one.
FIELDS = {
    ir.DataType.FLOAT: ("float_data", 1.0),
    ir.DataType.COMPLEX64: ("float_data", 2.0),
    ir.DataType.DOUBLE: ("double_data", 1.0),
    ir.DataType.COMPLEX128: ("double_data", 2.0),
    ir.DataType.INT64: ("int64_data", 1.0),
    ir.DataType.UINT32: ("uint64_data", 1.0),
    ir.DataType.UINT64: ("uint64_data", 1.0),
    ir.DataType.STRING: ("string_data", 1.0),
}


def check_complete(proto: ModelProto) -> None:
    """Raises UnsupportedError where onnx_ir would silently lose something, or has no way to hold it."""
    if proto.training_info:
        raise UnsupportedError("it holds training information (training_info), which would be lost; export the model for inference")
    if proto.ir_version < OLDEST:
        raise UnsupportedError(f"its format is older than ONNX 1.0 (IR version {proto.ir_version}); export it again with a newer exporter")
    size = proto.ByteSize()
    known = ModelProto()
    known.CopyFrom(proto)
    known.DiscardUnknownFields()
    if known.ByteSize() != size:
        raise UnsupportedError(f"it holds fields that onnx {onnx.__version__} doesn't know, which would be lost; install a newer onnx")
    del known
    for graph in graphs(proto):
        if graph.sparse_initializer:
            raise UnsupportedError("it holds sparse weights (sparse_initializer), which would be lost; make them dense first")
        outermost = graph is proto.graph
        for info in graph.input if outermost else (*graph.input, *graph.output, *graph.value_info):
            _check_type(info.type, f"value '{info.name}'")
    for node in nodes(proto):
        for attribute in node.attribute:
            where = f"attribute '{attribute.name}' of {label(node)}"
            if attribute.type in SPARSE:
                raise UnsupportedError(f"{where} is a sparse tensor, which isn't supported; make it dense first")
            if attribute.type == AttributeProto.UNDEFINED and not attribute.ref_attr_name:
                raise UnsupportedError(f"{where} doesn't say its type, as models from before ONNX 1.0 did; export it again")
            for kind in (*([attribute.tp] if attribute.HasField("tp") else ()), *attribute.type_protos):
                _check_type(kind, where)
    for tensor in tensors(proto):
        if tensor.HasField("segment"):
            raise UnsupportedError(f"tensor '{tensor.name}' is stored in segments, which isn't supported; export the model again")


def without_maps(proto: ModelProto) -> tuple[ModelProto, dict[str, bytes]]:
    """The model without the types that onnx_ir has no object for, maps and opaque ones, and these by value; the proto isn't changed."""
    aside = {info.name: info.type.SerializeToString() for info in (*proto.graph.output, *proto.graph.value_info) if _odd(info.type)}
    if aside:
        copy = ModelProto()
        copy.CopyFrom(proto)
        proto = copy
        for info in (*proto.graph.output, *proto.graph.value_info):
            if info.name in aside:
                info.ClearField("type")
    return proto, aside


def with_maps(proto: ModelProto, aside: Mapping[str, bytes]) -> ModelProto:
    """The proto, which gets these types back."""
    for info in (*proto.graph.output, *proto.graph.value_info):
        if info.name in aside:
            info.type.ParseFromString(aside[info.name])
    told = {info.name for info in (*proto.graph.output, *proto.graph.value_info)}
    for name in {name for node in proto.graph.node for name in node.output if name in aside} - told:
        proto.graph.value_info.add(name=name).type.ParseFromString(aside[name])
    return proto


def check_names(proto: ModelProto) -> bool:
    """Whether all nodes stand behind those that they read from. Raises ModelError unless each name that is read has one maker."""
    for entries in (proto.opset_import, *(f.opset_import for f in proto.functions)):
        for domain, count in Counter(domain_of(entry.domain) for entry in entries).items():
            versions = {entry.version for entry in entries if domain_of(entry.domain) == domain}
            if count > 1 and len(versions) > 1:
                raise ModelError(f"it imports the operator set '{domain or 'ai.onnx'}' in versions {sorted(versions)}; export it again")
    _check_unique(f"function {f.domain}::{f.name}" + (f":{f.overload}" if f.overload else "") for f in proto.functions)
    in_order = _check_graph(proto.graph, [])
    for function in proto.functions:
        in_order &= _check_graph(function, [])
    return in_order


def check_values(tensor: TensorProto, aside: int | None = None) -> None:
    """Raises ModelError unless the tensor holds as many values as its shape says. aside: bytes of its raw data that were taken out."""
    name, dims = f"tensor '{tensor.name}'", list(tensor.dims)
    dtype = data_type(tensor)
    if any(d < 0 for d in dims):
        raise ModelError(f"{name} has the impossible shape {dims}; the file is damaged")
    if aside is not None or tensor.HasField("raw_data"):
        unit, expected, found = "bytes", nbytes(tensor), len(tensor.raw_data) if aside is None else aside
    else:
        field, each = FIELDS.get(dtype, ("int32_data", 1.0))
        if field == "int32_data" and dtype.bitwidth < 6:  # several elements share a byte
            each = dtype.bitwidth / 8
        unit, expected, found = "values", math.ceil(math.prod(dims) * each), len(getattr(tensor, field))
    if found != expected:
        raise ModelError(f"{name} holds {found:,} {unit}, its shape {dims} asks for {expected:,}; the file is damaged, get it again")


def data_type(tensor: TensorProto) -> ir.DataType:
    """Its element type. ModelError where there is no such type."""
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"tensor '{tensor.name}' has the element type {tensor.data_type}, which onnx_ir doesn't know; install a newer one")
    return dtype


def nbytes(tensor: TensorProto) -> int:
    """The bytes that its data take as raw_data or in a file. ModelError for strings, which can't be stored so."""
    dtype = data_type(tensor)
    if dtype == ir.DataType.STRING:
        raise ModelError(f"tensor '{tensor.name}' holds strings as raw bytes, which ONNX doesn't allow; export the model again")
    return -(-int(math.prod(tensor.dims)) * int(dtype.bitwidth) // 8)


def graphs(proto: ModelProto) -> Iterator[GraphProto]:
    """The main graph and all those in attributes, outer before inner."""
    yield proto.graph
    for node in nodes(proto):
        yield from inner_graphs(node)


def nodes(proto: ModelProto) -> Iterator[NodeProto]:
    """All nodes: of the main graph, of those in attributes, and of functions."""
    left: list[Iterable[NodeProto]] = [proto.graph.node, *(f.node for f in proto.functions)]
    while left:
        for node in left.pop():
            yield node
            left.extend(graph.node for graph in inner_graphs(node))


def tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Every stored tensor: initializers, and those in attributes, the defaults of functions' attributes too."""
    for graph in graphs(proto):
        yield from graph.initializer
    for attributes in (*(n.attribute for n in nodes(proto)), *(f.attribute_proto for f in proto.functions)):
        for attribute in attributes:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def inner_graphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _check_graph(graph: GraphProto | FunctionProto, outer: list[tuple[set[str], set[str]]]) -> bool:
    """Whether the nodes are in order. outer: for each graph around this one, the names made so far, and all that it makes."""
    if isinstance(graph, GraphProto):
        inputs, outputs = [info.name for info in graph.input], [info.name for info in graph.output]
        weights = [tensor.name for tensor in graph.initializer]
    else:
        inputs, outputs, weights = list(graph.input), list(graph.output), []
    if "" in weights:
        raise ModelError(f"weight number {weights.index('') + 1} has no name; export the model again")
    _check_unique(f"input '{name}'" for name in inputs)
    _check_unique(f"weight '{name}'" for name in weights)
    made = {*inputs, *weights}
    everything = set(made)
    for node in graph.node:
        for name in node.output:
            if name in everything:
                raise ModelError(f"value '{name}' is made twice, the second time by {label(node)}; export the model again")
            if name:
                everything.add(name)
    scopes = [*outer, (made, everything)]
    in_order = True
    for node in graph.node:
        for name in node.input:
            if not name or name in made:
                continue
            scope = next((s for s in reversed(scopes) if name in s[1]), None)
            if scope is None:
                raise ModelError(f"{label(node)} reads '{name}', which nothing makes; export the model again")
            in_order &= name in scope[0]
        for inner in inner_graphs(node):
            in_order &= _check_graph(inner, scopes)
        made.update(node.output)
    for name in outputs:
        if name not in everything:
            raise ModelError(f"output '{name}' is made by no node; export the model again")
    return in_order


def _check_unique(names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ModelError(f"there are {count} of {name}; export the model again")


def _odd(kind: TypeProto) -> str:
    """The part of a type that onnx_ir has no object for, "" where there is none."""
    while (value := kind.WhichOneof("value")) in ("sequence_type", "optional_type"):
        kind = getattr(kind, value).elem_type
    return value if value in ("map_type", "opaque_type") else ""


def _check_type(kind: TypeProto, where: str) -> None:
    if value := _odd(kind):
        raise UnsupportedError(f"{where} is of {value.removesuffix('_type')} type, which isn't supported; leave it out of the export")


def label(node: NodeProto) -> str:
    return f"{node.op_type} '{node.name}'" if node.name else f"the {node.op_type} that makes '{next(iter(node.output), '')}'"


def domain_of(name: str) -> str:
    return "" if name == "ai.onnx" else name
