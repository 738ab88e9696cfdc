"""Recalibration in lockstep against an oracle that normalises all data as one batch, in float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from cases.builder import Net
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from bnfold.api import fuse, recalibrate
from bnfold.errors import DataError, DeviceError, ModelError, NothingToDoError, UnsupportedError, UsageError

Feeds = dict[str, np.ndarray]
Statistics = dict[str, tuple[np.ndarray, np.ndarray]]


def oracle(model: onnx.ModelProto, data: Feeds) -> Statistics:
    """Mean and variance of each BatchNorm's input, by the name of its output: everything in float64, all data as one batch."""
    found: Statistics = {}

    class BatchNormalization(OpRun):
        op_domain = ""

        def _run(self, x: np.ndarray, scale: np.ndarray, bias: np.ndarray, *_: np.ndarray, epsilon: float = 1e-5, **__: Any) -> tuple[Any]:
            axes = tuple(range(1)) if scale.ndim > 1 else tuple(i for i in range(x.ndim) if i != 1)
            shape = scale.shape if scale.ndim > 1 else (-1, *(1,) * (x.ndim - 2))
            mean, var = x.mean(axes), x.var(axes)
            found[self.onnx_node.output[0]] = mean, var
            gain = scale / np.sqrt(var + (epsilon or 1e-5))
            return ((x - mean.reshape(shape)) * gain.reshape(shape) + bias.reshape(shape),)

    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    for tensor in wide.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    floats = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in data.items()}
    ReferenceEvaluator(wide, new_ops=[BatchNormalization]).run(None, floats)
    return found


def stored(model: ir.Model) -> Statistics:
    """Mean and variance that each BatchNorm holds, by the name of its output."""
    found = {}
    for node in model.graph:
        if node.op_type == "BatchNormalization":
            pair = [ir.convenience.get_const_tensor(value) for value in node.inputs[3:5]]
            found[node.outputs[0].name] = tuple(t.numpy().astype(np.float64) for t in pair)
    return found


def cut(data: Feeds, size: int) -> list[Feeds]:
    count = len(next(iter(data.values())))
    return [{k: v[i : i + size] for k, v in data.items()} for i in range(0, count, size)]


def agree(found: Statistics, wanted: Statistics, rtol: float) -> None:
    assert found.keys() == wanted.keys()
    for name, (mean, var) in wanted.items():
        np.testing.assert_allclose(found[name][0], mean, rtol=rtol, atol=rtol * float(np.sqrt(var.max())), err_msg=f"mean of {name}")
        np.testing.assert_allclose(found[name][1], var, rtol=rtol, atol=rtol * 1e-3, err_msg=f"variance of {name}")


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.5, 1.5, shape).astype(dtype)


