"""Files that are no models, damaged ones, dangerous ones, and those that onnx_ir would lose something of: one clear line each."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cases import Net
from onnx import AttributeProto, ModelProto, TensorProto, helper

import bnfold
from bnfold.backends.onnx.files.load import from_proto, load, save
from bnfold.backends.onnx.oracle.evaluator import Oracle
from bnfold.errors import BnfoldError, ModelError, UnsupportedError
from tests.conftest import small_model


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


WHOLE = small_model().SerializeToString()
LARGE = WHOLE + b"\x32\x90\x4e" + bytes(10_000)  # a doc_string of 10,000 bytes
CONTENT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file; export or download it again"),
    "git lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a Git LFS pointer, not the file itself; run 'git lfs pull'",
    ),
    "html": (b"\n <!DOCTYPE HTML><html>", "an HTML page, probably of a failed download; download the model again"),
    "html, no doctype": (b"<html lang='en'>", "an HTML page"),
    "openvino": (b'<?xml version="1.0"?><net name="m">', "an XML file, such as an OpenVINO model; give the ONNX model"),
    "textproto": (
        str(small_model()).encode(),
        "ONNX in text form; convert it with onnx.save(onnx.load(path, format='textproto'), 'model.onnx')",
    ),
    "onnxtxt": (b'<\n  ir_version: 8,\n  opset_import: ["" : 17]\n>', "ONNX in text form, or a web page"),
    "json": (b'\xef\xbb\xbf{"irVersion": "8"}', "a JSON file"),
    "keras 2": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file, such as a Keras model; load it in Python with KERAS_BACKEND=torch"),
    "keras 3": (zipped("metadata.json", "model.weights.h5"), "a Keras model; load it in Python"),
    "zipped model": (zipped("model.onnx"), "a zip archive that holds an ONNX model; unpack it"),
    "npz": (zipped("x.npy"), "a NumPy .npz archive; give the model first"),
    "damaged zip": (
        b"PK\x03\x04" + bytes(9),
        "a zip archive (a PyTorch checkpoint, TorchScript or .pt2 file), cut short or damaged; save or",
    ),
    "gzip": (gzip.compress(WHOLE), "a gzip archive; unpack it"),
    "numpy": (b"\x93NUMPY\x01\x00", "not an ONNX model but a NumPy array"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(99), "a TensorFlow Lite model; convert it to ONNX with tf2onnx"),
    "ort": (b"\x1c\0\0\0ORTM" + bytes(99), "a model in ONNX Runtime's own format (.ort)"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(99), "an image; give the model first"),
    "gguf": (b"GGUF\x03", "a GGUF file"),
    "cut short": (
        LARGE[: len(LARGE) // 2],
        f"cut short: it has {len(LARGE) // 2:,} bytes of at least {len(LARGE):,}; export or download it again",
    ),
    "damaged within": (WHOLE.replace(b"\x0a\x01x", b"\x0a\x7fx", 1), "not an ONNX model, or a damaged one"),
    "text": (b"hello", "not an ONNX model"),
    "one byte": (b"\x08", "cut short: it has 1 bytes of at least 2"),
    "zeros": (bytes(100), "not an ONNX model"),
    "random": (np.random.default_rng(2).bytes(4096), "not an ONNX model"),
    "another message": (small_model().graph.SerializeToString(), "not an ONNX model"),
    "a version alone": (b"\x08\x08", "not an ONNX model: it has no version or no nodes"),
}


@pytest.mark.parametrize("case", CONTENT)
def test_what_is_no_model(tmp_path: Path, case: str) -> None:
    content, says = CONTENT[case]
    (tmp_path / "m.onnx").write_bytes(content)
    error = refused(tmp_path / "m.onnx", ModelError)
    assert error.startswith(f"{tmp_path / 'm.onnx'}: ")
    assert says in error


def refused(path: Path, kind: type[BnfoldError]) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(kind) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("length", range(1, len(WHOLE), 7))
def test_wherever_a_file_is_cut(tmp_path: Path, length: int) -> None:
    (tmp_path / "m.onnx").write_bytes(WHOLE[:length])
    refused(tmp_path / "m.onnx", ModelError)


def test_whatever_byte_is_damaged(tmp_path: Path) -> None:
    """A damaged file may still be a model; then it loads, else it is refused. No other error comes out."""
    rng = np.random.default_rng(0)
    loaded = 0
    for _ in range(300):
        content = bytearray(WHOLE)
        for at in rng.integers(0, len(content), 3):
            content[at] = rng.integers(0, 256)
        (tmp_path / "m.onnx").write_bytes(content)
        with contextlib.suppress(BnfoldError):
            load(tmp_path / "m.onnx")
            loaded += 1
    assert 0 < loaded < 300


def test_no_file_and_no_right_to_read(tmp_path: Path) -> None:
    assert "m.onnx: no such file" in refused(tmp_path / "m.onnx", ModelError)
    assert "a folder, not a model file; name the file in it" in refused(tmp_path, ModelError)
    (tmp_path / "loop.onnx").symlink_to(tmp_path / "loop.onnx")
    assert "loop.onnx: can't be read (" in refused(tmp_path / "loop.onnx", ModelError)


# --- models that make no sense -------------------------------------------------------------------------------------------------------

Change = Callable[[ModelProto], object]


def weight(model: ModelProto) -> TensorProto:
    return model.graph.initializer[0]


def new(**fields: object) -> Change:
    """Adds a weight."""
    return lambda m: m.graph.initializer.add(**fields)


def map_type() -> onnx.ValueInfoProto:
    info = helper.make_tensor_sequence_value_info("z", 1, None)
    info.type.sequence_type.elem_type.Clear()
    info.type.sequence_type.elem_type.map_type.key_type = TensorProto.INT64
    return info


def add_attribute(**fields: object) -> Change:
    return lambda m: m.graph.node[0].attribute.append(AttributeProto(name="a", **fields))


def subgraph(model: ModelProto) -> onnx.GraphProto:
    inner = helper.make_graph([helper.make_node("Relu", ["c"], ["r"])], "inner", [], [helper.make_tensor_value_info("r", 1, None)])
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    node = model.graph.node.add(op_type="If", input=["flag"], output=["z"])
    node.attribute.extend([helper.make_attribute("then_branch", inner), helper.make_attribute("else_branch", inner)])
    return node.attribute[0].g


INVALID: dict[str, tuple[Change, str]] = {
    "no operator set": (lambda m: m.ClearField("opset_import"), "not an ONNX model: it names no operator set"),
    "two operator sets": (lambda m: m.opset_import.add(domain="ai.onnx", version=9), "operator set 'ai.onnx' in versions [9, 17]"),
    "nothing makes it": (lambda m: m.graph.node[0].input.append("lost"), "Conv 'conv' reads 'lost', which nothing makes; export"),
    "nothing makes it within": (lambda m: subgraph(m).node[0].input.append("lost"), "the Relu that makes 'r' reads 'lost', which"),
    "no output": (lambda m: m.graph.output.append(helper.make_tensor_value_info("z", 1, None)), "output 'z' is made by no node"),
    "no output within": (lambda m: subgraph(m).output.append(helper.make_tensor_value_info("c", 1, None)), "output 'c' is made by no node"),
    "made twice": (lambda m: m.graph.node.append(helper.make_node("Relu", ["x"], ["c"])), "value 'c' is made twice, the second time by"),
    "made and stored": (lambda m: m.graph.node.append(helper.make_node("Relu", ["x"], ["bias"])), "value 'bias' is made twice"),
    "stored twice": (lambda m: m.graph.initializer.append(weight(m)), "there are 2 of weight 'weight'"),
    "input twice": (lambda m: m.graph.input.append(m.graph.input[0]), "there are 2 of input 'x'"),
    "function twice": (lambda m: m.functions.extend([onnx.FunctionProto(name="f", domain="d")] * 2), "there are 2 of function d::f"),
    "circle": (lambda m: m.graph.node[0].input.__setitem__(0, "y"), "its graph makes no sense"),
    "no name": (new(data_type=1), "weight number 7 has no name"),
    "too few bytes": (lambda m: setattr(weight(m), "raw_data", b"1234"), "4 bytes, its shape [4, 3, 3, 3] asks for 432; the file"),
    "too many bytes": (lambda m: setattr(weight(m), "raw_data", bytes(2000)), "tensor 'weight' holds 2,000 bytes, its shape"),
    "no bytes": (lambda m: weight(m).ClearField("raw_data"), "tensor 'weight' holds 0 values, its shape [4, 3, 3, 3] asks for 108"),
    "too few values": (new(name="w", data_type=1, dims=[3], float_data=[1, 2]), "tensor 'w' holds 2 values, its shape [3] asks for 3"),
    "too few nibbles": (new(name="w", data_type=22, dims=[5], int32_data=[1, 2]), "holds 2 values, its shape [5] asks for 3"),
    "half a complex": (new(name="w", data_type=14, dims=[1], float_data=[1]), "holds 1 values, its shape [1] asks for 2"),
    "raw strings": (new(name="w", data_type=8, raw_data=b"a"), "tensor 'w' holds strings as raw bytes"),
    "negative size": (lambda m: weight(m).dims.append(-1), "tensor 'weight' has the impossible shape [4, 3, 3, 3, -1]"),
    "no type": (lambda m: weight(m).ClearField("data_type"), "tensor 'weight' has the element type 0"),
    "new type": (lambda m: setattr(weight(m), "data_type", 99), "tensor 'weight' has the element type 99, which onnx_ir"),
    "attribute": (add_attribute(type=4, t=TensorProto(name="t", data_type=1, dims=[2])), "tensor 't' holds 0 values, its shape [2]"),
    "within": (lambda m: subgraph(m).initializer.add(name="w", data_type=1, dims=[2]), "tensor 'w' holds 0 values"),
}  # fmt: skip
LOST: dict[str, tuple[Change, str]] = {
    "training": (lambda m: m.training_info.add(), "it holds training information (training_info), which would be lost"),
    "sparse": (lambda m: m.graph.sparse_initializer.add(), "it holds sparse weights (sparse_initializer), which would be lost"),
    "sparse within": (lambda m: subgraph(m).sparse_initializer.add(), "it holds sparse weights (sparse_initializer), which would be lost"),
    "sparse attribute": (add_attribute(type=11), "attribute 'a' of Conv 'conv' is a sparse tensor"),
    "untyped attribute": (add_attribute(i=3), "attribute 'a' of Conv 'conv' doesn't say its type"),
    "map input": (lambda m: m.graph.input.append(map_type()), "value 'z' is of map type, which isn't supported"),
    "map within": (lambda m: subgraph(m).value_info.append(map_type()), "value 'z' is of map type, which isn't supported"),
    "map attribute": (add_attribute(type=13, tp=map_type().type), "attribute 'a' of Conv 'conv' is of map type"),
    "segment": (lambda m: weight(m).segment.SetInParent(), "tensor 'weight' is stored in segments"),
    "old": (lambda m: setattr(m, "ir_version", 2), "its format is older than ONNX 1.0 (IR version 2)"),
    "new": (lambda m: m.graph.MergeFromString(b"\xfa\x7f\x01a"), f"it holds fields that onnx {onnx.__version__} doesn't know"),
}


def at(index: int, **attributes: object) -> Change:
    """Gives a node attributes."""
    return lambda m: m.graph.node[index].attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())


def reshaped(name: str, *dims: int) -> Change:
    """Gives a weight another shape, and as many numbers as it asks for."""

    def change(model: ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(dims, np.float32), name))

    return change


def declared(*sizes: int) -> Change:
    def change(model: ModelProto) -> None:
        for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, sizes, strict=True):
            dim.dim_value = size

    return change


def calls(name: str, *inputs: str, opset: int = 17, body: str = "") -> Change:
    """A function, which calls another, and a node that calls it."""

    def change(model: ModelProto) -> None:
        node = helper.make_node(body or "Relu", ["a"], ["b"], domain="d" if body else "")
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("d", 1)]
        model.functions.append(helper.make_function("d", name, ["a"], ["b"], [node], imports))
        model.opset_import.extend([helper.make_opsetid("d", 1)] * (len(model.functions) == 1))
        model.graph.node.append(helper.make_node(name, list(inputs), [f"made by {name}"], domain="d"))

    return change


def circle(model: ModelProto) -> None:
    calls("f", "x", body="g")(model)
    calls("g", "x", body="f")(model)


ODD: dict[str, tuple[Change, str]] = {
    "too few inputs": (lambda m: m.graph.node[1].input.pop(), "'bn' is not valid: it has 4 inputs, and opset 17 asks for 5"),
    "too many inputs": (lambda m: m.graph.node[0].input.append("x"), "Conv 'conv' is not valid: it has 4 inputs, and opset 17 asks for"),
    "an input left out": (lambda m: m.graph.node[0].input.__setitem__(1, ""), "its input W (number 1) is left out, which opset 17"),
    "too many outputs": (lambda m: m.graph.node[0].output.append("more"), "it has 2 outputs, and opset 17 asks for 1"),
    "attribute of another type": (at(0, group=1.0), "its attribute 'group' is of type float, not int"),
    "attribute that is no text": (at(0, auto_pad=b"\xff"), "its attribute 'auto_pad' is no text"),
    "attribute that is none of the words": (at(0, auto_pad="SAME"), "'SAME', which is none of NOTSET, SAME_LOWER, SAME_UPPER, VALID"),
    "attribute of another version, of another type": (at(1, spatial="no"), "its attribute 'spatial' is of type string, not int"),
    "attribute that is neither yes nor no": (at(1, training_mode=7), "its training_mode is 7, which is neither 0 nor 1"),
    "attribute twice": (lambda m: [at(1, momentum=0.5)(m) for _ in "ab"], "'bn' has its attribute 'momentum' twice"),
    "attribute missing": (
        lambda m: m.graph.node.append(helper.make_node("Cast", ["y"], ["z"])),
        "the Cast that makes 'z' is not valid: its attribute 'to' is missing, which opset 17 requires",
    ),
    "attribute of a function": (
        lambda m: m.graph.node[1].attribute.add(name="epsilon", type=1, ref_attr_name="outer"),
        "'bn' takes its attribute 'epsilon' from a function, and is in none",
    ),
    "a block whose square is no number that ONNX Runtime can divide by": (
        lambda m: m.graph.node.append(helper.make_node("DepthToSpace", ["y"], ["z"], blocksize=1 << 62)),
        "its blocksize is 4611686018427387904",
    ),
    "no groups": (at(0, group=0), "it has 0 groups"),
    "groups that don't divide": (at(0, group=3), "its 4 output channels aren't divided by its 3 groups"),
    "kernel of another shape": (at(0, kernel_shape=[3, 2]), "its kernel_shape (3, 2) isn't that of its weight, (3, 3)"),
    "strides of another rank": (at(0, strides=[1]), "its strides are 1 numbers, and its kernel has 2 axes"),
    "a stride of zero": (at(0, strides=[0, 1]), "its strides (0, 1) hold a number below 1"),
    "a weight without a kernel": (reshaped("weight", 4, 3), "its weight has the shape (4, 3), which has no kernel"),
    "gamma of another length": (reshaped("gamma", 3), "its parameters differ in shape: scale (3,), bias (4,), mean (4,), variance (4,)"),
    "gamma with two axes": (reshaped("gamma", 4, 1), "its scale has the shape (4, 1), where it must be a vector"),
    "parameters that don't fit the channels": (
        lambda m: [reshaped(name, 5)(m) for name in ("gamma", "beta", "mean", "var")], "its operators don't fit each other"
    ),
    "a matrix with three axes": (
        lambda m: (reshaped("weight", 4, 3, 3)(m), m.graph.node[0].__setattr__("op_type", "Gemm")),
        "its matrix B has the shape (4, 3, 3)",
    ),
    "a bias of another length than the product's": (
        lambda m: (
            reshaped("weight", 4, 6)(m),
            m.graph.node[0].__setattr__("op_type", "Gemm"),
            reshaped("bias", 3)(m),
        ),
        "its C has the shape (3,), and its product 6 columns",
    ),
    "no order of axes": (
        lambda m: m.graph.node.append(helper.make_node("Transpose", ["y"], ["z"], perm=[0, 0, 1, 2])), "its perm [0, 0, 1, 2] is no order"
    ),
    "a constant of two values": (
        lambda m: m.graph.node.append(helper.make_node("Constant", [], ["z"], value_int=1, value_float=1.0)), "it states 2 values"
    ),
    "an input beyond any memory": (declared(2**31, 3, 8, 8), "input 'x' states the sizes [2147483648, 3, 8, 8], more than"),
    "an output that is an input of another shape": (
        lambda m: m.graph.output.append(helper.make_tensor_value_info("x", 1, [1, 2])), "value 'x' is an input and an output, of different"
    ),
    "opset 0": (lambda m: setattr(m.opset_import[0], "version", 0), "the model says that it uses opset 0, which there is none of"),
    "standard operators of no version": (
        lambda m: setattr(m.opset_import[0], "domain", "x"), "is of the standard operators, whose version nothing states"
    ),
    "functions in a circle": (circle, "functions call each other in a circle (d::f, d::g)"),
    "a function that calls itself": (calls("f", "x", body="f"), "functions call each other in a circle (d::f)"),
    "a chain of functions": (
        lambda m: [calls(f"f{i}", "x", body=f"f{i + 1}" if i < 100 else "")(m) for i in range(101)], "call each other 101 deep, more than"
    ),
    "a call with too many inputs": (calls("f", "x", "x"), "it has 2 inputs, and the function that it calls 1"),
    "a name that is no text": (lambda m: setattr(m.graph.node[0], "name", "MARK"), "a name of "),
}  # fmt: skip
NEWER: dict[str, tuple[Change, str]] = {
    "opset to come": (lambda m: setattr(m.opset_import[0], "version", 999), "the model uses opset 999, and onnx"),
    "function of another opset": (calls("f", "x", opset=13), "function d::f uses version 13 of the operators 'ai.onnx', and the model 17"),
}


@pytest.mark.parametrize("case", [*ODD, *NEWER])
def test_models_that_their_specification_forbids(tmp_path: Path, case: str) -> None:
    """Whatever is taken for granted later is looked at when a file is read."""
    change, says = (ODD | NEWER)[case]
    model = small_model()
    change(model)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString().replace(b"MARK", b"\xff\xfe\xff\xfe"))
    text = refused(tmp_path / "m.onnx", UnsupportedError if case in NEWER else ModelError)
    assert says in text, text


SLOPPY: dict[str, Change] = {
    "a custom operator": lambda m: m.graph.node.append(helper.make_node("Own", ["y"], ["z"], domain="own", level=[1])),
    "an operator that nobody knows": lambda m: m.graph.node.append(helper.make_node("Own", ["y"], ["z"])),
    "an attribute that nobody knows": at(0, own="yes"),
    "an attribute of an older version": at(1, consumed_inputs=[0, 0, 0, 1, 1]),
    "a size that isn't so": lambda m: m.graph.value_info.append(helper.make_tensor_value_info("c", 1, ["N", 99, 6, 6])),
    "an output of another size": lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 99),
    "empty names behind the inputs": lambda m: m.graph.node.append(helper.make_node("Clip", ["y", "", ""], ["z"])),
    "a function that nobody calls": lambda m: (calls("f", "x")(m), m.graph.node.pop()),
}


@pytest.mark.parametrize("case", SLOPPY)
def test_sloppy_models_are_taken(case: str) -> None:
    model = small_model()
    SLOPPY[case](model)
    assert [layer.verdict for layer in bnfold.inspect(model).layers] == ["folded"]


@pytest.mark.parametrize("case", [*INVALID, *LOST])
def test_models_that_are_refused(tmp_path: Path, case: str) -> None:
    change, says = (INVALID | LOST)[case]
    model = small_model()
    change(model)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    kind = UnsupportedError if case in LOST else ModelError
    assert says in refused(tmp_path / "m.onnx", kind)
    with pytest.raises(kind):
        from_proto(model)


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("computed", [False, True], ids=["stored", "computed"])
def test_a_bias_that_no_runtime_takes(kind: str, computed: bool) -> None:
    """torch's exporter computes zeros of shape (channels, 2) for a Conv3d without bias."""
    net = Net("bad bias", opset=18)
    bias = net.constant(np.zeros((6, 2) if not computed else 1, np.float32))
    bias = net.op("Expand", bias, net.ints(6, 2)) if computed else bias
    convolve = net.conv if kind == "Conv" else net.conv_transpose
    net.output(net.bn(convolve(net.input("N", 4, 5, 5, 5), 4, 6, dims=3, bias=False), 6), shape=["N", 6, "D", "H", "W"])
    net.nodes[-2].input.append(bias)
    for verb in (bnfold.inspect, bnfold.fuse):
        with pytest.raises(ModelError, match=rf"^{kind} {kind}_node_0 has a bias of shape \(6, 2\), .* its 6 output channels.*; torch"):
            verb(net.model())


