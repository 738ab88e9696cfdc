"""Linear operators in a row that become one: exactly, in fewer multiply-adds, in files and in programs; and those that stay two."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import pytest
from cases.builder import Net
from compare import difference, feeds, operators, run_double, run_stored

import bnfold


def merged(model: onnx.ModelProto, *, check: bool = True, **more: bool):
    return bnfold.fuse(model, check=check, merge_linear=True, **more)


# --- in files ---------------------------------------------------------------------------------------------------------------------------


def bottleneck(net: Net) -> None:
    """A BatchNorm between folds first."""
    x = net.bn(net.conv(net.input("N", 4, 9, 9), 4, 24, 1), 24)
    net.output(net.relu(net.conv(x, 24, 6, 3)))


def pointwise_last(net: Net) -> None:
    x = net.conv(net.input("N", 4, 9, 9), 4, 24, 3, pads=1, strides=[2, 1], dilations=[1, 2])
    net.output(net.conv(x, 24, 6, 1, strides=[1, 2]))


def padded(net: Net) -> None:
    x = net.conv(net.input("N", 4, 9, 9), 4, 24, 1, bias=False)
    net.output(net.conv(x, 24, 6, 3, pads=1))


def kernels(net: Net) -> None:
    """Of unlike strides and dilations, padded by the first alone."""
    x = net.conv(net.input("N", 3, 17), 3, 40, 3, dims=1, strides=[2], pads=2)
    net.output(net.conv(x, 40, 2, 2, dims=1, strides=[3], dilations=[2]))


def depthwise(net: Net) -> None:
    x = net.conv(net.input("N", 6, 9, 9), 6, 6, 3, groups=6, strides=[2, 2])
    net.output(net.conv(x, 6, 6, 1, groups=6))


def grouped(net: Net) -> None:
    """4 groups and 6 have 2 blocks of channels in common."""
    x = net.conv(net.input("N", 8, 5, 5, 5), 8, 48, 1, dims=3, groups=4)
    net.output(net.conv(x, 48, 12, 2, dims=3, groups=6))


def transposed(net: Net) -> None:
    x = net.conv_transpose(net.input("N", 4, 5, 5), 4, 24, 3, groups=2, strides=[2, 2], output_padding=[1, 1], pads=[1, 1, 1, 1])
    net.output(net.relu(net.conv(x, 24, 6, 1, groups=2)))


def into_transposed(net: Net) -> None:
    x = net.conv(net.input("N", 4, 5, 5), 4, 24, 1, groups=2, bias=False)
    net.output(net.conv_transpose(x, 24, 6, 3, groups=2, strides=[2, 2]))


def unread_padding(net: Net) -> None:
    """What pads as SAME does keeps that, whatever it comes to."""
    x = net.conv(net.input("N", 4, "H", 9), 4, 24, 3, auto_pad="SAME_LOWER", strides=[2, 2])
    net.output(net.conv(x, 24, 6, 1))


def products(net: Net) -> None:
    x = net.gemm(net.input("N", 5), 5, 20, transB=1, alpha=0.5, beta=2.0)
    net.output(net.gemm(x, 20, 3, alpha=-1.5))


def products_with_adds(net: Net) -> None:
    """As exporters write a linear layer of three axes; the constant factor between goes along."""
    x = net.op("Add", net.op("MatMul", net.input("N", 3, 5), net.matrix(5, 20)), net.bias(20))
    x = net.op("Mul", x, net.bias(20))
    net.output(net.relu(net.op("Add", net.op("MatMul", x, net.matrix(20, 4)), net.bias(4))))


def product_without_bias(net: Net) -> None:
    net.output(net.op("MatMul", net.gemm(net.input("N", 5), 5, 20), net.matrix(20, 3)))


def turned_product(net: Net) -> None:
    """The first turns its input, so the second can't take its place."""
    x = net.gemm(net.input(5, "N"), 5, 20, transA=1)
    net.output(net.gemm(x, 20, 3))