def residual(net: Net) -> Feeds:
    x = net.relu(net.bn(net.conv(net.input("N", 3, 10, 10), 3, 6, pads=1), 6))
    for cin, cout, stride in ((6, 6, 1), (6, 8, 2), (8, 8, 1)):
        y = net.relu(net.bn(net.conv(x, cin, cout, pads=1, strides=[stride] * 2), cout))
        y = net.bn(net.conv(y, cout, cout, pads=1), cout)
        skip = x if cin == cout else net.bn(net.conv(x, cin, cout, 1, strides=[stride] * 2), cout)
        x = net.relu(net.op("Add", y, skip))
    net.output(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", x)), 8, 4))
    return {"x": normal(7, 3, 10, 10)}


def depthwise(net: Net) -> Feeds:
    x = net.bn(net.conv(net.input("N", 4, 9, 9), 4, 8, 1), 8)
    x = net.bn(net.conv(net.op("Clip", x, net.scalar(0), net.scalar(6)), 8, 8, groups=8, pads=1), 8)
    net.output(net.bn(net.conv(net.relu(x), 8, 4, 1), 4))
    return {"x": normal(7, 4, 9, 9)}


def dense(net: Net) -> Feeds:
    """A DenseNet's block: each layer reads all before it; then a pooling that is only needed at the end."""
    x, channels = net.conv(net.input("N", 3, 8, 8), 3, 4, pads=1), 4
    early = net.op("GlobalAveragePool", x)
    for _ in range(3):
        y = net.conv(net.relu(net.bn(x, channels)), channels, 3, pads=1)
        x, channels = net.op("Concat", x, y, axis=1), channels + 3
    x = net.op("Concat", net.op("GlobalAveragePool", net.relu(net.bn(x, channels))), early, axis=1)
    net.output(net.bn(net.gemm(net.op("Flatten", x), channels + 4, 5), 5))
    return {"x": normal(7, 3, 8, 8)}


def on_the_input(net: Net) -> Feeds:
    net.output(net.bn(net.conv(net.bn(net.input("N", 3, 6, 6), 3), 3, 4), 4))
    return {"x": normal(7, 3, 6, 6)}


def two_inputs(net: Net) -> Feeds:
    a = net.bn(net.gemm(net.input("N", 5, name="a"), 5, 4), 4)
    b = net.bn(net.gemm(net.input("N", 3, name="b"), 3, 4), 4)
    net.output(net.bn(net.op("Mul", net.relu(a), b), 4))
    return {"a": normal(9, 5), "b": normal(9, 3, seed=1)}


def late_input(net: Net) -> Feeds:
    """The second input is read only behind the second BatchNorm."""
    x = net.bn(net.conv(net.relu(net.bn(net.input("N", 2, 5, name="a"), 2)), 2, 3, dims=1, pads=1), 3)
    net.output(net.bn(net.op("Concat", net.relu(x), net.input("N", 2, 5, name="b"), axis=1), 5))
    return {"a": normal(9, 2, 5), "b": normal(9, 2, 5, seed=1)}


def embedding(net: Net) -> Feeds:
    words = net.op("Gather", net.matrix(11, 6), net.input("N", 4, name="words", dtype=np.int64), axis=0)
    net.output(net.bn(net.gemm(net.relu(net.bn(net.reshape(words, 0, -1), 24)), 24, 5), 5))
    return {"words": np.random.default_rng(0).integers(0, 11, (9, 4))}


def shapes_in_the_graph(net: Net) -> Feeds:
    """A Reshape whose target is computed from the input's shape, far behind."""
    x = net.input("N", 4, 6)
    size = net.op("Gather", net.op("Shape", x), net.ints(0), axis=0)
    y = net.relu(net.bn(net.conv(net.relu(net.bn(x, 4)), 4, 4, dims=1, pads=1), 4))
    net.output(net.bn(net.op("Reshape", y, net.op("Concat", size, net.ints(24), axis=0)), 24))
    return {"x": normal(9, 4, 6)}


def volumes(net: Net) -> Feeds:
    x = net.relu(net.bn(net.conv(net.input("N", 2, 5, 5, 5), 2, 3, dims=3), 3))
    net.output(net.bn(net.conv_transpose(x, 3, 4, dims=3), 4))
    return {"x": normal(5, 2, 5, 5, 5)}


def sequences(net: Net) -> Feeds:
    """A part of a sequence waits until the BatchNorm behind another part is measured."""
    halves = net.op("SplitToSequence", net.op("Sigmoid", net.conv(net.input("N", 3, 6, 6), 3, 6)), net.ints(2, 4), axis=1)
    first, second = (net.op("SequenceAt", halves, net.constant(np.array(i, np.int64))) for i in (0, -1))
    first = net.relu(net.bn(first, 2))
    net.output(net.bn(net.op("ConcatFromSequence", net.op("SequenceConstruct", first, net.op("Neg", second)), axis=1), 6))
    return {"x": normal(9, 3, 6, 6)}


NETWORKS: list[Callable[[Net], Feeds]] = [
    residual, depthwise, dense, on_the_input, two_inputs, late_input, embedding, shapes_in_the_graph, volumes, sequences,
]  # fmt: skip


def build(draw: Callable[[Net], Feeds], **options: Any) -> tuple[onnx.ModelProto, Feeds]:
    net = Net(draw.__name__, **options)
    data = draw(net)
    return net.model(), data


@pytest.mark.parametrize("draw", NETWORKS)
@pytest.mark.parametrize(("size", "budget"), [(100, 1 << 30), (3, 1 << 30), (1, 0)], ids=["whole", "threes spill none", "ones spill all"])
def test_equals_one_batch_of_all(draw: Callable[[Net], Feeds], size: int, budget: int) -> None:
    proto, data = build(draw)
    model = ir.from_proto(proto)
    before = ir.to_proto(model).SerializeToString()
    fresh, report = recalibrate(model, cut(data, size), memory_budget=budget)
    wanted = oracle(proto, data)
    agree(stored(fresh), wanted, 2e-6)
    assert ir.to_proto(model).SerializeToString() == before
    assert len(report.layers) == len(wanted)
    assert report.samples == len(next(iter(data.values())))
    assert report.spilled_bytes == 0 if budget else report.spilled_bytes >= report.held_bytes > 0


def perceptron(net: Net) -> Feeds:
    """What ONNX Runtime has float64 kernels for."""
    x = net.relu(net.bn(net.gemm(net.input("N", 6), 6, 8), 8))
    y = net.bn(net.op("MatMul", net.relu(net.bn(net.op("MatMul", x, net.matrix(8, 8)), 8)), net.matrix(8, 8)), 8)
    net.output(net.bn(net.op("Add", x, y), 8))
    return {"x": normal(23, 6, dtype=net.dtype)}


def test_float64_agrees_to_its_own_rounding_whatever_the_cut_and_order() -> None:
    proto, data = build(perceptron, dtype="float64")
    wanted = oracle(proto, data)
    for size in (1, 3, 23):
        for order in (slice(None), slice(None, None, -1)):
            fresh, _ = recalibrate(ir.from_proto(proto), cut({"x": data["x"][order]}, size))
            agree(stored(fresh), wanted, 1e-12)


def test_batches_of_one_class_after_another() -> None:
    """Means between batches count as well: tools that average each batch's variance give 1.01 for a true 22.3."""
    net = Net("classes")
    net.output(net.bn(net.bn(net.input("N", 2), 2), 2))
    proto = net.model()
    x = np.repeat(np.arange(5.0) * 3, 40)[:, None] + np.random.default_rng(0).normal(size=(200, 2))
    data = {"x": x.astype(np.float32)}
    fresh, _ = recalibrate(ir.from_proto(proto), cut(data, 40))
    wanted = oracle(proto, data)
    assert wanted["batchnormalization_0"][1][0] > 15
    agree(stored(fresh), wanted, 1e-6)


def test_a_large_mean_and_a_small_deviation() -> None:
    net = Net("offset")
    net.output(net.bn(net.input("N", 2, 8), 2))
    proto = net.model()
    data = {"x": (1e4 + np.random.default_rng(0).normal(size=(64, 2, 8))).astype(np.float32)}
    fresh, _ = recalibrate(ir.from_proto(proto), cut(data, 8))
    agree(stored(fresh), oracle(proto, data), 1e-7)


def test_images_of_different_sizes() -> None:
    net = Net("sizes")
    net.output(net.bn(net.input("N", 2, "H", "W"), 2))
    batches = [{"x": normal(2, 2, 4 + i, 9 - i, seed=i)} for i in range(4)]
    fresh, report = recalibrate(ir.from_proto(net.model()), batches)
    pixels = np.concatenate([b["x"].astype(np.float64).transpose(1, 0, 2, 3).reshape(2, -1) for b in batches], 1)
    ((mean, var),) = stored(fresh).values()
    np.testing.assert_allclose(mean, pixels.mean(1), rtol=1e-6)
    np.testing.assert_allclose(var, pixels.var(1), rtol=1e-6)
    assert report.layers[0].count == pixels.shape[1]
    assert report.samples == 8


def test_a_batch_size_fixed_at_one() -> None:
    net = Net("fixed")
    net.output(net.bn(net.relu(net.bn(net.conv(net.input(1, 2, 6, 6), 2, 3), 3)), 3))
    proto, data = net.model(), {"x": normal(6, 2, 6, 6)}
    fresh, _ = recalibrate(ir.from_proto(proto), cut(data, 1))
    agree(stored(fresh), oracle(proto, data), 2e-6)
    again, _ = recalibrate(ir.from_proto(proto), cut(data, 3))  # cut into batches of one
    agree(stored(again), stored(fresh), 0)


@pytest.mark.parametrize("opset", [7, 8])
def test_spatial_0_has_a_channel_per_element(opset: int) -> None:
    net = Net("spatial", opset=opset)
    net.output(net.bn(net.relu(net.bn(net.input("N", 3, 4, 5), (3, 4, 5), spatial=0)), 3))
    proto, data = net.model(), {"x": normal(9, 3, 4, 5)}
    fresh, report = recalibrate(ir.from_proto(proto), cut(data, 4))
    agree(stored(fresh), oracle(proto, data), 2e-6)
    assert [layer.count for layer in report.layers] == [9, 180]


def test_spatial_0_with_one_parameter_per_channel_is_spatial_1() -> None:
    net = Net("malformed", opset=7)
    net.output(net.bn(net.relu(net.bn(net.input("N", 3, 4, 5), 3, spatial=0)), 3))
    proto, data = net.model(), {"x": normal(9, 3, 4, 5)}
    agree(stored(recalibrate(ir.from_proto(proto), cut(data, 4))[0]), oracle(proto, data), 2e-6)


def test_opset_6() -> None:
    net = Net("six", opset=6)
    net.output(net.bn(net.relu(net.bn(net.conv(net.input("N", 2, 6, 6), 2, 3), 3)), 3))
    proto, data = net.model(), {"x": normal(5, 2, 6, 6)}
    fresh, report = recalibrate(ir.from_proto(proto), cut(data, 2))
    agree(stored(fresh), oracle(proto, data), 2e-6)
    assert fresh.opset_imports == {"": 6}
    assert report.notes == (
        "2 of 2 stages ran in the float64 reference evaluator, which is slow, since ONNX Runtime lacks a kernel on cpu: "
        "there are none below opset 7",
    )
    assert [v.name for v in fresh.graph.inputs] == [i.name for i in proto.graph.input]  # IR 3: the parameters are among them


@pytest.mark.parametrize(("statistics", "rtol"), [("float16", 3e-3), ("float32", 3e-3)])
def test_half_precision(statistics: str, rtol: float) -> None:
    net = Net("half", dtype="float16", statistics=statistics)
    net.output(net.bn(net.relu(net.bn(net.conv(net.input("N", 2, 6, 6), 2, 3), 3)), 3))
    proto, data = net.model(), {"x": normal(8, 2, 6, 6, dtype=np.float16)}
    fresh, _ = recalibrate(ir.from_proto(proto), cut(data, 3), memory_budget=0)
    agree(stored(fresh), oracle(proto, data), rtol)
    kinds = {node.inputs[4].const_value.dtype.name for node in fresh.graph if node.op_type == "BatchNormalization"}
    assert kinds == {statistics.upper().replace("FLOAT32", "FLOAT")}


def test_bfloat16_passes_through_the_frontier() -> None:
    """Its values come in, wait (on disk too) and go on by their bits; ONNX Runtime's CPU provider has no BatchNormalization for it."""
    net = Net("bfloat16")
    x = net.op("Cast", net.input("N", 3, dtype=ml_dtypes.bfloat16), to=onnx.TensorProto.FLOAT)
    y = net.op("Cast", net.bn(x, 3), to=onnx.TensorProto.BFLOAT16)  # read in two stages, so that it waits once
    z = net.bn(net.relu(net.op("Cast", y, to=onnx.TensorProto.FLOAT)), 3)
    net.output(net.bn(net.op("Add", z, net.op("Cast", y, to=onnx.TensorProto.FLOAT)), 3))
    model, x0 = ir.from_proto(net.model()), normal(20, 3, dtype=ml_dtypes.bfloat16)
    whole, _ = recalibrate(model, [{"x": x0}])
    parts, report = recalibrate(model, cut({"x": x0}, 6), memory_budget=0)
    agree(stored(parts), stored(whole), 1e-6)
    assert report.spilled_bytes > 0
    np.testing.assert_allclose(next(iter(stored(parts).values()))[0], x0.astype(np.float64).mean(0), rtol=1e-6)


@pytest.mark.parametrize("draw", [volumes, residual])
def test_a_type_without_kernels_runs_in_the_reference_evaluator(draw: Callable[[Net], Feeds]) -> None:
    """ONNX Runtime's CPU provider has no float64 convolution."""
    proto, data = build(draw, dtype="float64")
    data = {k: v.astype(np.float64) for k, v in data.items()}
    fresh, report = recalibrate(ir.from_proto(proto), cut(data, 3), memory_budget=0)
    agree(stored(fresh), oracle(proto, data), 1e-12)
    (note,) = report.notes
    assert "ran in the float64 reference evaluator, which is slow, since ONNX Runtime lacks a kernel on cpu: Could not find" in note


def test_a_kernel_that_gives_up_when_it_runs() -> None:
    """ONNX Runtime takes a GRU in float64, and then refuses to run it."""
    net = Net("recurrent", dtype="float64")
    x = net.op("GRU", net.transpose(net.bn(net.input("N", 3, 4), 3), 2, 0, 1), net.matrix(1, 6, 3), net.matrix(1, 6, 2), hidden_size=2)
    net.output(net.bn(net.transpose(net.squeeze(x, 1), 1, 2, 0), 2))
    proto, data = net.model(), {"x": normal(9, 3, 4, dtype=np.float64)}
    whole, report = recalibrate(ir.from_proto(proto), [data])
    parts, _ = recalibrate(ir.from_proto(proto), cut(data, 4))
    assert report.notes[0].startswith("1 of 2 stages ran in the float64 reference evaluator")
    agree(stored(parts), stored(whole), 1e-12)


def test_bfloat16_convolutions_too() -> None:
    proto, data = build(residual, dtype="bfloat16", opset=22)
    data = {k: v.astype(ml_dtypes.bfloat16) for k, v in data.items()}
    wide, _ = build(residual, dtype="float64", opset=22)
    fresh, _ = recalibrate(ir.from_proto(proto), cut(data, 3), memory_budget=0)
    agree(stored(fresh), oracle(wide, data | {"x": data["x"].astype(np.float64)}), 5e-2)


def test_nodes_of_one_name() -> None:
    net = Net("namesakes")
    net.output(net.bn(net.relu(net.op("Abs", net.bn(net.input("N", 3), 3))), 3))
    proto = net.model()
    for node in proto.graph.node:
        node.name = "node"
    data = {"x": normal(9, 3)}
    agree(stored(recalibrate(ir.from_proto(proto), cut(data, 4))[0]), oracle(proto, data), 2e-6)


@pytest.mark.parametrize("epsilon", [0.0, -0.5])
def test_statistics_that_leave_no_root_are_refused(epsilon) -> None:
    net = Net("rootless")
    net.output(net.bn(net.input("N", 2), 2, epsilon=epsilon))
    constant = np.stack([normal(9) * 3, np.ones(9, np.float32)], 1)
    _, report = recalibrate(ir.from_proto(net.model()), [{"x": constant}])
    why = f"its new variance of channel 1 is 0, and with its epsilon of {epsilon:g} not above 0"
    assert f"BatchNormalization_node_0 keeps its statistics: {why}" in report.notes


@pytest.mark.parametrize("epsilon", [np.nan, np.inf])
def test_an_epsilon_that_is_no_number_is_refused(epsilon) -> None:
    net = Net("nan")
    net.output(net.bn(net.input("N", 2), 2, epsilon=epsilon))
    with pytest.raises(ModelError, match=f"the epsilon of BatchNormalization_node_0 is {epsilon}, so it gives no numbers"):
        recalibrate(ir.from_proto(net.model()), [{"x": normal(9, 2)}])


def test_statistics_that_overflow_their_type_are_refused() -> None:
    net = Net("overflow", dtype="float16")
    net.output(net.bn(net.input("N", 2), 2))
    model = ir.from_proto(net.model())
    fresh, report = recalibrate(model, [{"x": np.array([[1, 2], [3, 60000], [2, -60000]], np.float16)}])
    assert report.notes[0] == (
        "BatchNormalization_node_0 keeps its statistics: its new variance of channel 1 is 2.4e+09, more than float16 can hold"
    )
    assert report.notes[1].startswith("the data don't look normalised as this network's were: at BatchNormalization_node_0")
    assert (report.layers[0].mean_shift, report.layers[0].var_ratio) == (0, 1)
    agree(stored(fresh), stored(model), 0)


# --- layers that are called several times, and parameters that are shared -------------------------------------------------------


def test_a_layer_called_side_by_side_is_pooled_before_it_normalises() -> None:
    """One branch is deeper than the other; both calls are still measured together."""
    net = Net("siamese")
    shared, filters = net.bn_params(3), net.filters(3, 2, 3, 3)
    a = net.bn(net.conv(net.input("N", 2, 6, 6, name="a"), 2, 3, weight=filters, bias=False), params=shared)
    b = net.bn(net.input("N", 2, 6, 6, name="b"), 2)
    b = net.bn(net.conv(b, 2, 3, weight=filters, bias=False), params=shared)
    net.output(net.bn(net.op("Sub", a, net.relu(b)), 3))
    proto, data = net.model(), {"a": normal(9, 2, 6, 6), "b": normal(9, 2, 6, 6, seed=1) * 2}
    fresh, report = recalibrate(ir.from_proto(proto), cut(data, 2))
    assert [layer.count for layer in report.layers] == [2 * 9 * 16, 9 * 36, 9 * 16]
    assert report.notes == ()

    weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in proto.graph.initializer}

    def convolved(x: np.ndarray) -> np.ndarray:
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
        return np.einsum("nchwij,ocij->nohw", windows, weights[filters])

    def normalised(x: np.ndarray, mean: np.ndarray, var: np.ndarray, names: list[str]) -> np.ndarray:
        gain = weights[names[0]] / np.sqrt(var + np.float32(1e-2))
        return (x - mean[:, None, None]) * gain[:, None, None] + weights[names[1]][:, None, None]

    inputs = {k: v.astype(np.float64) for k, v in data.items()}
    nodes = [node for node in proto.graph.node if node.op_type == "BatchNormalization"]
    first = inputs["b"].mean((0, 2, 3)), inputs["b"].var((0, 2, 3))
    xa = convolved(inputs["a"])
    xb = convolved(normalised(inputs["b"], *first, list(nodes[1].input[1:3])))
    both = np.concatenate([xa, xb])
    second = both.mean((0, 2, 3)), both.var((0, 2, 3))
    last = normalised(xa, *second, shared) - np.maximum(normalised(xb, *second, shared), 0)
    wanted = [second, first, second, (last.mean((0, 2, 3)), last.var((0, 2, 3)))]
    agree(stored(fresh), {node.output[0]: pair for node, pair in zip(nodes, wanted, strict=True)}, 2e-6)


