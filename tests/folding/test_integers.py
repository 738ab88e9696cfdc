"""Shapes that an exporter computes are known at every probe, also where ONNX's own inference doesn't follow the computation."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from cases import ALL, Net
from compare import OTHER_SIZES, SIZES, batchnorms, difference, feeds, interface, run_double

import bnfold


def drawn(middle: str) -> onnx.ModelProto:
    """BatchNorm, average, a Reshape to (batch, 6) as torch.onnx.export writes it, Gemm."""
    net = Net("integers", dtype="float64", opset=18)
    x = net.input("N", 6, 5, 5)
    y = net.reduce("Mean", net.bn(net.op("Sigmoid", x), 6), 2, 3)
    batch = net.op("Shape", x, start=0, end=1)
    if middle == "squeezed":
        batch = net.reshape(net.op("Squeeze", batch), -1)
    elif middle == "gathered":
        batch = net.unsqueeze(net.op("Gather", net.op("Shape", x), net.constant(np.array(0, np.int64)), axis=0), 0)
    elif middle == "reckoned":
        two = net.ints(2)
        batch = net.op("Div", net.op("Mul", net.op("Add", net.op("Sub", batch, two), two), two), two)
    shape = net.op("Concat", batch, net.ints(6), axis=0)
    net.output(net.gemm(net.op("Reshape", y, shape, allowzero=1), 6, 4), shape=["N", 4])
    return net.model()


def test_a_computed_shape_lets_the_batchnorm_through() -> None:
    for middle in ("plain", "squeezed", "gathered", "reckoned"):
        model = drawn(middle)
        fused, report = bnfold.fuse(model, check=False)
        assert batchnorms(fused) == 0, (middle, [layer.reason for layer in report.layers])
        for n in (1, 3):
            data = feeds(model, {"N": n})
            assert difference(run_double(model, data), run_double(fused, data)) < 1e-12


def test_a_shape_that_the_data_decide_stays_open() -> None:
    net = Net("open", dtype="float64", opset=18)
    x, sizes = net.input("N", 6, 4), net.input(2, name="sizes", dtype=np.int64)
    net.output(net.gemm(net.op("Reshape", net.bn(net.op("Sigmoid", x), 6), sizes), 24, 4), shape=["N", 4])
    model = net.model()
    report = bnfold.inspect(model)
    assert report.batchnorms.after == 1


@pytest.mark.parametrize("size", [-1, -7, 0, "", "?", None])
def test_an_axis_without_a_size_is_open(size: int | str | None) -> None:
    """Old exporters write -1 for an open batch."""
    net = Net("open axis", opset=13)
    x, z = (net.input(size, 4, 8, 8, name=name) for name in "xz")
    net.output(net.relu(net.bn(net.conv(x, 4, 6), 6)), net.relu(z), shape=[size, 6, 6, 6])
    net.outputs[1].CopyFrom(onnx.helper.make_tensor_value_info(net.outputs[1].name, 1, [size, 4, 8, 8]))
    model = net.model()
    fused, report = bnfold.fuse(model)
    assert report.batchnorms.after == 0
    assert interface(fused) == interface(model)
    rng = np.random.default_rng(0)
    x5 = rng.standard_normal((5, 4, 8, 8)).astype(np.float32)
    assert bnfold.verify(model, fused, [{"x": x5, "z": x5}]).verdict == "equivalent"
    assert bnfold.verify(model, fused).verdict == "equivalent"
    fresh, measured = bnfold.recalibrate(model, [{"x": x5, "z": x5}])
    assert measured.samples == 5
    assert interface(fresh) == interface(model)


# --- ranks that operators tell ------------------------------------------------------------------------------------------------------


def without_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with no shape stated anywhere but in its weights."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    stored = {t.name for t in bare.graph.initializer}
    for info in (*bare.graph.input, *bare.graph.output):
        if info.name not in stored and info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    return bare


def decoder(net: Net, x: str) -> str:
    """What is upsampled joins what was kept; the rank comes from a convolution behind, far from the first BatchNorm."""
    x = net.op("InstanceNormalization", x, net.weight(net.normal(4)), net.weight(net.normal(4)))
    kept = net.relu(net.bn(net.op("Sigmoid", x), 4))
    low = net.op("MaxPool", net.conv(kept, 4, 6, dims=3, pads=1), kernel_shape=[2, 2, 2], strides=[2, 2, 2])
    up = net.op("Resize", low, "", net.constant(np.array([1, 1, 2, 2, 2], np.float32)), mode="nearest")
    y = net.op("Concat", net.conv(kept, 4, 3, dims=3, pads=1), net.conv(up, 6, 5, dims=3, pads=1), axis=1)
    return net.op("Add", net.bn(y, 8), net.bn(net.conv(y, 8, 8, dims=3, pads=1), 8))


def test_ranks_come_from_the_operators() -> None:
    net = Net("ranks", dtype="float64", opset=18)
    net.output(decoder(net, net.input("N", 4, "D", "H", "W")))
    model = net.model()
    fused, report = bnfold.fuse(without_shapes(model), check=False)
    kept = [layer.reason for layer in report.layers if layer.verdict == "kept"]
    assert len(kept) == 1, kept  # the one before a rectifier
    assert "scales are negative" in kept[0]
    data = feeds(model, {"N": 2, "D": 4, "H": 6, "W": 4})
    assert difference(run_double(model, data), run_double(fused, data)) < 1e-12


def test_axes_of_different_names_may_be_as_long() -> None:
    """The nodes of a graph on one axis, their neighbours on another: the probes, which differ, don't fit each other."""
    net = Net("graph", dtype="float64")
    x, a = net.input("N", 6), net.input("N", "N2", name="a")
    y = net.op("Add", net.op("MatMul", a, net.op("MatMul", x, net.matrix(6, 8))), net.bias(8))
    net.output(net.bn(y, 8), shape=["N", 8])
    model = net.model()
    fused, report = bnfold.fuse(model, check=False)
    assert report.batchnorms.after == 0, report.layers[0].reason
    data = feeds(model, {"N": 7, "N2": 7})
    assert difference(run_double(model, data), run_double(fused, data)) < 1e-12