def product_of_channels(net: Net) -> None:
    """A product from the left mixes channels as a convolution does."""
    x = net.op("MatMul", net.matrix(24, 4), net.input("N", 4, 9))
    net.output(net.conv(x, 24, 6, 3, dims=1))


def transposed_twice(net: Net) -> None:
    """The first stays, and has no bias for its new channels either."""
    x = net.conv_transpose(net.input("N", 4, 5, 5), 4, 24, 3, bias=False)
    net.output(net.op("AveragePool", net.conv_transpose(x, 24, 6, 1, groups=2, bias=False), kernel_shape=[2, 2]))


def several(net: Net) -> None:
    """What would not pay by twos pays by threes."""
    x = net.gemm(net.input("N", 16), 16, 4)
    for k, n in ((4, 16), (16, 2)):
        x = net.gemm(net.dropout(x), k, n)
    net.output(x)


def behind_the_average(net: Net) -> None:
    """A kernel of 1 makes of a mean the mean of what it makes: the classifier takes it up."""
    x = net.op("GlobalAveragePool", net.bn(net.conv(net.input("N", 4, 9, 9), 4, 24, 1), 24))
    net.output(net.gemm(net.op("Flatten", x), 24, 5))


def behind_a_reshape(net: Net) -> None:
    """Which states how many channels there are."""
    x = net.reduce("Mean", net.conv(net.input("N", 4, 9, 9), 4, 24, 1, groups=2), 2, 3)
    net.output(net.gemm(net.reshape(x, -1, 24), 24, 5))


def behind_windows(net: Net) -> None:
    x = net.op("AveragePool", net.conv(net.input("N", 4, "H", 9), 4, 24, 1), kernel_shape=[2, 2], strides=[2, 2], pads=[1, 0, 0, 1])
    net.output(net.conv(net.op("Mul", x, net.weight(net.normal(24, 1, 1))), 24, 6, 3))


def behind_last_axes(net: Net) -> None:
    """Features last, as a transformer has them: the mean of all places, turned."""
    x = net.op("Add", net.op("MatMul", net.input("N", 7, 5), net.matrix(5, 24)), net.bias(24))
    net.output(net.gemm(net.reduce("Mean", x, 1, keepdims=0), 24, 3))


JOINED = [
    bottleneck,
    pointwise_last,
    padded,
    kernels,
    depthwise,
    grouped,
    transposed,
    into_transposed,
    unread_padding,
    products,
    products_with_adds,
    product_without_bias,
    turned_product,
    product_of_channels,
    transposed_twice,
    several,
    behind_the_average,
    behind_a_reshape,
    behind_windows,
    behind_last_axes,
]


def joined(draw: Callable[[Net], None], *, value_info: bool = True):
    """The network in float32, folded, with its report; seen to compute the same there and in float64, and to be certified."""
    net, exact = Net(draw.__name__), Net(draw.__name__, dtype="float64")
    for each in (net, exact):
        each.value_info = value_info
        draw(each)
    model, double = net.model(), exact.model()
    fused, report = merged(model)
    onnx.checker.check_model(fused, full_check=True)
    assert report.verify is not None
    assert (report.verify.verdict, report.verify.levels.coefficients.verdict) == ("equivalent", "equivalent")
    data = feeds(double)
    assert difference(run_double(double, data), run_double(merged(double, check=False)[0], data)) < 1e-13
    data = feeds(model)
    assert difference(run_stored(model, data), run_stored(fused, data)) < 2e-6
    return model, fused, report


@pytest.mark.parametrize("draw", JOINED, ids=lambda draw: draw.__name__)
def test_two_become_one(draw: Callable[[Net], None]) -> None:
    model, fused, report = joined(draw)
    (row,) = report.composed
    assert (row.into != "", row.reason) == (True, "")
    assert report.multiply_adds == row.multiply_adds
    assert report.multiply_adds.after < report.multiply_adds.before
    assert sum(operators(fused)[kind] for kind in ("Conv", "ConvTranspose", "Gemm", "MatMul")) == 1
    assert bnfold.verify(model, fused, coefficients_only=True).verdict == "equivalent"