def test_large_weights_are_counted_too(tmp_path: Path) -> None:
    model = small_model()
    model.graph.initializer.add(name="w", data_type=1, dims=[1000], raw_data=bytes(3996))
    onnx.save(model, tmp_path / "m.onnx")
    assert "tensor 'w' holds 3,996 bytes, its shape [1000] asks for 4,000" in refused(tmp_path / "m.onnx", ModelError)


# --- external data -------------------------------------------------------------------------------------------------------------------


def outside(path: Path, **entries: str) -> Path:
    """A model with its weights in w.data; entries: of the first weight's external_data, instead of the right ones."""
    model = small_model()
    onnx.save(model, path, save_as_external_data=True, location="w.data", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    info = {entry.key: entry.value for entry in weight(model).external_data} | entries
    del weight(model).external_data[:]
    for key, text in info.items():
        weight(model).external_data.add(key=key, value=text)
    path.write_bytes(model.SerializeToString())
    return path


UNSAFE = {
    "/etc/passwd": "points outside the model's folder ('/etc/passwd'), which is not safe",
    "../w.data": "points outside the model's folder ('../w.data'), which is not safe",
    "a/../../w.data": "points outside the model's folder",
    "..\\w.data": "points outside the model's folder",
    "C:\\w.data": "points outside the model's folder",
    "\\\\host\\w.data": "points outside the model's folder",
    "": "points outside the model's folder ('')",
    "gone.data": "the file 'gone.data' with the data of tensor 'weight' is missing from {folder}; copy it there",
    "link.data": "points outside the model's folder ('link.data' is a link to {outer}), which is not safe",
    "folder": "'folder', with the data of tensor 'weight', can't be read",
    "pipe": "'pipe', with the data of tensor 'weight', can't be read (a device or pipe, not a file)",
    "hard.data": "tensor 'weight' has its data in a hard link ('hard.data'), which is not safe; put a copy in its place",
}


@pytest.mark.parametrize("location", UNSAFE)
def test_external_data_that_must_not_be_read(tmp_path: Path, location: str) -> None:
    folder, outer = tmp_path / "model", tmp_path / "secret"
    (folder / "folder").mkdir(parents=True)
    outer.write_bytes(bytes(1000))
    (folder / "link.data").symlink_to(outer)
    (folder / "hard.data").hardlink_to(outer)
    os.mkfifo(folder / "pipe")
    path = outside(folder / "m.onnx", location=location)
    assert UNSAFE[location].format(folder=folder, outer=outer) in refused(path, ModelError)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"offset": "1000"}, "tensor 'weight' needs bytes 1,000 to 1,432 of 'w.data', which has 512; copy the whole file"),
        ({"offset": "-8"}, "tensor 'weight' needs bytes -8 to 424"),
        ({"length": "8"}, "tensor 'weight' takes 8 bytes of 'w.data', its shape [4, 3, 3, 3] asks for 432"),
        ({"offset": "one"}, "tensor 'weight' has an offset or a length that is no number"),
    ],
)
def test_external_data_that_do_not_fit(tmp_path: Path, entries: dict[str, str], says: str) -> None:
    assert says in refused(outside(tmp_path / "m.onnx", **entries), ModelError)


