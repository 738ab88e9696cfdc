"""A model in float64: the same graph with every floating-point type of 16 and 32 bits widened, and optionally its weights jittered.

Casts between such types become casts to float64, so nothing is rounded on the way. float8 and integers stay: there, rounding is
what the model means.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from bnfold.errors import UnsupportedError

Array = np.ndarray

FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
_NUMPY_FLOATS = tuple(helper.tensor_dtype_to_np_dtype(kind) for kind in FLOATS)
# Attributes that name a type; where such a one is missing it means FLOAT for the operators in _TYPE_DEFAULTS.
_TYPE_ATTRIBUTES = {"to", "dtype", "output_datatype", "output_dtype", "precision", "softmax_precision", "qk_matmul_precision", "stash_type"}
_TYPE_DEFAULTS = {
    "RandomNormal": "dtype",
    "RandomUniform": "dtype",
    "HannWindow": "output_datatype",
    "HammingWindow": "output_datatype",
    "BlackmanWindow": "output_datatype",
    "MelWeightMatrix": "output_datatype",
    "SequenceEmpty": "dtype",
}
# Significant bits and the exponent of the smallest normal number (IEEE 754, table 3.5; bfloat16 has float32's exponents).
FORMATS: dict[int, tuple[int, int]] = {
    TensorProto.FLOAT16: (11, -14),
    TensorProto.BFLOAT16: (8, -126),
    TensorProto.FLOAT: (24, -126),
    TensorProto.DOUBLE: (53, -1022),
}

AT_A_TIME = 1 << 16  # numbers
HELD = 1 << 27  # bytes of a model's weights that are held in float64; more are widened whenever an operator reads them
BIT_CAST = "BitCast"  # its types are those of the file, or it would read other bits

_EXPONENT = np.uint64(0x7FF0_0000_0000_0000)


def widen(array: Array) -> Array:
    """In float64 if the array is of a floating-point type that is widened, else as it is."""
    return array.astype(np.float64) if array.dtype in _NUMPY_FLOATS else array


class Weight(NamedTuple):
    """A weight of which nothing is held but how it is stored."""

    tensor: ir.TensorProtocol
    read: Callable[[np.ndarray], np.ndarray]

    def array(self) -> np.ndarray:
        return self.read(self.tensor.numpy())


def read_inside(graph: onnx.GraphProto) -> set[str]:
    """What operators with subgraphs read, of which their bodies know nothing but arrays."""
    return {name for node in graph.node if any(map(bodies, node.attribute)) for name in reads(node)}


def reads(node: onnx.NodeProto) -> set[str]:
    """All names that a node needs from around it, those of its subgraphs too."""
    names = set(node.input)
    for attribute in node.attribute:
        for body in bodies(attribute):
            names |= {o.name for o in body.output}.union(*map(reads, body.node))
    return names


def to_float64(
    proto: onnx.ModelProto | onnx.FunctionProto, *, jitter: int | None = None, moving: Mapping[str, int] = MappingProxyType({})
) -> None:
    """Widen a proto in place, with all its subgraphs and functions. jitter: see `jittered`; moving: what it moves (see `weights`)."""
    if isinstance(proto, onnx.FunctionProto):
        _nodes(proto.node, None, {})
        return
    _graph(proto.graph, jitter, moving)
    for function in proto.functions:
        _nodes(function.node, None, {})


def state_bits(proto: onnx.ModelProto, types: Mapping[str, int]) -> None:
    """Say at each operator that reads bits what they are stored as, in an attribute of ours.

    types: of the initializers that the proto refers to and doesn't hold. Raises UnsupportedError where that can't be told.
    """
    if not any(node.op_type == BIT_CAST for node in all_nodes(proto.graph)):
        return
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    there = {info.name for info in whole.graph.input}
    whole.graph.input.extend(helper.make_tensor_value_info(n, kind, None) for n, kind in types.items() if n not in there)
    found = dict(types)
    for graph in all_graphs(onnx.shape_inference.infer_shapes(whole, strict_mode=False).graph):
        for info in (*graph.input, *graph.value_info, *graph.output):
            found.setdefault(info.name, info.type.tensor_type.elem_type)
        found.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    for node in all_nodes(proto.graph):
        if node.op_type == BIT_CAST:
            if not found.get(node.input[0]):
                raise UnsupportedError(f"the float64 oracle can't run {BIT_CAST}: the type of {node.input[0]!r} isn't known")
            node.attribute.append(helper.make_attribute("stored", found[node.input[0]]))


def jittered(array: Array, data_type: int, name: str, seed: int) -> Array:
    """In float64, with each number moved by a uniform random amount of up to half a unit in the last place of `data_type`.

    That is all the freedom that rounding to the stored type leaves. Zeros stay. The amounts depend on the seed and the name alone.
    """
    if data_type not in FORMATS:
        return widen(array)
    bits, smallest = FORMATS[data_type]
    made = np.array(array, np.float64, order="C")
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    for part in np.array_split(made.reshape(-1), made.size // AT_A_TIME + 1):
        # The exponent's bits alone are the power of two below the number; times 2**(1 - bits), it is a unit in the last place.
        unit = np.bitwise_and(part.view(np.uint64), _EXPONENT).view(np.float64)
        np.maximum(unit, np.ldexp(1.0, smallest), out=unit)
        unit *= np.ldexp(1.0, 1 - bits)
        unit[(part == 0) | ~np.isfinite(part)] = 0
        part += np.subtract(rng.random(part.size, np.float32), np.float32(0.5), dtype=np.float64) * unit
    return made


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """A graph's nodes, each followed by those of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in bodies(attribute):
                yield from all_nodes(body)


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those that its nodes hold."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in bodies(attribute):
                yield from all_graphs(body)