def test_a_layer_that_feeds_itself() -> None:
    """Its statistics are those of all calls; on the way each call has those of the calls up to it."""
    net = Net("recurrent", dtype="float64")
    shared, w = net.bn_params(4), net.matrix(4, 4)
    x = net.bn(net.op("MatMul", net.input("N", 4), w), params=shared)
    x = net.bn(net.op("MatMul", net.relu(x), w), params=shared)
    net.output(net.bn(net.op("MatMul", net.relu(x), w), 4))
    proto, x0 = net.model(), normal(30, 4, dtype=np.float64)
    fresh, report = recalibrate(ir.from_proto(proto), cut({"x": x0}, 7))
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}

    def normalised(x: np.ndarray, data: np.ndarray) -> np.ndarray:
        gain = weights[shared[0]] / np.sqrt(data.var(0) + np.float32(1e-2))
        return (x - data.mean(0)) * gain + weights[shared[1]]

    one = x0 @ weights[w]
    two = np.maximum(normalised(one, one), 0) @ weights[w]
    both = np.concatenate([one, two])
    three = np.maximum(normalised(two, both), 0) @ weights[w]
    found = list(stored(fresh).values())
    for (mean, var), data in zip(found, (both, both, three), strict=True):
        np.testing.assert_allclose(mean, data.mean(0), rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(var, data.var(0), rtol=1e-12)
    assert report.layers[0].count == 60
    assert report.notes == (
        "BatchNormalization_node_0 is called several times, and one call depends on another: its statistics are those of all calls, "
        "and each call was normalised with those of the calls up to it",
    )


def test_two_layers_that_wait_for_each_other() -> None:
    net = Net("crossed")
    first, second = net.bn_params(3), net.bn_params(3)
    a = net.bn(net.relu(net.bn(net.input("N", 3, name="a"), params=first)), params=second)
    b = net.bn(net.relu(net.bn(net.input("N", 3, name="b"), params=second)), params=first)
    net.output(net.op("Add", a, b))
    _, report = recalibrate(ir.from_proto(net.model()), cut({"a": normal(8, 3), "b": normal(8, 3, seed=1)}, 3))
    assert [layer.count for layer in report.layers] == [16, 16]


@pytest.mark.parametrize("shared", ["variance", "mean with beta", "everything, by deduplication"])
def test_layers_that_only_share_a_tensor_part_ways(shared: str) -> None:
    net = Net("partly")
    x = net.input("N", 4)
    one, two = net.bn_params(4), net.bn_params(4)
    if shared == "variance":
        two[3] = one[3]
    elif shared == "mean with beta":
        two[2] = one[1]
    else:
        ones, zeros = net.weight(np.ones(4)), net.weight(np.zeros(4))
        one = two = [ones, zeros, zeros, ones]
    net.output(net.bn(net.relu(net.gemm(net.bn(x, params=one), 4, 4)), params=two))
    proto, data = net.model(), {"x": normal(12, 4)}
    fresh, report = recalibrate(ir.from_proto(proto), cut(data, 5))
    agree(stored(fresh), oracle(proto, data), 2e-6)
    assert [layer.count for layer in report.layers] == [12, 12]
    made = {t.name: t for t in ir.to_proto(fresh).graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "BatchNormalization":  # gamma and beta are as they were
            for name in node.input[1:3]:
                old = next(t for t in proto.graph.initializer if t.name == name)
                np.testing.assert_array_equal(numpy_helper.to_array(made[name]), numpy_helper.to_array(old))
    onnx.checker.check_model(ir.to_proto(fresh), full_check=True)


@pytest.mark.parametrize("hold", ["constant", "identity"])
@pytest.mark.parametrize("ir_version", [3, 8])
def test_parameters_in_constant_nodes_or_behind_identity(hold: str, ir_version: int) -> None:
    net = Net("held", opset=8 if ir_version == 3 else 17, ir=ir_version)
    net.hold = hold
    net.output(net.bn(net.relu(net.bn(net.input("N", 3), 3)), 3))
    proto, data = net.model(), {"x": normal(9, 3)}
    fresh, _ = recalibrate(ir.from_proto(proto), cut(data, 4))
    agree(stored(fresh), oracle(proto, data), 2e-6)
    onnx.checker.check_model(ir.to_proto(fresh), full_check=True)


def test_names_interface_and_metadata_stay() -> None:
    net = Net("kept", ir=9)
    net.metadata = {"author": "someone"}
    net.output(net.bn(net.conv(net.input("N", 2, 5, 5), 2, 3), 3))
    proto = net.model()
    model = ir.from_proto(proto)
    fresh = ir.to_proto(recalibrate(model, [{"x": normal(4, 2, 5, 5)}])[0])
    plain = ir.to_proto(model)
    for a, b in zip(plain.graph.initializer, fresh.graph.initializer, strict=True):
        assert a.name == b.name
        same = np.array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))
        assert same == (not a.name.startswith(("mean", "var")))
    for some in (plain, fresh):
        del some.graph.initializer[:]
    assert plain == fresh