def transition(net: Net) -> None:
    """As DenseNet's: what it has a BatchNorm for folds first, and two averages stand behind."""
    x = net.bn(net.conv(net.input("N", 8, 9, "W"), 8, 4, 1), 4)
    x = net.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2], pads=[1, 0, 0, 1], ceil_mode=1)
    net.output(net.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]))


@pytest.mark.parametrize("value_info", [False, True])
def test_a_mixture_of_channels_goes_behind_an_average(value_info: bool) -> None:
    _, fused, report = joined(transition, value_info=value_info)
    (row,) = report.composed
    assert (row.layers, row.into, row.behind) == (("Conv_node_0",), "Conv_node_0", "AveragePool_node_1")
    assert row.multiply_adds == report.multiply_adds
    assert row.multiply_adds.after * 8 < row.multiply_adds.before
    assert [node.op_type for node in fused.graph.node] == ["AveragePool", "AveragePool", "Conv"]


def pooled(net: Net) -> None:
    """The BatchNorm between folds first; the constant behind stays."""
    x = net.conv(net.input("N", 4, 11, "W"), 4, 6, 3, pads=1, groups=2, dilations=[2, 1])
    net.output(net.op("AveragePool", net.bn(x, 6), kernel_shape=[3, 2], strides=[2, 2]))


def pooled_in_a_row(net: Net) -> None:
    x = net.conv(net.input("N", 4, 23), 4, 6, 2, dims=1, bias=False)
    x = net.op("AveragePool", x, kernel_shape=[2], strides=[2], count_include_pad=1)
    net.output(net.relu(net.op("AveragePool", x, kernel_shape=[2], strides=[2])))


@pytest.mark.parametrize("draw", [pooled, pooled_in_a_row], ids=lambda draw: draw.__name__)
def test_a_convolution_takes_up_the_averages_behind_it(draw: Callable[[Net], None]) -> None:
    model, fused, report = joined(draw)
    (row,) = report.composed
    assert row.layers[0] == row.into == "Conv_node_0"
    assert row.multiply_adds.after < row.multiply_adds.before
    assert [node.op_type for node in fused.graph.node if node.op_type != "Relu"] == ["Conv"]
    assert bnfold.verify(model, fused, coefficients_only=True).verdict == "equivalent"


@pytest.mark.parametrize("how", [{"pads": [1, 1, 1, 1]}, {"ceil_mode": 1}, {"auto_pad": "SAME_UPPER"}, {"strides": [1, 1]}], ids=str)
def test_an_average_stays_that_reaches_beyond_the_border_or_saves_nothing(how: dict[str, object]) -> None:
    net = Net("pool")
    x = net.bn(net.conv(net.input("N", 4, 10, 9), 4, 6, 3, pads=1), 6)
    net.output(net.op("AveragePool", x, **{"kernel_shape": [2, 2], "strides": [2, 2], **how}))
    fused, report = merged(net.model())
    assert operators(fused) == {"Conv": 1, "AveragePool": 1}
    assert not any(row.into for row in report.composed)


def test_averages_of_modules_go_where_no_code_calls_them_again() -> None:
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Called(nn.Module):
        """As a function, and one layer of pooling twice."""

        def __init__(self, *, twice: bool) -> None:
            super().__init__()
            self.one, self.two, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
            self.pool, self.twice = nn.AvgPool2d(2), twice

        def forward(self, x):
            pool = self.pool if self.twice else lambda x: nn.functional.avg_pool2d(x, 2)
            return pool(self.norm(self.two(torch.relu(pool(self.one(x))))))

    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8), nn.AvgPool2d((2, 3)), nn.ReLU())
    x = torch.randn(2, 3, 21, 20)
    for module, in_module, in_program in ((plain, 1, 1), (Called(twice=True), 0, 2), (Called(twice=False), 0, 2)):
        module.eval()
        for given, count in ((module, in_module), (torch.export.export(module, (x,)), in_program)):
            fused, report = bnfold.fuse(given, example=x, merge_linear=True)
            assert sum(row.into != "" for row in report.composed) == count
            assert report.verify is None or report.verify.levels.coefficients.verdict == "equivalent"
            made = fused if given is module else fused.module()
            assert torch.allclose(made(x), module(x), atol=1e-5)