def bodies(attribute: AttributeProto) -> list[onnx.GraphProto]:
    """The subgraphs that an attribute holds."""
    return [*([attribute.g] if attribute.type == AttributeProto.GRAPH else []), *attribute.graphs]


def _graph(graph: onnx.GraphProto, jitter: int | None, moving: Mapping[str, int]) -> None:
    for tensor in graph.initializer:
        _tensor(tensor, tensor.name, jitter, moving)
    for sparse in graph.sparse_initializer:
        _tensor(sparse.values, sparse.values.name, jitter, moving)
    for info in (*graph.input, *graph.output, *graph.value_info):
        _type(info.type)
    _nodes(graph.node, jitter, moving)


def _nodes(nodes: Iterable[onnx.NodeProto], jitter: int | None, moving: Mapping[str, int]) -> None:
    for node in nodes:
        if node.op_type == "Constant":
            _constant(node)
        elif node.op_type == "ConstantOfShape" and not node.attribute:
            node.attribute.append(helper.make_attribute("value", helper.make_tensor("", TensorProto.DOUBLE, [1], [0.0])))
        missing = _TYPE_DEFAULTS.get(node.op_type)
        if missing and all(a.name != missing for a in node.attribute):
            node.attribute.append(helper.make_attribute(missing, int(TensorProto.DOUBLE)))
        for attribute in node.attribute if node.op_type != BIT_CAST else ():
            if attribute.type == AttributeProto.INT and attribute.name in _TYPE_ATTRIBUTES and attribute.i in FLOATS:
                attribute.i = TensorProto.DOUBLE
            elif attribute.type == AttributeProto.TENSOR:
                _tensor(attribute.t, node.output[0], jitter, moving)
            elif attribute.type == AttributeProto.TYPE_PROTO:
                _type(attribute.tp)
            for tensor in attribute.tensors:
                _tensor(tensor, node.output[0], jitter, moving)
            for body in bodies(attribute):
                _graph(body, jitter, moving)


def _constant(node: onnx.NodeProto) -> None:
    """`value_float` and `value_floats` as a tensor: the evaluator reads those in float32."""
    for attribute in node.attribute:
        if attribute.name in ("value_float", "value_floats") and not attribute.ref_attr_name:
            array = np.array(attribute.f if attribute.name == "value_float" else list(attribute.floats), np.float64)
            attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(array)))


def _tensor(tensor: TensorProto, name: str, jitter: int | None, moving: Mapping[str, int]) -> None:
    if tensor.data_type not in FLOATS:
        return
    array = maybe_jittered(numpy_helper.to_array(tensor), tensor.data_type, name, jitter, moving)
    own = tensor.name
    tensor.CopyFrom(numpy_helper.from_array(array, own))


def maybe_jittered(array: Array, data_type: int, name: str, jitter: int | None, moving: Mapping[str, int]) -> Array:
    """In float64, unless they are integers, which are what they are."""
    if jitter is None or name not in moving or array.dtype not in (*_NUMPY_FLOATS, np.float64):
        return widen(array)
    return jittered(array, narrower(data_type, moving[name]), name, jitter)


def narrower(one: int, other: int) -> int:
    """That of two floating-point types which has fewer bits for the digits; 0 is none, and has the most."""
    return min(one, other, key=lambda kind: FORMATS.get(kind, (64,))[0])


def _type(kind: Any) -> None:
    for field in ("tensor_type", "sparse_tensor_type"):
        if kind.HasField(field) and getattr(kind, field).elem_type in FLOATS:
            getattr(kind, field).elem_type = TensorProto.DOUBLE
    for field in ("sequence_type", "optional_type"):
        if kind.HasField(field):
            _type(getattr(kind, field).elem_type)
    if kind.HasField("map_type"):
        _type(kind.map_type.value_type)