def test_without_any_shape_nothing_wrong_is_folded() -> None:
    """Every tenth situation of the matrix."""
    folded = 0
    for case in [case for case in ALL if case.double][::10]:
        model = case.build_double()
        fused, report = bnfold.fuse(without_shapes(model), clone=case.clone, check=False)
        folded += report.batchnorms.before - report.batchnorms.after
        for sizes in (SIZES, OTHER_SIZES):
            data = feeds(model, sizes, below=case.below)
            assert difference(run_double(model, data), run_double(fused, data)) < 1e-12, case.name
    assert folded > 30


def test_an_input_of_no_stated_rank_is_fed_what_its_operators_take() -> None:
    net = Net("bare input", opset=18)
    net.output(net.conv(net.relu(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6)), 6, 3))
    model = without_shapes(net.model())
    fused, report = bnfold.fuse(model)
    assert report.batchnorms.after == 0
    assert bnfold.verify(model, fused, input_shapes={"x": (2, 4, 9, 8)}).verdict == "equivalent"
    assert bnfold.verify(model, fused).verdict == "equivalent"


# --- sizes that the file states -------------------------------------------------------------------------------------------------------


def stated(batch: int | str, shape: list[int | str], *, by: str = "shapes", also: list[int | str] | None = None) -> onnx.ModelProto:
    """(batch, 6, 2, 2) as (batch, 24) by a target that no inference follows, and a BatchNorm, whose input the file says to be of `shape`.

    also: what it says of the product before.
    """
    net = Net("stated", dtype="float64", opset=18)
    x = net.input(batch, 5)
    y = net.reshape(net.gemm(x, 5, 24), 0, 6, 2, 2)
    if by == "data":
        target = net.input(2, name="target", dtype=np.int64)
    else:
        rest = net.op("ReduceProd", net.op("Shape", y, start=1), keepdims=1)
        target = net.op("Concat", net.op("Shape", y, start=0, end=1), rest, axis=0)
    flat = net.op("Reshape", y, target)
    net.output(net.bn(flat, 24), shape=[batch, 24])
    model = net.model()
    model.graph.value_info.append(onnx.helper.make_tensor_value_info(flat, onnx.TensorProto.DOUBLE, shape))
    if also is not None:
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(net.nodes[0].output[0], onnx.TensorProto.DOUBLE, also))
    return model


def folds(model: onnx.ModelProto, **sizes: int) -> bool:
    """Whether its BatchNorm folds; what is folded must be right."""
    fused, report = bnfold.fuse(model, check=False)
    data = feeds(model, sizes) | ({"target": np.array([3, 24])} if len(model.graph.input) > 1 else {})
    assert difference(run_double(model, data), run_double(fused, data)) < 1e-12
    return report.batchnorms.after == 0


def test_sizes_that_a_consistent_file_states_count() -> None:
    assert folds(stated("N", ["N", 24]), N=5)


def test_sizes_of_one_example_do_not_count() -> None:
    assert not folds(stated("N", [3, 24]), N=5)


def test_sizes_of_a_file_that_contradicts_itself_do_not_count() -> None:
    assert not folds(stated("N", ["N", 24], also=["N", 23]), N=5)


def test_sizes_that_the_data_decide_do_not_count() -> None:
    assert not folds(stated(3, [3, 24], by="data"))
