"""Values that are no tensors: sequences, maps, optional values, text. They stop nothing, and outputs of such kinds are compared."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from cases import Net
from compare import interface, nodes
from onnx import TensorProto, helper

import bnfold

X = np.random.default_rng(0).standard_normal((8, 4, 6, 6)).astype(np.float32)
MAP = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [])))
SEQUENCE = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
OPTIONAL = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
TEXT = helper.make_tensor_type_proto(TensorProto.STRING, ["N"])
LABELS = {"keys_int64s": [0, 1, 2, 3], "values_strings": list("abcd"), "default_string": "?"}


def drawn(kind: str, *, alone: bool = False) -> onnx.ModelProto:
    """A classifier whose scores come out as another kind of value too, or so alone."""
    net = Net("kinds of values", opset=18)
    maps = net.relu(net.bn(net.conv(net.input("N", 4, 6, 6), 4, 4), 4))
    scores = net.op("Flatten", net.op("GlobalAveragePool", maps))
    if kind == "map":
        z, made = net.op("ZipMap", scores, domain="ai.onnx.ml", classlabels_int64s=[3, 1, 2, 0]), MAP
    elif kind == "sequence":
        z, made = net.op("SequenceConstruct", scores, scores), SEQUENCE
    elif kind == "uneven sequence":
        z, made = net.op("SequenceConstruct", scores, maps), SEQUENCE
    elif kind == "optional":
        z, made = net.op("Optional", scores), OPTIONAL
    elif kind == "unwrapped":
        z, made = net.op("OptionalGetElement", net.op("Optional", scores)), helper.make_tensor_type_proto(TensorProto.FLOAT, ["N", 4])
    else:
        z, made = net.op("LabelEncoder", net.op("ArgMax", scores, axis=1, keepdims=0), domain="ai.onnx.ml", **LABELS), TEXT
    if not alone:
        net.output(scores)
    net.outputs.append(helper.make_value_info(z, made))
    model = net.model()
    for entry in model.opset_import:
        entry.version = 3 if entry.domain == "ai.onnx.ml" else entry.version
    return model


@pytest.mark.parametrize("alone", [False, True], ids=["beside scores", "alone"])
@pytest.mark.parametrize("kind", ["map", "sequence", "uneven sequence", "optional", "unwrapped", "text"])
def test_outputs_of_every_kind(kind: str, alone: bool) -> None:
    model = drawn(kind, alone=alone)
    before = model.SerializeToString(deterministic=True)
    fused, report = bnfold.fuse(model)
    assert report.batchnorms.after == 0
    assert interface(fused) == interface(model)
    assert model.SerializeToString(deterministic=True) == before
    fresh, measured = bnfold.recalibrate(model, [X])
    assert measured.samples == 8
    assert interface(fresh) == interface(model)
    assert bnfold.verify(model, fused, [X]).verdict == "equivalent"
    assert bnfold.verify(model, fresh, [X]).verdict == "different"


def test_a_type_that_onnx_ir_has_no_object_for_comes_back() -> None:
    model = drawn("map")
    maps = next(n for n in nodes(model) if n.op_type == "ZipMap").output[0]
    fused, _ = bnfold.fuse(model, check=False)
    assert fused.graph.output[1].type == MAP
    del model.graph.output[1]
    model.graph.value_info.append(helper.make_value_info(maps, MAP))
    fused, _ = bnfold.fuse(model, check=False)
    assert {v.name: v.type for v in fused.graph.value_info}[maps] == MAP