# --- what can't be measured -----------------------------------------------------------------------------------------------------


def test_parameters_that_the_caller_may_override_stay() -> None:
    net = Net("override")
    net.hold = "overridable"
    x = net.bn(net.input("N", 3), 3)
    net.hold = "initializer"
    net.output(net.bn(net.relu(x), 3))
    model = ir.from_proto(net.model())
    fresh, report = recalibrate(model, [{"x": normal(9, 3)}])
    assert report.notes == (
        "BatchNormalization_node_0 keeps its statistics: its mean may be overridden by the caller (it is also an input of the model)",
    )
    assert [layer.name for layer in report.layers] == ["BatchNormalization_node_1"]
    first, second = stored(model).keys()
    agree({first: stored(fresh)[first]}, {first: stored(model)[first]}, 0)
    assert not np.allclose(stored(fresh)[second][0], stored(model)[second][0])


def test_training_mode_stays() -> None:
    net = Net("training")
    x = net.ops("BatchNormalization", net.input("N", 3), *net.bn_params(3), outputs=3, training_mode=1)[0]
    net.output(net.bn(x, 3))
    _, report = recalibrate(ir.from_proto(net.model()), [{"x": normal(9, 3)}])
    assert report.notes == (
        "BatchNormalization_node_0 keeps its statistics: it is in training mode: it normalises each batch by itself "
        "(--freeze gives it statistics of its own)",
    )
    assert [layer.name for layer in report.layers] == ["BatchNormalization_node_1"]


