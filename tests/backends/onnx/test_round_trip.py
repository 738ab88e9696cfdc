"""What loading and saving keep of a model: everything."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper

from bnfold.backends.onnx.files import save as saving
from bnfold.backends.onnx.files.load import from_proto, load, save
from tests.conftest import small_model

ANYTHING = np.random.default_rng(0)


def canonical(model: ModelProto) -> ModelProto:
    """The proto without what has no meaning: the order of maps and of value_info, and left-out outputs at a node's end."""
    out = ModelProto()
    out.CopyFrom(model)

    def by(entries: Any, key: str) -> None:
        entries.sort(key=lambda entry: getattr(entry, key))

    by(out.metadata_props, "key")
    for graph in (out.graph, *(a.g for n in out.graph.node for a in n.attribute if a.type == AttributeProto.GRAPH)):
        by(graph.value_info, "name")
        by(graph.quantization_annotation, "tensor_name")
        by(graph.metadata_props, "key")
    for node in out.graph.node:
        while node.output and not node.output[-1]:
            del node.output[-1]
    for function in out.functions:
        by(function.value_info, "name")
    return out


def there_and_back(model: ModelProto, folder: Path) -> ModelProto:
    """The model, through a file, load, save, and another file."""
    onnx.save(model, folder / "there.onnx")
    save(load(folder / "there.onnx"), folder / "back.onnx", force=True)
    onnx.checker.check_model(folder / "back.onnx")
    return onnx.load(folder / "back.onnx")


def value(name: str, shape: Iterable[int | str | None] = (2, 300), kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def everything(ir_version: int = 10) -> ModelProto:
    """A model with all that onnx.proto has a place for, but what is refused."""
    large = numpy_helper.from_array(ANYTHING.standard_normal((2, 300)).astype(np.float32), "large")
    large.doc_string = "of a weight"
    large.metadata_props.add(key="weight", value="is heavy")
    typed = helper.make_tensor("typed", TensorProto.FLOAT, [2, 300], ANYTHING.standard_normal(600))
    inner = helper.make_graph(
        [helper.make_node("Add", ["held", "x"], ["i"]), helper.make_node("Add", ["i", "inner"], ["branch"])],
        "inner",
        [],
        [value("branch")],
        [numpy_helper.from_array(ANYTHING.standard_normal((2, 300)).astype(np.float32), "inner")],
        doc_string="of a subgraph",
        value_info=[value("i"), value("inner")],
    )
    inner.metadata_props.add(key="in", value="side")
    numbers = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, ["n"]))
    call = helper.make_node("scale", ["x"], ["called"], name="call", domain="local", by=2.0, overload="twice")
    call.metadata_props.add(key="node", value="props")
    call.doc_string = "of a node"
    nodes = [
        call,
        helper.make_node("Add", ["called", "large"], ["held"], name="held"),
        helper.make_node("Add", ["held", "typed"], ["sum"]),
        helper.make_node("If", ["condition"], ["chosen"], then_branch=inner, else_branch=inner),
        helper.make_node("Dropout", ["chosen", "", ""], ["y", ""]),
        helper.make_node("SequenceConstruct", ["y", "sum"], ["sequence"]),
        helper.make_node("Constant", [], ["text"], value=helper.make_tensor("t", TensorProto.STRING, [2], [b"a", "ä".encode()])),
        helper.make_node("Optional", [], ["maybe"], type=numbers),
        helper.make_node("Clip", ["overridable"], ["clipped"]),
    ]
    function = helper.make_function(
        "local",
        "scale",
        ["a"],
        ["c"],
        [helper.make_node("Constant", [], ["b"]), helper.make_node("Mul", ["a", "b"], ["c"])],
        [helper.make_opsetid("", 19)],
        attributes=["unset"],
        attribute_protos=[helper.make_attribute("by", 3.0)],
        doc_string="of a function",
        overload="twice",
        value_info=[value("b", ())] if ir_version >= 10 else [],
    )
    function.node[0].attribute.add(name="value_float", type=AttributeProto.FLOAT, ref_attr_name="by")
    function.metadata_props.add(key="function", value="props")
    x = helper.make_tensor_value_info(
        "x", TensorProto.FLOAT, ["batch", 300], doc_string="of an input", shape_denotation=["DATA_BATCH", "DATA_FEATURE"]
    )
    x.metadata_props.add(key="input", value="props")
    x.type.denotation = "TENSOR"
    graph = helper.make_graph(
        nodes,
        "g",
        [x, value("condition", (), TensorProto.BOOL), value("overridable")],
        [
            value("y", (None, 300)),
            helper.make_tensor_sequence_value_info("sequence", TensorProto.FLOAT, ["a", None]),
            value("text", (2,), TensorProto.STRING),
            helper.make_value_info(
                "maybe", helper.make_optional_type_proto(helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, ["n"])))
            ),
            value("clipped"),
        ],
        [
            large,
            typed,
            numpy_helper.from_array(np.zeros((2, 300), np.float32), "overridable"),
            numpy_helper.from_array(np.float32(1.0), "unused_scalar"),
            helper.make_tensor("empty", TensorProto.FLOAT, [0, 3], []),
            helper.make_tensor("words", TensorProto.STRING, [1], [b"\xff\x00"]),
        ],
        doc_string="of a graph",
        value_info=[value("held", ("batch", 300))],
    )
    for name in ("large", "held", "x", "overridable", "y"):
        note = graph.quantization_annotation.add(tensor_name=name)
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="unused_scalar")
    graph.metadata_props.add(key="graph", value="props")
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 19), helper.make_opsetid("local", 1)],
        functions=[function],
        ir_version=ir_version,
        producer_name="somebody",
        producer_version="1.2",
        doc_string="of a model",
        domain="org.example",
        model_version=7,
    )
    helper.set_model_props(model, {"author": "me", "licence": "MIT"})
    return model