def test_external_data_without_offset_and_length(tmp_path: Path) -> None:
    """Both may be left out: the data begin where the file does."""
    path = outside(tmp_path / "m.onnx", offset="", length="")
    assert stored(path)["weight"] == weight(small_model()).raw_data


def stored(path: Path) -> dict[str, bytes]:
    return {name: v.const_value.tobytes() for name, v in load(path).graph.initializers.items()}


def test_a_cache_of_links_is_read(tmp_path: Path) -> None:
    """As Hugging Face's: the model and its data are links into one folder, where they have other names."""
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    outside(snapshot / "m.onnx")
    for name, blob in (("m.onnx", "aa"), ("w.data", "bb")):
        (snapshot / name).rename(blobs / blob)
        (snapshot / name).symlink_to(Path("../../blobs", blob))
    assert stored(snapshot / "m.onnx")["weight"] == weight(small_model()).raw_data


def test_external_data_within_subgraphs_and_attributes(tmp_path: Path) -> None:
    model = small_model()
    inner = subgraph(model)
    numbers = np.arange(500, dtype=np.float32)
    inner.node.append(helper.make_node("Constant", [], ["k"], value=onnx.numpy_helper.from_array(numbers, "k")))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.data", size_threshold=0, convert_attribute=True)
    loaded = load(tmp_path / "m.onnx")
    os.remove(tmp_path / "w.data")
    save(loaded, tmp_path / "out.onnx")
    back = onnx.load(tmp_path / "out.onnx")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(back.graph.node[-1].attribute[0].g.node[-1].attribute[0].t), numbers)


