"""Sizes that are the same in every run become constants in what is folded; those that aren't are worked out as before."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cases.builder import Net

import bnfold


def start(*shape: int | str, **attrs: int) -> tuple[Net, str]:
    net = Net("tidy", **attrs)
    return net, net.bn(net.conv(net.input(*shape), 4, 8, 3, pads=1), 8)


def size(net: Net, x: str, axis: int) -> str:
    return net.op("Gather", net.op("Shape", x), net.constant(np.array(axis, np.int64)), axis=0)


def vector(net: Net, *parts: str | int) -> str:
    return net.op("Concat", *(net.ints(p) if isinstance(p, int) else net.unsqueeze(p, 0) for p in parts), axis=0)


def folded(net: Net, y: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    net.output(y, shape=None)
    model = net.model()
    made, _ = bnfold.fuse(model)
    onnx.checker.check_model(made, full_check=True)
    return model, made


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def agree(model: onnx.ModelProto, made: onnx.ModelProto, *shapes: tuple[int, ...]) -> None:
    one, other = (ort.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]) for each in (model, made))
    for shape in shapes:
        x = {"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
        want, have = one.run(None, x)[0], other.run(None, x)[0]
        assert want.shape == have.shape
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)


def shuffled(net: Net, x: str) -> str:
    """As ShuffleNet is exported."""
    half = net.op("Cast", net.op("Div", size(net, x, 1), net.constant(np.array(2, np.int64))), to=onnx.TensorProto.INT32)
    half = net.op("Cast", half, to=onnx.TensorProto.INT64)
    batch, height, width = (size(net, x, axis) for axis in (0, 2, 3))
    apart = net.op("Reshape", x, vector(net, batch, 2, half, height, width))
    mixed = net.op("Transpose", apart, perm=[0, 2, 1, 3, 4])
    whole = net.op("Reshape", mixed, vector(net, batch, -1, height, width))
    return net.op("Slice", whole, net.ints(0), net.unsqueeze(half, 0), net.ints(1), net.ints(1))


def test_a_channel_shuffle_keeps_nothing_but_its_moves_and_its_batch() -> None:
    net, x = start("N", 4, 6, 5)
    model, made = folded(net, shuffled(net, shuffled(net, x)))
    assert operators(model)["Shape"] == 8
    assert operators(made) == {"Conv": 1, "Reshape": 4, "Transpose": 2, "Slice": 2}
    agree(model, made, (1, 4, 6, 5), (3, 4, 6, 5))
    assert bnfold.verify(model, made).levels.coefficients.verdict == "equivalent"


def test_open_spaces_stay_open() -> None:
    net, x = start("N", 4, "H", "W")
    model, made = folded(net, shuffled(net, x))
    assert operators(made)["Reshape"] == 2
    assert operators(made)["Shape"]
    agree(model, made, (1, 4, 6, 5), (3, 4, 7, 9))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_size_that_two_batches_share_by_chance_is_no_constant(axis: int) -> None:
    """Half of a batch of two and half of one of three are one."""
    net, x = start("N", 4, 6, 5)
    half = net.op("Max", net.op("Div", size(net, x, 0), net.constant(np.array(2, np.int64))), net.constant(np.array(1, np.int64)))
    parts = (half, -1, 6, 5) if axis == 0 else (-1, half, 6, 5)
    model, made = folded(net, net.op("Reshape", x, vector(net, *parts)))
    agree(model, made, (1, 4, 6, 5), (2, 4, 6, 5), (4, 4, 6, 5), (8, 4, 6, 5))


def test_what_a_caller_may_override_is_no_constant() -> None:
    net, x = start("N", 4, 6, 5)
    net.initializers.append(onnx.numpy_helper.from_array(np.array([-1, 4, 2], np.int64), "sizes"))
    net.inputs.append(onnx.helper.make_tensor_value_info("sizes", onnx.TensorProto.INT64, [3]))
    rest = net.op("Slice", "sizes", net.ints(0), net.ints(2))
    model, made = folded(net, net.op("Reshape", x, net.op("Concat", rest, vector(net, 60), axis=0)))
    assert operators(made)["Concat"] == 1
    x = np.ones((2, 4, 6, 5), np.float32)
    run = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"]).run
    assert run(None, {"x": x, "sizes": np.array([-1, 2, 2], np.int64)})[0].shape == (4, 2, 60)
    assert bnfold.verify(model, made)


def test_sizes_that_are_an_output_stay_one() -> None:
    net, x = start("N", 4, 6, 5)
    sizes = net.op("Shape", x)
    net.outputs.append(onnx.helper.make_tensor_value_info(sizes, onnx.TensorProto.INT64, [4]))
    model, made = folded(net, net.op("Reshape", x, vector(net, size(net, x, 0), size(net, x, 1), -1)))
    assert operators(made) == {"Conv": 1, "Shape": 1, "Reshape": 1}
    agree(model, made, (2, 4, 6, 5))
    (target,) = (t for t in made.graph.initializer if t.data_type == onnx.TensorProto.INT64)
    assert onnx.numpy_helper.to_array(target).tolist() == [0, 8, -1]


def test_copies_go_but_for_those_that_are_outputs() -> None:
    net, x = start("N", 4, 6, 5)
    net.output(net.op("Identity", x))
    model, made = folded(net, net.op("Relu", net.op("Identity", x)))
    assert operators(made) == {"Conv": 1, "Identity": 1, "Relu": 1}
    agree(model, made, (2, 4, 6, 5))


@pytest.mark.parametrize("computed", [False, True])
def test_what_is_reshaped_back_is_what_it_was(computed: bool) -> None:
    """As a layer is exported whose BatchNorm reads all places as samples; what was an output stays one."""
    net = Net("reshaped back")
    x = net.op("MatMul", net.input("N", 5, 4), net.matrix(4, 6))
    flat = net.bn(net.op("Flatten", x, axis=2), 6)
    back = net.op("Reshape", flat, net.op("Shape", x) if computed else net.ints(-1, 5, 6))
    net.output(net.op("Unsqueeze", net.op("Squeeze", net.unsqueeze(back, 0), net.ints(0)), net.ints(1)))
    model, made = folded(net, net.relu(back))
    assert operators(made) == {"MatMul": 1, "Add": 1, "Relu": 1, "Unsqueeze": 1}
    agree(model, made, (1, 5, 4), (3, 5, 4))
    assert bnfold.verify(model, made).levels.coefficients.verdict == "equivalent"
    assert not bnfold.verify(model, wrong(made))


def wrong(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with one weight off by a thousandth."""
    weight = next(t for t in model.graph.initializer if len(t.dims) == 2)
    array = onnx.numpy_helper.to_array(weight).copy()
    array[2, 3] *= 1.001
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    return model


def test_what_may_have_got_another_shape_stays() -> None:
    net, x = start("N", 4, "H", "W")
    flat = net.op("Flatten", x, axis=2)
    model, made = folded(net, net.reshape(flat, -1, 8, 3, 4))
    assert operators(made) == {"Conv": 1, "Flatten": 1, "Reshape": 1}
    agree(model, made, (2, 4, 3, 4), (2, 4, 4, 3), (1, 4, 6, 4))