def test_a_densenet_takes_fewer_multiply_adds_in_a_program() -> None:
    torch = pytest.importorskip("torch")
    nn = torch.nn

    def layer(i, o):
        return nn.Sequential(nn.BatchNorm2d(i), nn.ReLU(), nn.Conv2d(i, o, 1), nn.AvgPool2d(2))

    module = nn.Sequential(nn.Conv2d(3, 16, 3), layer(16, 8), layer(8, 4), nn.Flatten(), nn.Linear(36, 5)).eval()
    x = torch.randn(2, 3, 14, 14)
    fused, report = bnfold.fuse(torch.export.export(module, (x,)), merge_linear=True)
    assert [row.behind for row in report.composed if row.behind] == ["1.3", "2.3"]
    assert report.verify is not None
    assert (report.verify.verdict, report.verify.levels.coefficients.verdict) == ("equivalent", "equivalent")
    assert torch.allclose(fused.module()(x), module(x), atol=1e-5)


def padded_bias(net: Net) -> None:
    net.output(net.conv(net.conv(net.input("N", 4, 9, 9), 4, 24, 1), 24, 6, 3, pads=1))


def padded_data(net: Net) -> None:
    """Where the second pads, the first would see data still."""
    net.output(net.conv(net.conv(net.input("N", 4, 9, 9), 4, 24, 3, bias=False), 24, 6, 1, pads=1))


def growing(net: Net) -> None:
    net.output(net.conv(net.conv(net.input("N", 24, 9, 9), 24, 4, 1), 4, 24, 3))


def read_twice(net: Net) -> None:
    x = net.conv(net.input("N", 4, 9, 9), 4, 24, 1)
    net.output(net.op("Concat", net.relu(x), net.conv(x, 24, 6, 1), axis=1))


def given_out(net: Net) -> None:
    x = net.conv(net.input("N", 4, 9, 9), 4, 24, 1)
    net.output(x, net.conv(x, 24, 6, 1))


def strided_before_an_average(net: Net) -> None:
    """The mean of every other place is another."""
    x = net.op("GlobalAveragePool", net.conv(net.input("N", 4, 9, 9), 4, 24, 1, strides=[2, 2]))
    net.output(net.gemm(net.op("Flatten", x), 24, 5))


def flattened_places(net: Net) -> None:
    net.output(net.gemm(net.op("Flatten", net.conv(net.input("N", 4, 3, 3), 4, 24, 1)), 216, 5))


def unlike_windows(net: Net) -> None:
    """Neither is a mixture of channels, and the first pads by the size of its input."""
    x = net.conv(net.input("N", 4, "H", 9), 4, 24, 2, auto_pad="SAME_UPPER", strides=[2, 2])
    net.output(net.conv(x, 24, 2, 2))


def beyond_the_type(net: Net) -> None:
    x = net.op("MatMul", net.input("N", 3), net.weight(np.full((3, 9), 3e20)))
    net.output(net.op("MatMul", x, net.weight(np.full((9, 2), 4e20))))


def no_number(net: Net) -> None:
    w = np.ones((3, 9))
    w[1, 2] = np.nan
    net.output(net.op("MatMul", net.op("MatMul", net.input("N", 3), net.weight(w)), net.matrix(9, 2)))


