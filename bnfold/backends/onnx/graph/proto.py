"""A model as a proto, for those who read that, and what it is made of, whatever its names: a digest tells two of the same make."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import onnx
import onnx_ir as ir
from onnx import TensorProto

from ..files.save import bare
from ..files.validate import tensors
from .walk import all_graphs, all_nodes, held_tensor, nbytes, open_axes


def self_contained(model: ir.Model, *, initializers: bool = True) -> onnx.ModelProto:
    """The model as a proto with all its data inside, or without the main graph's initializers. The model isn't touched."""
    proto = bare(model)
    open_axes(proto.graph)
    for name, value in model.graph.initializers.items() if initializers else ():
        tensor = value.const_value
        assert tensor is not None
        entry = ir.serde.serialize_tensor(tensor)
        if entry.data_location == TensorProto.EXTERNAL:
            entry = TensorProto(data_type=tensor.dtype.value, dims=list(tensor.shape.numpy()), raw_data=tensor.tobytes())
        entry.name = name
        proto.graph.initializer.append(entry)
    base = next((str(t.base_dir) for t in _initialised(model) if isinstance(t, ir.ExternalTensor)), "")
    for tensor in tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, base)
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    return proto


def skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model with the types of its initializers in place of these."""
    proto = self_contained(model, initializers=False)
    there = {info.name for info in proto.graph.input}
    for name, value in model.graph.initializers.items():
        if name not in there and (tensor := value.const_value) is not None:
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.dtype.value, tensor.shape.numpy()))
    return proto


def stored_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, those of subgraphs too."""
    return sum(nbytes(t) for t in _initialised(model))


def _initialised(model: ir.Model) -> Iterable[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value


def stored_tensors(model: ir.Model) -> dict[ir.Value, ir.TensorProtocol]:
    """Every stored tensor, those of subgraphs and of Constant nodes too."""
    found = {}
    for graph in all_graphs(model.graph):
        values = (*graph.initializers.values(), *(v for node in graph for v in node.outputs))
        found.update({v: tensor for v in values if (tensor := held_tensor(v)) is not None})
    return found


def identity(model: ir.Model) -> str:
    """The same for two models of the same operators, with the same attributes, and the same numbers, whatever their names."""
    digest = hashlib.sha256()
    for node in all_nodes(model.graph):
        digest.update(f"{node.domain}:{node.op_type}:{len(node.inputs)}:{len(node.outputs)}".encode())
        for name in sorted(node.attributes):
            made = ir.to_proto(node.attributes[name])
            digest.update(made.SerializeToString(deterministic=True) if not made.HasField("g") else name.encode())
    for tensor in stored_tensors(model).values():
        digest.update(f"{tensor.dtype}{tensor.shape}".encode() + tensor.tobytes())
    return digest.hexdigest()
