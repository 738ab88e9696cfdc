"""Whole models on the float64 oracle: types, functions and subgraphs, jitter, refusals."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from cases import ALL
from onnx import TensorProto, helper
from single import close, model, normal, one

from bnfold.backends.onnx.model import OnnxModel
from bnfold.backends.onnx.oracle import widen
from bnfold.backends.onnx.oracle.evaluator import Oracle
from bnfold.backends.onnx.oracle.widen import jittered
from bnfold.backends.onnx.runtime.session import Session
from bnfold.errors import DataError, UnsupportedError, UsageError
from bnfold.verification.inputs import random

# ---- whole models


def small_network(dtype=np.float32) -> ir.Model:
    rng = np.random.default_rng(5)
    c = 6
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        make("BatchNormalization", ["a", "g", "b", "m", "v"], ["bn"]),
        make("Relu", ["bn"], ["r"]),
        make("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        make("Conv", ["p", "d"], ["e"], group=c, pads=[1, 1, 1, 1]),
        make("Constant", [], ["half"], value_float=0.1),
        make("Cast", ["half"], ["same"], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype))),
        make("Mul", ["e", "same"], ["f"]),
        make("GlobalAveragePool", ["f"], ["q"]),
        make("Flatten", ["q"], ["flat"]),
        make("Gemm", ["flat", "k", "o"], ["y"], transB=1),
    ]
    weights = {
        "w": rng.standard_normal((c, 3, 3, 3)),
        "g": rng.standard_normal(c),
        "b": rng.standard_normal(c),
        "m": rng.standard_normal(c),
        "v": rng.uniform(0.5, 2, c),
        "d": rng.standard_normal((c, 1, 3, 3)),
        "k": rng.standard_normal((4, c)),
        "o": rng.standard_normal(4),
    }
    weights = {k: v.astype(dtype) for k, v in weights.items()}
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return model(nodes, {"x": np.zeros((2, 3, 8, 8), dtype)}, weights=weights, opset=15, output_types={"y": kind})


def test_a_network_agrees_with_onnx_runtime_to_float32():
    net, feeds = small_network(), {"x": normal(2, 3, 8, 8, dtype=np.float32)}
    found = Oracle(net, outputs=["bn", "flat"]).run(feeds)
    assert list(found) == ["y", "bn", "flat"]
    assert {v.dtype for v in found.values()} == {np.dtype(np.float64)}
    for name, expected in Session(net, outputs=["bn", "flat"], threads=1).run(feeds).items():
        close(found[name], expected, 1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_network_in_any_type_is_computed_in_float64(dtype):
    """The same stored numbers give the same answer in whatever type they are stored."""
    net = small_network(dtype)
    before = ir.to_proto(net).SerializeToString(deterministic=True)
    x = normal(2, 3, 8, 8).astype(dtype)
    found = Oracle(net).run({"x": x})["y"]
    assert ir.to_proto(net).SerializeToString(deterministic=True) == before
    proto = ir.to_proto(small_network(np.float64))
    for tensor, own in zip(proto.graph.initializer, net.graph.initializers.values(), strict=True):
        tensor.CopyFrom(onnx.numpy_helper.from_array(own.const_value.numpy().astype(np.float64), tensor.name))
    np.testing.assert_array_equal(found, Oracle(ir.from_proto(proto)).run({"x": x.astype(np.float64)})["y"])


def test_functions_and_branches_are_in_float64_with_our_operators():
    make = helper.make_node
    erf = helper.make_function("local", "F", ["a", "s"], ["b"], [make("Erf", ["a"], ["e"]), make("Mul", ["e", "s"], ["b"])],
                               [helper.make_opsetid("", 17)])  # fmt: skip
    value = helper.make_tensor("third", TensorProto.FLOAT, [], [1 / 3])
    info = helper.make_tensor_value_info
    branch = helper.make_graph(
        [make("Erf", ["f"], ["t"]), make("Mul", ["t", "third"], ["yes"])], "then", [], [info("yes", TensorProto.FLOAT, None)], [value]
    )
    other = helper.make_graph([make("Identity", ["f"], ["no"])], "else", [], [info("no", TensorProto.FLOAT, None)])
    feeds = {"x": normal(7, dtype=np.float32), "c": np.array(True)}
    nodes = [make("F", ["x", "w"], ["f"], domain="local"), make("If", ["c"], ["y"], then_branch=branch, else_branch=other)]
    net = model(nodes, feeds, weights={"w": np.array(0.7, np.float32)}, functions=[erf], opsets=[("local", 1)])
    torch = pytest.importorskip("torch")
    inner = torch.erf(torch.tensor(feeds["x"]).double()) * float(np.float32(0.7))
    close(Oracle(net).run(feeds)["y"], torch.erf(inner) * float(np.float32(1 / 3)))
    close(Oracle(net).run({**feeds, "c": np.array(False)})["y"], inner)


def test_nothing_is_rounded_on_the_way():
    """Types that a node names (casts, constants, ranges, random numbers) are widened too."""
    make = helper.make_node
    nodes = [
        make("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        make("CastLike", ["h", "x"], ["i"]),
        make("Constant", [], ["k"], value_floats=[0.5, 0.25]),
        make("ConstantOfShape", ["n"], ["z"]),
        make("EyeLike", ["z"], ["eye"], dtype=TensorProto.FLOAT),
        make("RandomNormal", [], ["noise"], shape=[2, 2], seed=3.0),
        make("Sum", ["eye", "noise", "z"], ["s"]),
        make("Mul", ["i", "k"], ["j"]),
        make("Add", ["j", "s"], ["y"]),
    ]
    feeds = {"x": normal(2, 2)}
    noise = np.random.RandomState(3).randn(2, 2)
    found = Oracle(model(nodes, feeds, weights={"n": np.array([2, 2])})).run(feeds)["y"]
    close(found, feeds["x"] * [0.5, 0.25] + np.eye(2) + noise, 1e-15)


def test_an_operator_of_the_evaluator_that_answers_in_float32_is_widened():
    make = helper.make_node
    nodes = [make("AffineGrid", ["theta", "size"], ["grid"]), make("Mul", ["grid", "two"], ["y"])]
    feeds = {"theta": np.array([[[1, 0, 0], [0, 1, 0]]], np.float32)}
    weights = {"size": np.array([1, 1, 2, 2]), "two": np.array(2, np.float32)}
    found = Oracle(model(nodes, feeds, weights=weights, opset=20)).run(feeds)["y"]
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found[0, 0, 0], [-1, -1])


def test_nan_and_infinity_pass():
    x = normal(1, 3, 8, 8, dtype=np.float32)
    x[0, 0, 0, 0], x[0, 1, 1, 1] = np.nan, np.inf
    found = Oracle(small_network()).run({"x": np.repeat(x, 2, 0)})["y"]
    assert np.isnan(found).any()


# ---- jitter


@pytest.mark.parametrize(("dtype", "bits"), [(np.float16, 11), (ml_dtypes.bfloat16, 8), (np.float32, 24)])
def test_jitter_is_at_most_half_a_unit_in_the_last_place(dtype, bits):
    stored = np.concatenate([normal(500), 1e-6 * normal(100), [0.0, 1.0, 2.0, np.inf]]).astype(dtype)
    array = stored.astype(np.float64)
    moved = jittered(array, helper.np_dtype_to_tensor_dtype(stored.dtype), "w", 0)
    np.testing.assert_array_equal(moved == array, (array == 0) | np.isinf(array))
    below = np.frexp(np.abs(array[:500]))[0] == 0.5  # below a power of two, numbers lie twice as close
    np.testing.assert_array_equal(moved.astype(dtype)[:500][~below], stored[:500][~below])  # it rounds back to what was stored
    normals = np.abs(array[:500]) > 1e-3
    relative = np.abs(moved[:500] - array[:500])[normals] / np.abs(array[:500][normals])
    assert 2.0 ** -(bits + 2) < relative.max() <= 2.0**-bits


def test_jitter_is_a_matter_of_the_seed_and_shows_in_the_output():
    net, feeds = small_network(), {"x": normal(2, 3, 8, 8, dtype=np.float32)}
    still, a, same, b = (Oracle(net, jitter=seed).run(feeds)["y"] for seed in (None, 1, 1, 2))
    np.testing.assert_array_equal(a, same)
    for moved, from_ in ((a, still), (b, still), (a, b)):
        assert 1e-10 < np.abs(moved - from_).max() < 1e-5


def test_jitter_leaves_what_steers():
    """Scales of a Resize, also where they are computed, and limits of a Clip."""
    make = helper.make_node
    nodes = [
        make("Shape", ["x"], ["s"]),
        make("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
        make("Mul", ["f", "scales"], ["g"]),
        make("Cast", ["g"], ["sizes"], to=TensorProto.INT64),
        make("Resize", ["x", "", "", "sizes"], ["r"], mode="nearest"),
        make("Clip", ["r", "", "limit"], ["y"]),
    ]
    feeds = {"x": normal(1, 1, 7, 7, dtype=np.float32)}
    net = model(nodes, feeds, weights={"scales": np.array([1, 1, 2, 2], np.float32), "limit": np.array(0.1, np.float32)})
    for seed in range(5):
        np.testing.assert_array_equal(Oracle(net, jitter=seed).run(feeds)["y"], Oracle(net).run(feeds)["y"])


# ---- refusals


def test_an_operator_that_nobody_has_is_named():
    feeds = {"x": normal(2, 2, dtype=np.float32)}
    node = helper.make_node("FusedThing", ["x"], ["y"], domain="com.example", name="fused")
    with pytest.raises(
        UnsupportedError, match=r"^the float64 oracle lacks the operator com\.example::FusedThing of opset 1 \(node 'fused'\)$"
    ):
        Oracle(model([node], feeds, opsets=[("com.example", 1)]))
    node = helper.make_node("Multinomial", ["x"], ["y"], name="draw")
    with pytest.raises(UnsupportedError, match=r"lacks the operator Multinomial of opset 17 \(node 'draw'\)"):
        Oracle(model([node], feeds))


def test_an_operator_that_fails_is_named():
    with pytest.raises(UnsupportedError, match=r"can't run the operator Conv \(node 'y0'\): ValueError: weights \(4, 2, 3\) in 1 groups"):
        one("Conv", [normal(1, 3, 5), normal(4, 2, 3)])


def test_an_inner_value_that_is_not_there():
    with pytest.raises(UsageError, match="the model computes no value 'zebra'"):
        Oracle(small_network(), outputs=["zebra"])


def test_feeds_that_do_not_fit():
    with pytest.raises(DataError, match=r"input 'x' has shape \(2, 3, 8, 8\), the data have \(1, 3\)"):
        Oracle(small_network()).run({"x": normal(1, 3)})
    with pytest.raises(DataError, match="input 'x' takes float32, the data are int64"):
        Oracle(small_network()).run({"x": np.zeros((2, 3, 8, 8), np.int64)})


@pytest.mark.parametrize("jitter", [None, 3])
def test_weights_that_are_not_held_are_the_same_weights(jitter: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in ALL[::40]:
        model = OnnxModel(case.build())
        feeds = random(model, model, 1, None, 0, None)[0]
        held = model.oracle(jitter=jitter).run(feeds)
        with monkeypatch.context() as patch:
            patch.setattr(widen, "HELD", 0)
            found = model.oracle(jitter=jitter).run(feeds)
        for name, array in held.items():
            np.testing.assert_array_equal(found[name], array, err_msg=case.name)


def test_what_is_written_in_place_nobody_else_sees() -> None:
    """All operators that may write into their inputs, where another value is a view of one, is read twice, or is asked for."""
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "w"], ["conv"], pads=[1, 1, 1, 1]),
        make("Identity", ["conv"], ["same"]),
        make("Reshape", ["same", "flat"], ["seen"]),
        make("Relu", ["same"], ["relu"]),
        make("Sigmoid", ["relu"], ["gate"]),
        make("Mul", ["relu", "gate"], ["silu"]),
        make("Mul", ["g", "g"], ["scale"]),
        make("BatchNormalization", ["silu", "scale", "b", "m", "v"], ["bn"]),
        make("Add", ["bn", "x"], ["sum"]),
        make("Mul", ["sum", "sum"], ["square"]),
        make("Clip", ["square", "low", "high"], ["clip"]),
        make("Relu", ["x"], ["fed"]),
        make("Sub", ["fed", "clip"], ["left"]),
        make("ReduceSum", ["seen", "axis"], ["total"], keepdims=0),
        make("Add", ["left", "total"], ["y"]),
    ]
    weights = {"w": normal(3, 3, 3, 3), "g": normal(3), "b": normal(3, seed=1), "m": normal(3, seed=2), "v": normal(3, seed=3) ** 2}
    weights |= {"low": np.float64(0.1), "high": np.float64(2), "flat": np.array([-1]), "axis": np.array([0])}
    arrays = {"x": normal(2, 3, 8, 8)}
    net, before = model(nodes, arrays, weights=weights, output_types={"y": TensorProto.DOUBLE}), arrays["x"].copy()
    oracle, inner = Oracle(net), [name for node in nodes for name in node.output]
    apart = Oracle(net, outputs=inner).run(arrays)  # where all are asked for, none is written into
    for _ in range(2):
        np.testing.assert_array_equal(oracle.run(arrays)["y"], apart["y"])
    for name in inner:
        np.testing.assert_array_equal(Oracle(net, outputs=[name]).run(arrays)[name], apart[name], err_msg=name)
        np.testing.assert_array_equal(dict(oracle.stream(arrays, [name]))[name], apart[name], err_msg=name)
    np.testing.assert_array_equal(arrays["x"], before)
    for name, array in weights.items():
        np.testing.assert_array_equal(net.graph.initializers[name].const_value.numpy(), array)