def integers(net: Net) -> None:
    codes = net.constant(net.rng.integers(-99, 99, (24, 4, 1, 1)).astype(np.int8))
    scale, zero = net.constant(np.full(24, 0.01, np.float32)), net.constant(np.zeros(24, np.int8))
    x = net.op("Conv", net.input("N", 4, 9, 9), net.op("DequantizeLinear", codes, scale, zero, axis=0))
    net.output(net.conv(x, 24, 6, 3))


def in_a_loop(net: Net) -> None:
    """What the body reads from outside is worked out once."""
    x = net.gemm(net.input(2, 4), 4, 24)
    body = net.child("body")
    body.inputs = [onnx.helper.make_tensor_value_info(name, kind, []) for name, kind in (("i", 7), ("on", 9))]
    body.inputs.append(onnx.helper.make_tensor_value_info("state", 1, [2, 3]))
    keep = body.op("Identity", "on")
    body.outputs = [onnx.helper.make_tensor_value_info(keep, 9, [])]
    body.output(body.op("Add", "state", body.gemm(x, 24, 3)), shape=[2, 3])
    start = net.constant(np.zeros((2, 3), np.float32))
    net.output(net.op("Loop", net.constant(np.array(5)), net.constant(np.array(True)), start, body=body.graph()), shape=[2, 3])


STAY = [
    (padded_bias, "pads with zeros"),
    (padded_data, "would still see data"),
    (growing, "as one they would take"),
    (read_twice, "is also read by"),
    (given_out, "is also an output of the model"),
    (strided_before_an_average, "GlobalAveragePool GlobalAveragePool_node_0 stands between"),
    (flattened_places, "Flatten Flatten_node_0 stands between"),
    (unlike_windows, "isn't known for all sizes"),
    (beyond_the_type, "beyond the largest"),
    (no_number, "would be no number"),
    (integers, "the weight of Conv_node_0 is quantised"),
    (in_a_loop, "stand in different graphs"),
]


@pytest.mark.parametrize(("draw", "why"), STAY, ids=lambda each: getattr(each, "__name__", None))
def test_two_stay_two(draw: Callable[[Net], None], why: str) -> None:
    net = Net(draw.__name__)
    draw(net)
    model = net.model()
    fused, report = merged(model)
    assert [row.into for row in report.composed] == [""]
    assert why in report.composed[0].reason
    assert fused.SerializeToString() == model.SerializeToString()


# --- numbers ----------------------------------------------------------------------------------------------------------------------------


def test_coefficients_are_those_of_the_exact_sums() -> None:
    """Against rational numbers: in float32, and where the summands cancel nearly, in float64 too."""
    for dtype in ("float32", "float64", "float16"):
        net = Net("exact", dtype=dtype)
        first, second = net.normal(7, 40, scale=3.0).astype(dtype), net.normal(40, 2, scale=1e-3).astype(dtype)
        first[:, 20:], second[20:] = first[:, :20], -second[:20]
        second[20:] *= np.asarray(1 + 2**-9, dtype)
        net.output(net.op("MatMul", net.op("MatMul", net.input("N", 7), net.weight(first)), net.weight(second)))
        fused, _ = merged(net.model(), check=False)
        (found,) = (onnx.numpy_helper.to_array(tensor) for tensor in fused.graph.initializer)
        exact = [
            [sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(row, column, strict=True)) for column in second.T] for row in first
        ]
        for i, row in enumerate(exact):
            for j, want in enumerate(row):
                near = np.asarray(float(want)).astype(dtype)
                assert found[i, j] == near, (dtype, i, j)


def test_sums_over_taps_are_exact_too() -> None:
    net = Net("taps")
    first, second = (net.normal(*shape).astype(np.float32) for shape in ((20, 2, 3), (2, 20, 3)))
    x = net.op("Conv", net.input("N", 2, 12), net.weight(first))
    net.output(net.op("Conv", x, net.weight(second)))
    fused, _ = merged(net.model())
    (found,) = (onnx.numpy_helper.to_array(tensor) for tensor in fused.graph.initializer)
    for o, c, t in np.ndindex(found.shape):
        pairs = [(j, t - j) for j in range(3) if 0 <= t - j < 3]
        want = sum(Fraction(float(second[o, m, j])) * Fraction(float(first[m, c, k])) for m in range(20) for j, k in pairs)
        assert found[o, c, t] == np.float32(float(want))