def test_a_model_may_be_saved_over_itself(tmp_path: Path) -> None:
    """Its data are mapped: they go to a new file of another name, and both models can be read on."""
    model = small_model()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(5000, dtype=np.float32), "big"))
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    original = load(path)
    fused, _ = bnfold.fuse(original, check=False)
    save(fused, path, force=True)
    assert original.graph.initializers["weight"].const_value.tobytes() == weight(small_model()).raw_data
    assert stored(path)["big"] == np.arange(5000, dtype=np.float32).tobytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m.onnx", "m.onnx.1.data"]


def test_data_stay_outside_where_every_weight_was_rewritten(tmp_path: Path) -> None:
    model = small_model()
    wide = onnx.numpy_helper.from_array(np.ones((64, 3, 3, 3), np.float32), "weight")
    model.graph.initializer[0].CopyFrom(wide)
    for tensor in model.graph.initializer[1:]:
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(64, np.float32), tensor.name))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    fused, _ = bnfold.fuse(load(tmp_path / "m.onnx"), check=False)
    save(fused, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").stat().st_size == 64 * 3 * 3 * 3 * 4


def test_a_proto_whose_data_are_not_loaded(tmp_path: Path) -> None:
    proto = onnx.load(outside(tmp_path / "m.onnx"), load_external_data=False)
    with pytest.raises(ModelError, match=r"the data of tensor 'weight' are in a file that isn't loaded; load them with onnx.load"):
        from_proto(proto)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("y = LayerNormalization <axis = 1> (x, w, wide)", r"its parameter of shape \(4, 3\) doesn't fit"),
        ("y = com.microsoft.FusedConv <activation = 'Relu'> (x, vector)", r"its weight has the shape \(2,\), which has no kernel"),
        ("y = com.microsoft.FusedMatMul <transA = 1> (x)", "an input that it needs is left out"),
        ("y = com.microsoft.FusedMatMul <transA = 1> (matrix, x)", "the map's coefficients don't fit the weight"),
    ],
)
def test_parameters_that_no_schema_checks_keep_a_batchnorm(node: str, reason: str) -> None:
    """Where ONNX states no shape, the operator is a barrier that says why."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> g (float[N, 2, 3] x) => (float[N, 2, 3] z)'
        "<float[2, 3] w = {1, 1, 1, 1, 1, 1}, float[4, 3] wide = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, float[2] vector = {1, 2},"
        " float[1, 2, 1] matrix = {1, 2}>"
        f"{{ {node} z = BatchNormalization (y, vector, vector, vector, vector) }}".replace("'", '"')
    )
    (layer,) = bnfold.inspect(model).layers
    assert layer.verdict == "kept"
    assert re.search(reason, layer.reason)


def test_an_operand_that_is_left_out_of_many_is_refused() -> None:
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[N, 2] x) => (float[N, 2] y) { y = Sum (x, , x) }')
    assert model.graph.node[0].input == ["x", "", "x"]
    with pytest.raises(ModelError, match=r"its input data_0 \(number 1\) is left out"):
        bnfold.inspect(model)


def test_an_input_without_a_type_and_a_constant_without_room_for_the_map() -> None:
    """An Upsample of a vector, by computed scales, which no runtime takes."""
    model = small_model()
    model.graph.node.insert(0, helper.make_node("Own", ["z"], ["c0"], domain="own"))
    model.graph.input.append(helper.make_tensor_value_info("z", 0, ["N"]))
    model.opset_import.add(domain="own", version=1)
    with pytest.raises(UnsupportedError, match="input 'z' doesn't state its type"):
        bnfold.verify(model, model)
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 9]> g (float[2, 4, 6, 5] x) => (float[N, C, H, W] y) <float[4] c = {1, 2, 3, 4},'
        ' float[6] v = {1, 2, 3, 4, 5, 6}> { u = Upsample <mode = "nearest"> (c, x) y = BatchNormalization (u, v, v, v, v) }'
    )
    (layer,) = bnfold.inspect(model).layers
    assert layer.verdict == "kept"
    assert "doesn't fit a constant of shape (4,)" in layer.reason


def test_a_graph_that_a_call_hands_to_a_function_is_refused() -> None:
    inner = helper.make_graph([], "inner", [], [])
    call = helper.make_node("F", ["x"], ["y"], domain="own", body=inner)
    function = helper.make_function("own", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 17)])
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 2]) for name in "xy"]
    graph = helper.make_graph([call], "g", ports[:1], ports[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=9)
    with pytest.raises(UnsupportedError, match="functions can't be put in the places of their calls"):
        bnfold.inspect(model)


@pytest.mark.parametrize(("direction", "valid"), [("LEFT", True), ("RIGHT", True), ("forward", False)])
def test_words_of_one_name_differ_by_operator(direction: str, valid: bool) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.UINT8, [3]) for name in "xyz"]
    graph = helper.make_graph([helper.make_node("BitShift", ["x", "y"], ["z"], direction=direction)], "shift", ends[:2], ends[2:])
    with contextlib.nullcontext() if valid else pytest.raises(ModelError, match="'forward', which is none of LEFT, RIGHT"):
        from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_an_operator_of_somebody_elses_that_has_a_standard_name() -> None:
    """Where no rank is stated, operators are asked for theirs: not this one."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[3, 4] x) => (z)'
        " <float[4] v = {1, 2, 3, 4}> { y = BatchNormalization (x, v, v, v, v) z = com.microsoft.MatMul (y) }"
    )
    (layer,) = bnfold.inspect(model).layers
    assert "MatMul" in layer.reason