def test_a_control_flow_body_keeps_its_statistics_and_runs() -> None:
    net = Net("branches")
    x = net.relu(net.bn(net.input("N", 3), 3))
    bodies = []
    for name in ("then", "else"):
        child = net.child(name)
        child.output(child.bn(x, 3))
        bodies.append(child.graph(name))
    flag = net.input(name="flag", dtype=np.bool_)
    y = net.op("If", flag, then_branch=bodies[0], else_branch=bodies[1])
    net.output(net.bn(net.gemm(y, 3, 4), 4))
    batches = [{"x": normal(5, 3, seed=i), "flag": np.array(True)} for i in range(3)]
    _, report = recalibrate(ir.from_proto(net.model()), batches)
    assert len(report.layers) == 2
    assert report.layers[1].count == 15
    assert sum("inside the body of If If_node_0, which runs as a whole" in note for note in report.notes) == 2


def test_a_local_function_is_measured_inside() -> None:
    net = Net("function")
    body = net.child("body")
    body.hold = "constant"
    y = body.bn("inner", 3)
    net.function("block", ["inner"], [y], body)
    x = net.op("block", net.input("N", 3), domain="local")
    net.output(net.bn(net.gemm(x, 3, 4), 4))
    _, report = recalibrate(ir.from_proto(net.model()), [{"x": normal(9, 3)}])
    assert [layer.count for layer in report.layers] == [9, 9]