# --- chains that nobody drew ------------------------------------------------------------------------------------------------------------


def random_chain(seed: int, **how) -> onnx.ModelProto:
    """Two to five linear operators, some with a BatchNorm, a constant or nothing at all between."""
    rng = np.random.default_rng(seed)
    opset = int(rng.integers(11, 24))
    net = Net(f"chain {seed}", opset=opset, **how)
    net.value_info = bool(rng.integers(2))
    batch: int | str = ("N", 1)[rng.integers(2)]
    convolves, dims = bool(rng.integers(4)), int(rng.integers(1, 4))
    channels = int(rng.choice([1, 2, 4, 6]))
    size = {1: 23, 2: 13, 3: 9}[dims]
    x = net.input(batch, channels, *(size,) * dims) if convolves else net.input(batch, *(3,) * int(rng.integers(2)), channels)
    flat, bias = not convolves and len(net.inputs[0].type.tensor_type.shape.dim) == 2, bool(rng.integers(3))
    for _ in range(rng.integers(2, 6)):
        out = int(rng.choice([1, 2, 6, 12, 24]))
        if convolves:
            groups = int(rng.choice([g for g in (1, 2, 3, channels) if channels % g == 0 and out % g == 0]))
            kernel = [int(n) for n in rng.choice([1, 1, 2, 3], dims)] if rng.integers(2) else [1] * dims
            more = {"kernel_shape": kernel, "group": groups, "strides": [int(n) for n in rng.integers(1, 3, dims)]}
            if rng.random() < 0.15:
                more["auto_pad"] = str(rng.choice(["SAME_UPPER", "VALID"]))
            else:
                more["dilations"] = [int(n) for n in rng.integers(1, 3, dims)]
                more["pads"] = [int(n) for n in rng.integers(0, 3, 2 * dims) * (rng.random() < 0.4)]
            transposes = rng.random() < 0.15
            w = net.filters(channels, out, *kernel, groups=groups) if transposes else net.filters(out, channels, *kernel, groups=groups)
            if transposes:
                more |= {"pads": [0] * (2 * dims), "auto_pad": "NOTSET"}
            x = net.op("ConvTranspose" if transposes else "Conv", x, w, *[net.bias(out)] * bias, **more)
        elif flat and rng.integers(2):
            x = net.gemm(x, channels, out, bias=bias, transB=int(rng.integers(2)), alpha=float(rng.choice([1, -0.5])))
        else:
            x = net.op("MatMul", x, net.matrix(channels, out))
            x = net.op("Add", x, net.bias(out)) if bias else x
        channels = out
        between = rng.random()
        if between < 0.2 and convolves:
            x = net.bn(x, channels, shift=bias)
        elif between < 0.3:
            x = net.op("Mul", x, net.weight(net.normal(*((channels, *(1,) * dims) if convolves else (channels,)))))
        elif between < 0.4:
            x = net.dropout(x)
        elif between < 0.45:
            x = net.relu(x)
        elif between < 0.55 and convolves:
            more = {"kernel_shape": [2] * dims, "strides": [int(rng.integers(1, 3))] * dims, "count_include_pad": int(rng.integers(2))}
            x = net.op("AveragePool", x, pads=[int(rng.integers(2))] * (2 * dims), **more)
    if convolves and rng.integers(2):
        x = net.gemm(net.op("Flatten", net.op("GlobalAveragePool", x)), channels, 3, bias=bias)
    net.output(x)
    return net.model()


VOID = 2, 7, 24, 35, 41  # seeds of kernels that are larger than what they see, or of no two operators in a row