def test_an_operator_that_its_opset_lacks_does_not_run() -> None:
    model = small_model()
    model.opset_import[0].version = 6
    model.graph.node.insert(0, helper.make_node("DeformConv", ["x", "x", "x"], ["deformed"]))
    with pytest.raises(UnsupportedError, match="lacks the operator DeformConv of opset 6"):
        Oracle(from_proto(model))


def test_a_setting_that_is_no_number_is_refused() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> g (float[N, 2] x) => (float[N, 2] z) <float[2, 2] w = {1, 2, 3, 4}>'
        ' { z = com.microsoft.FusedMatMul <alpha = "two"> (x, w) }'
    )
    with pytest.raises(ModelError, match="FusedMatMul z has an attribute 'alpha' that is no number"):
        bnfold.inspect(model)
    model.graph.node[0].domain, model.graph.node[0].op_type = "", "MatMul"  # which has no such setting
    assert not bnfold.inspect(model).layers


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ("FusedConv <kernel_shape = 3> (x, w)", "its attribute 'kernel_shape' is of type int, not ints"),
        ("FusedConv <pads = [0.5, 1.0]> (x, w)", "its attribute 'pads' is of type floats, not ints"),
        ('FusedConv <auto_pad = "SAME"> (x, w)', "its attribute 'auto_pad' is 'SAME', which is none of"),
        ('NhwcFusedConv <strides = "two"> (x, w)', "its attribute 'strides' is of type string, not ints"),
        ('FusedGemm <transB = "yes"> (f, m)', "its attribute 'transB' is of type string, not int"),
        ('FusedMatMul <transA = "yes"> (f, m)', "has an attribute 'transA' that is no integer"),
    ],
)
def test_settings_of_onnx_runtimes_operators_have_the_types_of_the_standards(node: str, said: str) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> g (float[N, 2, 5, 5] x, float[N, 2] f) => (z)'
        f" <float[2, 2] m = {{1, 2, 3, 4}}, float[2, 2, 1, 1] w = {{1, 2, 3, 4}}> {{ z = com.microsoft.{node} }}"
    )
    with pytest.raises(ModelError, match=said):
        bnfold.fuse(model)