def test_every_node_is_counted() -> None:
    """In a body, in a function that is called, and in one that isn't; one of constants whose value is an output."""
    net = Net("all")
    x = net.input("N", 3)
    for name in ("called", "idle"):
        body = net.child(name)
        body.hold = "constant"
        net.function(name, ["inner"], [body.bn("inner", 3)], body)
    child = net.child("item")
    child.inputs = [onnx.helper.make_tensor_value_info("row", onnx.TensorProto.FLOAT, ["N", 3])]
    child.hold = "constant"
    child.output(child.bn("row", 3))
    rows = net.op("SequenceMap", net.op("SequenceConstruct", x, x), body=child.graph("item"))
    net.output(net.op("ConcatFromSequence", rows, axis=0), net.op("called", x, domain="local"), shape=("N", 3))
    net.output(net.bn(net.weight(normal(2, 3), "constant"), 3))
    model = net.model()
    _, report = fuse(model)
    reasons = [layer.reason for layer in report.layers]
    assert (report.batchnorms.before, report.batchnorms.after) == (4, 4)
    assert "it stands in the function idle, which nothing calls" in reasons
    assert "it normalises constants alone, but its output can't be put in its place" in reasons
    _, measured = recalibrate(ir.from_proto(model), [{"x": normal(9, 3)}])
    assert [layer.count for layer in measured.layers] == [9]
    assert len(measured.notes) == 3


