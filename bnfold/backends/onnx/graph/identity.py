"""What a model is made of, whatever its names: its stored tensors, and a digest by which two of the same make can be told."""

from __future__ import annotations

import hashlib

import onnx_ir as ir

from .walk import all_graphs, all_nodes, held_tensor


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