@pytest.mark.parametrize("seed", sorted({*range(46)} - {*VOID}))
def test_random_chains(seed: int) -> None:
    double = random_chain(seed, dtype="float64")
    data = feeds(double)
    want = run_double(double, data)
    exact, report = merged(double, check=False)
    assert difference(want, run_double(exact, data)) < 1e-12
    model = random_chain(seed)
    fused, report = merged(model)
    onnx.checker.check_model(fused, full_check=True)
    assert report.multiply_adds.after <= report.multiply_adds.before
    assert all(row.reason for row in report.composed if not row.into)
    if report.verify is not None:
        assert report.verify.levels.coefficients.verdict == "equivalent"
    data = feeds(model)
    assert difference(run_stored(model, data), run_stored(fused, data)) < 1e-5


# --- in programs ------------------------------------------------------------------------------------------------------------------------


def networks():
    torch = pytest.importorskip("torch")
    nn = torch.nn
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(24)
    nn.init.normal_(norm.running_mean)
    return {
        "bottleneck": (nn.Sequential(nn.Conv2d(4, 24, 1), norm, nn.Conv2d(24, 6, 3, stride=2), nn.ReLU()), (2, 4, 9, 9)),
        "kernels": (nn.Sequential(nn.Conv1d(2, 40, 3, padding="same"), nn.Conv1d(40, 2, 2, stride=2, dilation=2)), (2, 2, 19)),
        "same": (nn.Sequential(nn.Conv2d(4, 24, 1, bias=False), nn.Conv2d(24, 6, 3, padding="same")), (2, 4, 9, 9)),
        "depthwise": (nn.Sequential(nn.Conv2d(6, 6, 3, groups=6, stride=2, padding=1), nn.Conv2d(6, 6, 1, groups=6)), (2, 6, 9, 9)),
        "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 24, 3, 2, 1, 1, groups=2), nn.Conv2d(24, 6, 1), nn.ReLU()), (2, 4, 5, 5)),
        "into transposed": (nn.Sequential(nn.Conv3d(4, 24, 1, bias=False), nn.ConvTranspose3d(24, 2, 2, 2)), (1, 4, 5, 4, 3)),
        "average": (nn.Sequential(nn.Conv2d(4, 24, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)), (2, 4, 9, 9)),
        "linear": (nn.Sequential(nn.Linear(4, 24), nn.Dropout(), nn.Linear(24, 6, bias=False)), (2, 3, 4)),
    }


NAMES = ["bottleneck", "kernels", "same", "depthwise", "transposed", "into transposed", "linear", "average"]


@pytest.mark.parametrize("name", NAMES)
def test_in_a_program_and_a_module(name: str, tmp_path: Path) -> None:
    module, shape = networks()[name]
    import torch

    x = torch.randn(*shape)
    program = torch.export.export(module.eval(), (x,))
    for given, suffix in ((program, "pt2"), (module, "safetensors")):
        fused, report = bnfold.fuse(given, example=x, merge_linear=True)
        (row,) = report.composed
        assert row.multiply_adds.after < row.multiply_adds.before
        assert report.verify is not None
        assert (report.verify.verdict, report.verify.levels.coefficients.verdict) == ("equivalent", "equivalent")
        assert report.parameters.after < report.parameters.before
        path = tmp_path / f"fused.{suffix}"
        bnfold.save(fused, path)
        again = bnfold.load(path).module() if given is program else bnfold.load(path, arch=lambda: networks()[name][0])
        assert torch.allclose(again(x), module(x), atol=1e-5)
    linear = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
    assert [sum(isinstance(each, linear) for each in net.modules()) for net in (module, fused)] == [2, 1]