def test_a_local_function_without_a_batchnorm_stays() -> None:
    net = Net("plain function")
    body = net.child("body")
    net.function("block", ["inner"], [body.relu("inner")], body)
    net.output(net.bn(net.op("block", net.bn(net.input("N", 3), 3), domain="local"), 3))
    fresh, report = recalibrate(ir.from_proto(net.model()), cut({"x": normal(9, 3)}, 4))
    assert [layer.count for layer in report.layers] == [9, 9]
    assert len(fresh.functions) == 1


def test_a_branch_that_no_data_reach_keeps_its_statistics() -> None:
    net = Net("empty")
    x = net.input("N", 3)
    net.output(net.bn(x, 3), net.bn(net.slice(x, 0, 0, 0), 3))
    model = ir.from_proto(net.model())
    fresh, report = recalibrate(model, cut({"x": normal(9, 3)}, 4))
    assert [layer.count for layer in report.layers] == [9, 0]
    assert report.notes == ("BatchNormalization_node_1 keeps its statistics: no data reach it",)
    assert report.to_dict()["layers"][1]["stderr"] is None
    second = list(stored(model))[1]
    agree({second: stored(fresh)[second]}, {second: stored(model)[second]}, 0)


def test_one_value_per_channel_has_no_variance() -> None:
    net = Net("one")
    net.output(net.bn(net.input("N", 3), 3))
    _, report = recalibrate(ir.from_proto(net.model()), [{"x": normal(1, 3)}])
    assert report.notes == (
        "BatchNormalization_node_0 keeps its statistics: the data bring one value per channel, which has no variance; give more samples",
    )


def test_nothing_to_do() -> None:
    net = Net("none")
    net.output(net.relu(net.input("N", 3)))
    with pytest.raises(NothingToDoError, match=r"there are no statistics to measure: the model holds no BatchNorm\. Exporters"):
        recalibrate(ir.from_proto(net.model()), [{"x": normal(1, 3)}])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite(bad: float) -> None:
    net = Net("nan")
    net.output(net.bn(net.relu(net.bn(net.input("N", 3), 3)), 3))
    x = normal(9, 3)
    x[7, 2] = bad
    with pytest.raises(DataError, match=r"batch 3 of .*: input 'x', sample 1, holds NaN or infinity; clean the data"):
        recalibrate(ir.from_proto(net.model()), cut({"x": x}, 3))


