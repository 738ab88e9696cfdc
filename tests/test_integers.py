"""Shapes that an exporter computes are known at every probe, also where ONNX's own inference doesn't follow the computation."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from cases import Net
from compare import batchnorms, difference, feeds, interface, run_double

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