def test_what_the_code_holds_stays_in_a_module_alone() -> None:
    """A constant between, and a layer that is called twice; one whose weight another layer has gets its own."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 24), nn.Linear(24, 6)

        def forward(self, x):
            return self.b(2 * self.a(x))

    class Twice(Scaled):
        def forward(self, x):
            return self.b(torch.relu(self.a(x))) + self.b(self.a(x))

    class Tied(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.d = nn.Linear(4, 24), nn.Linear(24, 6)
            self.c.weight, self.d.weight = self.a.weight, self.b.weight

        def forward(self, x):
            return self.b(self.a(x)) + self.d(torch.relu(self.c(x)))

    x = torch.randn(3, 4)
    for kind, why in ((Scaled, "mul mul stays"), (Twice, "called once"), (Tied, "")):
        module = kind().eval()
        fused, report = bnfold.fuse(module, example=x, merge_linear=True)
        assert [why in row.reason and (row.into == "") == bool(why) for row in report.composed] == [True]
        assert torch.allclose(fused(x), module(x), atol=1e-6)
        fused, report = bnfold.fuse(torch.export.export(module, (x,)), merge_linear=True)
        assert [row.into != "" for row in report.composed] == [True]
        assert torch.allclose(fused.module()(x), module(x), atol=1e-6)


# --- the command ------------------------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    net = Net("command")
    bottleneck(net)
    onnx.save(net.model(), tmp_path / "net.onnx")
    command = [sys.executable, "-m", "bnfold", "fuse", "net.onnx", "-o", "fused.onnx", "--merge-linear", "--report", "fuse.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    report = json.loads((tmp_path / "fuse.json").read_text())
    (row,) = report["composed"]
    assert (row["layers"], row["into"], row["reason"]) == (["Conv_node_0", "Conv_node_1"], "Conv_node_1", "")
    before, after = row["multiply_adds"].values()
    assert report["multiply_adds"] == row["multiply_adds"]
    assert f"{before:,} to {after:,} multiply-adds" in done.stdout
    assert f"{report['parameters']['before']:,} to {report['parameters']['after']:,} parameters" in done.stdout
    assert [layer["into"] for layer in report["layers"]] == [["Conv_node_1"]]
    checked = [sys.executable, "-m", "bnfold", "verify", "net.onnx", "fused.onnx", "-q"]
    assert subprocess.run(checked, cwd=tmp_path, check=False).returncode == 0
    (tmp_path / "bnfold.toml").write_text("[fuse]\nmerge-linear = true\n")
    again = [sys.executable, "-m", "bnfold", "fuse", "net.onnx", "-o", "again.onnx"]
    subprocess.run(again, cwd=tmp_path, capture_output=True, check=True)
    assert len(onnx.load(tmp_path / "again.onnx").graph.node) == 2


def test_channels_that_leave_go_first() -> None:
    """Two layers that would be merged with their constant channels take fewer multiply-adds apart, once these are gone."""
    net = Net("dead", opset=13)
    x = net.input("N", 4, 9, 9)
    w = net.normal(4, 4, 1, 1)
    w[1:] = 0
    x = net.op("Conv", x, net.weight(w), net.bias(4))
    x = net.relu(net.conv(x, 4, 6, 3))
    net.output(net.conv(net.op("Conv", x, net.weight(net.normal(12, 3, 1, 1)), group=2), 12, 2, 1))
    model = net.model()
    fused, report = merged(model, drop_dead=True)
    assert [bool(row.into) for row in report.composed] == [True, False]
    assert [bool(row.into) for row in merged(model)[1].composed] == [True, True]
    assert report.verify is not None
    assert (report.verify.verdict, report.verify.levels.coefficients.verdict) == ("equivalent", "equivalent")
    data = feeds(model)
    assert difference(run_stored(model, data), run_stored(fused, data)) < 2e-6


def test_a_wrong_product_is_found_by_its_coefficient() -> None:
    net = Net("wrong")
    bottleneck(net)
    model = net.model()
    fused, _ = merged(model)
    tensor = next(t for t in fused.graph.initializer if len(t.dims) == 4)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[2, 1, 0, 2] *= np.float32(1 + 1e-5)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    verdict = bnfold.verify(model, fused, coefficients_only=True)
    assert (verdict.verdict, "the weight of Conv Conv_node_1" in verdict.reason) == ("different", True)