def test_activations_that_overflow_on_the_way() -> None:
    net = Net("overflow")
    net.output(net.bn(net.op("Exp", net.bn(net.input("N", 3), 3)), 3))
    x = normal(9, 3)
    x[7, 2] = 1e9
    x[:, 2] *= 1e3
    text = r"micro-batch 1 brings NaN, infinity or an overflow to channel 2 of BatchNormalization_node_1: look at these samples"
    with pytest.raises(DataError, match=text):
        recalibrate(ir.from_proto(net.model()), [{"x": x}], layers=["*_1"])


def test_no_data() -> None:
    proto, _ = build(on_the_input)
    with pytest.raises(DataError, match="there are no samples; give at least one"):
        recalibrate(ir.from_proto(proto), [])


def test_data_that_do_not_fit() -> None:
    proto, _ = build(on_the_input)
    with pytest.raises(DataError, match="no array for input 'x'"):
        recalibrate(ir.from_proto(proto), [{"a": normal(2, 3, 6, 6), "b": normal(2, 3, 6, 6)}])


def test_an_operator_that_nobody_has() -> None:
    net = Net("custom")
    net.output(net.bn(net.op("Mystery", net.input("N", 3), domain="local"), 3))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    model = helper.make_model(net.graph(), opset_imports=opsets, ir_version=8)
    with pytest.raises(UnsupportedError, match=r"ONNX Runtime can't run this model on cpu: .*Mystery"):
        recalibrate(ir.from_proto(model), [{"x": normal(2, 3)}])


def test_a_provider_that_is_not_there() -> None:
    proto, data = build(on_the_input)
    with pytest.raises(DeviceError, match="cuda"):
        recalibrate(ir.from_proto(proto), [data], provider="cuda")
    with pytest.raises(UsageError, match="no execution provider is called 'abacus'"):
        recalibrate(ir.from_proto(proto), [data], provider="abacus")


# --- cost -----------------------------------------------------------------------------------------------------------------------


def test_data_are_read_once_and_a_buffer_may_be_used_again() -> None:
    proto, data = build(late_input)
    passes = 0

    def batches() -> Iterator[Feeds]:
        nonlocal passes
        passes += 1
        buffer = {k: np.empty((3, *v.shape[1:]), v.dtype) for k, v in data.items()}
        for part in cut(data, 3):
            for name, array in part.items():
                buffer[name][...] = array
            yield buffer

    fresh, _ = recalibrate(ir.from_proto(proto), batches())
    agree(stored(fresh), oracle(proto, data), 2e-6)
    assert passes == 1


def test_operators_run_once_but_for_cheap_ones_and_none_behind_the_last_batchnorm(staged: list[str]) -> None:
    proto, data = build(residual)
    recalibrate(ir.from_proto(proto), cut(data, 3))
    assert [name for name in dict.fromkeys(staged) if staged.count(name) != 1] == ["conv_0", "conv_1"], (
        "their inputs are small, or wait anyway"
    )
    assert staged.count("conv_0") == staged.count("conv_1") == 2
    assert not {"gemm_0", "flatten_0", "globalaveragepool_0"} & set(staged)


def test_what_is_held_is_the_frontier_alone() -> None:
    """A chain holds one value per micro-batch: the input of one BatchNorm; a value that is pooled early is held small."""
    net = Net("chain")
    x = net.conv(net.input("N", 2, 16, 16), 2, 4, pads=1)
    for _ in range(4):
        x = net.conv(net.relu(net.bn(x, 4)), 4, 4, pads=1)
    net.output(net.bn(x, 4))
    _, report = recalibrate(ir.from_proto(net.model()), cut({"x": normal(8, 2, 16, 16)}, 2))
    one = 2 * 4 * 16 * 16 * 4
    assert report.held_bytes == 4 * one


def test_nothing_is_left_on_disk(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    proto, data = build(residual)

    def interrupted(stage: str, done: int, total: int | None) -> None:
        assert stage == "recalibrate"
        if total is not None:
            assert done <= total
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recalibrate(ir.from_proto(proto), cut(data, 2), memory_budget=0, progress=interrupted)
    assert os.listdir(tmp_path) == []


def test_progress_counts_to_its_total() -> None:
    proto, data = build(on_the_input)
    said: list[tuple[int, int | None]] = []
    recalibrate(ir.from_proto(proto), cut(data, 3), progress=lambda _, done, total: said.append((done, total)))
    assert said == [(1, None), (2, None), (3, None), (4, 6), (5, 6), (6, 6)]


def test_the_report_gives_the_worst_channel() -> None:
    net = Net("figures")
    params = [net.weight(np.array(v)) for v in ([1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [1.0, 4.0])]
    net.output(net.bn(net.input("N", 2), params=params))
    x = np.array([[1, 3], [3, 5], [1, 3], [3, 5]], np.float32)  # means 2 and 4, variances 1 and 1
    _, report = recalibrate(ir.from_proto(net.model()), [{"x": x}])
    (layer,) = report.layers
    assert (layer.count, layer.mean_shift, layer.var_ratio) == (4, 2.0, 0.25)
    assert layer.stderr == pytest.approx((1 / 3) ** 0.5)
    assert report.method == "exact"