def test_everything_comes_back(tmp_path: Path) -> None:
    model = everything()
    assert canonical(there_and_back(model, tmp_path)) == canonical(model)


def test_everything_comes_back_of_a_proto() -> None:
    model = everything()
    before = model.SerializeToString(deterministic=True)
    assert canonical(ir.to_proto(from_proto(model))).functions == canonical(model).functions
    assert model.SerializeToString(deterministic=True) == before


def test_weights_that_are_inputs_stay_so(tmp_path: Path) -> None:
    """IR version 3 demands that every initializer is an input too."""
    model = small_model()
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert there_and_back(model, tmp_path) == model


@pytest.mark.parametrize("place", ["raw", "typed"])
@pytest.mark.parametrize("kind", sorted(set(TensorProto.DataType.values()) - {TensorProto.UNDEFINED, TensorProto.STRING}))
def test_every_element_type(tmp_path: Path, kind: int, place: str) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    least = 1 if kind == TensorProto.FLOAT8E8M0 else 0  # it has no zero
    numbers = ANYTHING.integers(least, least + 2, 2051).astype(dtype)
    tensor = numpy_helper.from_array(numbers, "w")
    if place == "typed":
        tensor = helper.make_tensor("w", kind, [2051], numbers)
    model = small_model(fold="none")
    model.ir_version = 13
    model.graph.initializer.append(tensor)
    onnx.save(model, tmp_path / "m.onnx")
    loaded = load(tmp_path / "m.onnx")
    weight = loaded.graph.initializers["w"].const_value
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy(), numbers)
    assert weight.numpy().flags.aligned
    save(loaded, tmp_path / "again.onnx")
    assert onnx.load(tmp_path / "again.onnx") == model
    loaded.graph.meta[saving.EXTERNAL] = True
    save(loaded, tmp_path / "outside.onnx")
    np.testing.assert_array_equal(load(tmp_path / "outside.onnx").graph.initializers["w"].const_value.numpy(), numbers)
    if place == "raw":
        np.testing.assert_array_equal(numpy_helper.to_array(onnx.load(tmp_path / "outside.onnx").graph.initializer[-1]), numbers)


def test_a_model_without_weights(tmp_path: Path) -> None:
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value("x")], [value("y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert there_and_back(model, tmp_path) == model


def test_the_default_operators_by_their_other_name(tmp_path: Path) -> None:
    """`ai.onnx` is the empty domain; onnx_ir says so of nodes but not of imports."""
    model = small_model()
    model.opset_import[0].domain = model.graph.node[0].domain = "ai.onnx"
    back = there_and_back(model, tmp_path)
    assert [(entry.domain, entry.version) for entry in back.opset_import] == [("", 17)]
    assert load(tmp_path / "there.onnx").graph.opset_imports == {"": 17}


def test_nodes_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    """ONNX Runtime takes such models."""
    model = small_model()
    model.graph.node.reverse()
    assert [node.op_type for node in model.graph.node] == ["BatchNormalization", "Conv"]
    assert [node.op_type for node in there_and_back(model, tmp_path).graph.node] == ["Conv", "BatchNormalization"]


def test_one_graph_in_two_parts(tmp_path: Path) -> None:
    """A message whose bytes come in two fields is their concatenation."""
    model = small_model()
    tail = ModelProto(graph=onnx.GraphProto(initializer=model.graph.initializer[2:]))
    head = ModelProto()
    head.CopyFrom(model)
    del head.graph.initializer[2:]
    (tmp_path / "m.onnx").write_bytes(head.SerializeToString() + tail.SerializeToString())
    save(load(tmp_path / "m.onnx"), tmp_path / "whole.onnx")
    assert onnx.load(tmp_path / "whole.onnx") == model


def test_bfloat16_weights_are_bytes_for_bytes(tmp_path: Path) -> None:
    """NaN with a payload included: nothing converts on the way."""
    bits = ANYTHING.integers(0, 1 << 16, 4000).astype(np.uint16)
    model = small_model(fold="none")
    model.graph.initializer.append(numpy_helper.from_array(bits.view(ml_dtypes.bfloat16), "w"))
    assert there_and_back(model, tmp_path).graph.initializer[-1].raw_data == bits.tobytes()
