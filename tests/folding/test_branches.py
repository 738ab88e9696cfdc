"""Parallel linear branches become one convolution, exactly, and only where they are one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from cases import Net
from compare import OTHER_SIZES, batchnorms, difference, feeds, interface, operators, run_double

import bnfold
from bnfold.report import FuseReport

Draw = Callable[[Net], None]


def merged(draw: Draw, *, clone: bool = False) -> tuple[dict[str, int], FuseReport]:
    """Fold a network in float64; its operators afterwards, and the report. The function and the interface must not change."""
    net = Net(getattr(draw, "__name__", "merge"), dtype="float64")
    draw(net)
    model = net.model()
    fused, report = bnfold.fuse(model, check=False, clone=clone)
    assert interface(fused) == interface(model)
    assert batchnorms(fused) == report.batchnorms.after
    for sizes in ({"N": 3, "H": 9, "W": 7, "L": 8}, {**OTHER_SIZES, "L": 11}):
        data = feeds(model, sizes)
        assert difference(run_double(model, data), run_double(fused, data)) < 1e-12
    return dict(operators(fused)), report


def repvgg(net: Net, x: str, channels: int, **attrs: object) -> str:
    """3 x 3 + 1 x 1 + identity, each with its BatchNorm (Ding et al. 2021, figure 2b)."""
    stride = attrs.get("strides", [1, 1])
    three = net.bn(net.conv(x, channels, channels, 3, bias=False, pads=1, **attrs), channels)
    one = net.bn(net.conv(x, channels, channels, 1, bias=False, **attrs), channels)
    y = net.op("Add", three, one)
    return y if stride != [1, 1] else net.op("Add", y, net.bn(x, channels))


def image(net: Net, channels: int = 4) -> str:
    return net.relu(net.input("N", channels, "H", "W"))


def test_repvgg_block() -> None:
    def draw(net: Net) -> None:
        net.output(net.relu(repvgg(net, image(net), 4)))

    found, report = merged(draw)
    assert found == {"Relu": 2, "Conv": 1}
    assert [(m.into, len(m.branches)) for m in report.merged] == [("Conv_node_0", 3)]
    assert set(report.merged[0].branches) == {"Conv_node_0", "Conv_node_1", "BatchNormalization_node_2"}
    assert report.batchnorms.after == 0
    assert all(layer.verdict == "folded" for layer in report.layers)
    assert report.layers[2].into == ("Conv_node_0",)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_repvgg_block_with_groups_and_strides(groups: int, stride: int) -> None:
    def draw(net: Net) -> None:
        net.output(repvgg(net, image(net), 4, groups=groups, strides=[stride, stride]))

    assert merged(draw)[0] == {"Relu": 1, "Conv": 1}


def test_stages_of_repvgg() -> None:
    """A downsampling block has no identity; the branches of the next read a merged sum."""

    def draw(net: Net) -> None:
        x = net.relu(repvgg(net, image(net), 4, strides=[2, 2]))
        net.output(net.relu(repvgg(net, x, 4)))

    found, report = merged(draw)
    assert found == {"Relu": 3, "Conv": 2}
    assert [len(m.branches) for m in report.merged] == [2, 3]


def test_mobileone_block() -> None:
    """Four over-parameterised depthwise branches, a scale branch and a skip, begun with a scalar 0 (Vasu et al. 2023, figure 3)."""

    def draw(net: Net) -> None:
        x = image(net)
        total = net.op("Add", net.bn(x, 4), net.scalar(0.0))
        total = net.op("Add", total, net.bn(net.conv(x, 4, 4, 1, groups=4, bias=False), 4))
        for _ in range(4):
            total = net.op("Add", total, net.bn(net.conv(x, 4, 4, 3, groups=4, pads=1, bias=False), 4))
        net.output(net.relu(total))

    found, report = merged(draw)
    assert report.batchnorms.after == 0
    assert found == {"Relu": 2, "Conv": 1}


@pytest.mark.parametrize("first", [True, False])
def test_numbers_behind_a_merged_sum(first: bool) -> None:
    """The zero with which a loop over branches begins, where no BatchNorm follows, and a factor of all of them."""

    def draw(net: Net) -> None:
        x, zero = image(net), net.scalar(0.0)
        branch = [net.bn(net.conv(x, 4, 6, k, pads=k // 2), 6) for k in (3, 1)]
        y = net.op("Add", net.op("Add", zero, branch[0]), branch[1]) if first else net.op("Add", net.op("Add", *branch), zero)
        net.output(net.relu(net.op("Div", y, net.scalar(2.0))))

    found, report = merged(draw)
    assert found == {"Relu": 2, "Conv": 1}
    assert {layer.verdict for layer in report.layers} == {"folded"}
    assert "Conv_node_0" in report.layers[-1].into


def test_a_number_that_something_else_reads_too() -> None:
    def draw(net: Net) -> None:
        x = image(net)
        three, one = net.bn(net.conv(x, 4, 4, 3, pads=1), 4), net.conv(x, 4, 4, 1)
        y = net.op("Mul", net.op("Add", three, one), net.scalar(2.0))
        net.output(net.op("Add", y, net.scalar(1.0)), net.op("Tanh", y))

    assert merged(draw)[0] == {"Relu": 1, "Conv": 1, "Add": 1, "Tanh": 1}


@pytest.mark.parametrize("groups", [1, 4])
def test_a_residual_with_a_gate_of_constants(groups: int) -> None:
    """x + a*(conv(x) - x): the inner sum, then its factor, then the outer sum (EfficientViM)."""

    def draw(net: Net) -> None:
        x = image(net)
        inner = net.op("Sub", net.bn(net.conv(x, 4, 4, 3, groups=groups, pads=1), 4), x)
        net.output(net.relu(net.op("Add", x, net.op("Mul", net.weight(net.normal(4, 1, 1)), inner))))

    assert merged(draw)[0] == {"Relu": 2, "Conv": 1}


@pytest.mark.parametrize("bias", [(True, True), (True, False), (False, True), (False, False)])
def test_classifiers_of_a_distilled_network(bias: tuple[bool, bool]) -> None:
    """Two products of one value by constants, averaged (Touvron et al. 2021)."""

    def draw(net: Net) -> None:
        x = net.op("Sigmoid", net.bn(net.input("N", 5), 5))
        y = net.op("Add", *(net.gemm(net.bn(x, 5), 5, 3, bias=each, transB=1) for each in bias))
        net.output(net.op("Div", y, net.scalar(2.0)))

    found, report = merged(draw)
    assert found["Gemm"] == 1
    assert "Add" not in found
    assert "Div" not in found
    assert len(report.merged[0].branches) == 2


def test_acnet_block() -> None:
    """3 x 3 + 1 x 3 + 3 x 1 (Ding et al. 2019)."""

    def draw(net: Net) -> None:
        x = image(net)
        square = net.bn(net.conv(x, 4, 6, 3, pads=1, bias=False), 6)
        flat = net.bn(net.op("Conv", x, net.filters(6, 4, 1, 3), kernel_shape=[1, 3], pads=[0, 1, 0, 1]), 6)
        tall = net.bn(net.op("Conv", x, net.filters(6, 4, 3, 1), kernel_shape=[3, 1], pads=[1, 0, 1, 0]), 6)
        net.output(net.op("Add", net.op("Add", square, flat), tall))

    assert merged(draw)[0] == {"Relu": 1, "Conv": 1}


def test_crossed_kernels_have_no_host() -> None:
    """Neither of 1 x 3 and 3 x 1 covers the other."""

    def draw(net: Net) -> None:
        x = image(net)
        flat = net.bn(net.op("Conv", x, net.filters(6, 4, 1, 3), kernel_shape=[1, 3], pads=[0, 1, 0, 1]), 6)
        tall = net.bn(net.op("Conv", x, net.filters(6, 4, 3, 1), kernel_shape=[3, 1], pads=[1, 0, 1, 0]), 6)
        net.output(net.op("Add", flat, tall))

    assert merged(draw)[0] == {"Relu": 1, "Conv": 2, "Add": 1}


@pytest.mark.parametrize("order", [("conv", "x"), ("x", "conv")])
@pytest.mark.parametrize("op", ["Add", "Sub"])
def test_residual_of_the_value_itself(op: str, order: tuple[str, str]) -> None:
    """x - conv(x) is the convolution with the kernel I - W."""

    def draw(net: Net) -> None:
        x = image(net)
        parts = {"x": x, "conv": net.bn(net.conv(x, 4, 4, 3, pads=1), 4)}
        net.output(net.op(op, *(parts[name] for name in order)))

    found, report = merged(draw)
    assert found == {"Relu": 1, "Conv": 1}
    assert report.merged[0].branches == ("Conv_node_0", "identity")


def test_difference_of_two_convolutions() -> None:
    def draw(net: Net) -> None:
        x = image(net)
        net.output(net.op("Sub", net.conv(x, 4, 6, 1), net.bn(net.conv(x, 4, 6, 3, pads=1), 6)))

    assert merged(draw)[0] == {"Relu": 1, "Conv": 1}


def test_dilation() -> None:
    """A dilated 3 x 3 covers a plain 1 x 1 at its middle."""

    def draw(net: Net) -> None:
        x = image(net)
        wide = net.bn(net.conv(x, 4, 4, 3, pads=2, dilations=[2, 2], bias=False), 4)
        net.output(net.op("Add", wide, net.bn(net.conv(x, 4, 4, 1, bias=False), 4)))

    assert merged(draw)[0] == {"Relu": 1, "Conv": 1}


def test_one_dimension() -> None:
    def draw(net: Net) -> None:
        x = net.relu(net.input("N", 4, "L"))
        five = net.bn(net.conv(x, 4, 4, 5, dims=1, pads=2), 4)
        net.output(net.op("Add", five, net.bn(net.conv(x, 4, 4, 3, dims=1, pads=1), 4)))

    assert merged(draw)[0] == {"Relu": 1, "Conv": 1}


def test_padding_by_name() -> None:
    """SAME padding of an odd kernel that slides by one pads both sides alike."""

    def draw(net: Net) -> None:
        x = image(net)
        net.output(net.op("Add", net.bn(net.conv(x, 4, 4, 3, auto_pad="SAME_UPPER"), 4), net.bn(net.conv(x, 4, 4, 1), 4)))

    assert merged(draw)[0] == {"Relu": 1, "Conv": 1}


def test_no_padding_at_a_corner() -> None:
    """A 2 x 2 that pads after, not before, sees the pixel of a 1 x 1 at its first place."""

    def draw(net: Net) -> None:
        x = image(net)
        two = net.op("Conv", x, net.filters(4, 4, 2, 2), kernel_shape=[2, 2], pads=[0, 0, 1, 1])
        net.output(net.op("Add", net.bn(two, 4), net.bn(net.conv(x, 4, 4, 1), 4)))

    assert merged(draw)[0] == {"Relu": 1, "Conv": 1}


def test_a_batchnorm_with_negative_and_zero_scales() -> None:
    def draw(net: Net) -> None:
        x = image(net)
        params = net.bn_params(4)
        params[0] = net.weight(np.array([-1.0, 0.0, 2.0, -0.5]))
        net.output(net.op("Add", net.conv(x, 4, 4, 3, pads=1), net.bn(x, params=params)))

    found, report = merged(draw)
    assert found == {"Relu": 1, "Conv": 1}
    assert report.batchnorms.after == 0


def test_shared_weights_are_copied() -> None:
    """Two blocks share one convolution's weight; only one of them merges a branch into it."""

    def draw(net: Net) -> None:
        x, y = image(net), net.relu(net.input("N", 4, "H", "W", name="y"))
        w = net.filters(4, 4, 3, 3)
        plain = net.conv(y, 4, 4, 3, pads=1, weight=w)
        block = net.op("Add", net.bn(net.conv(x, 4, 4, 3, pads=1, weight=w), 4), net.bn(net.conv(x, 4, 4, 1), 4))
        net.output(plain, block)

    found, _ = merged(draw)
    assert found == {"Relu": 2, "Conv": 2}


def branches(change: Callable[[Net, str], tuple[str, ...]]) -> Draw:
    def draw(net: Net) -> None:
        net.output(*change(net, image(net)))

    return draw


def three(net: Net, x: str, **attrs: object) -> str:
    return net.bn(net.conv(x, 4, 4, 3, **{"pads": 1, **attrs}), 4)


def corner(net: Net, x: str, *pads: int) -> str:
    return net.bn(net.op("Conv", x, net.filters(4, 4, 3, 3), kernel_shape=[3, 3], pads=pads), 4)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("paddings that don't match", lambda net, x: (net.op("Add", corner(net, x, 2, 2, 0, 0), corner(net, x, 0, 0, 2, 2)),)),
        (
            "strides that differ",
            lambda net, x: (
                net.op(
                    "Add",
                    net.op("Resize", three(net, x, strides=[2, 2]), "", net.constant(np.array([1, 1, 2, 2], np.float32))),
                    three(net, x),
                ),
            ),
        ),
        ("different sources", lambda net, x: (net.op("Add", three(net, x), net.bn(net.conv(net.op("Sigmoid", x), 4, 4, 1), 4)),)),
        ("a branch that is an output", lambda net, x: (net.op("Add", three(net, x), y := net.bn(net.conv(x, 4, 4, 1), 4)), y)),
        (
            "a branch that something else reads",
            lambda net, x: (net.op("Add", three(net, x), y := net.bn(net.conv(x, 4, 4, 1), 4)), net.op("Tanh", y)),
        ),
        ("groups that differ", lambda net, x: (net.op("Add", three(net, x), net.bn(net.conv(x, 4, 4, 1, groups=2), 4)),)),
        ("dilations that differ", lambda net, x: (net.op("Add", three(net, x), three(net, x, pads=2, dilations=[2, 2])),)),
        ("a sum that broadcasts channels", lambda net, x: (net.op("Add", three(net, x), net.bn(net.conv(x, 4, 1, 1), 1)),)),
        ("a product", lambda net, x: (net.op("Mul", three(net, x), net.bn(net.conv(x, 4, 4, 1), 4)),)),
        ("something between", lambda net, x: (net.op("Add", three(net, x), net.relu(net.bn(net.conv(x, 4, 4, 1), 4))),)),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_what_stays_apart(name: str, change: Callable[[Net, str], tuple[str, ...]]) -> None:
    if name == "strides that differ":

        def draw(net: Net) -> None:
            x = net.relu(net.input("N", 4, 8, 6))
            net.output(*change(net, x))
    else:
        draw = branches(change)
    found, report = merged(draw)
    assert report.merged == ()
    assert found["Conv"] == 2


def test_the_same_branch_twice() -> None:
    """y + y is no sum of two branches."""

    def draw(net: Net) -> None:
        y = three(net, image(net))
        net.output(net.op("Add", y, y))

    assert merged(draw)[0] == {"Relu": 1, "Conv": 1, "Add": 1}


def test_a_batchnorm_called_twice_with_one_call_in_a_branch() -> None:
    def draw(net: Net) -> None:
        params = net.bn_params(4)
        y = net.bn(net.op("Sigmoid", image(net)), params=params)
        net.output(net.op("Add", net.conv(y, 4, 4, 3, pads=1), net.bn(y, params=params)))

    found, report = merged(draw)
    assert found["Conv"] == 1
    assert "Add" not in found
    assert report.batchnorms.after == 1


def test_a_sum_that_nobody_reads() -> None:
    """What the report says of a BatchNorm and what the model holds agree, in dead ends too."""

    def draw(net: Net) -> None:
        x = image(net)
        y = net.bn(net.op("Sigmoid", x), 4)
        net.op("Add", net.conv(y, 4, 4, 3, pads=1), net.conv(y, 4, 4, 3, pads=1))
        net.output(net.bn(net.conv(x, 4, 4), 4))

    _, report = merged(draw)
    assert sum(layer.verdict == "kept" for layer in report.layers) == report.batchnorms.after


@pytest.mark.parametrize("clone", [False, True])
def test_blocks_behind_each_other(clone: bool) -> None:
    """Every other call doubles a sum, and the doubled sum merges too."""

    def draw(net: Net) -> None:
        x = net.input("N", 3, "L")
        first = net.op("Add", net.bn(net.conv(x, 3, 3, 1, dims=1), 3), net.bn(x, 3))
        second = net.conv(first, 3, 3, 3, dims=1, pads=1)
        net.output(net.op("Add", net.bn(second, 3), net.bn(first, 3)))

    _, report = merged(draw, clone=clone)
    assert report.batchnorms.after == 0


@pytest.mark.parametrize(("dtype", "large"), [("float16", 4e4), ("bfloat16", 3e38)])
@pytest.mark.parametrize("role", ["weight", "bias"])
def test_branches_whose_sum_overflows_stay_apart(dtype: str, large: float, role: str) -> None:
    def draw(net: Net) -> None:
        x = net.input("N", 2, "H", "W")
        kernels = net.normal(2, 2, 1, 1), np.full((2, 2, 1, 1), large)
        biases = np.full(2, large), net.normal(2)
        weight, bias = (net.weight(array) for array in (kernels[role == "weight"], biases[role == "weight"]))
        net.output(net.bn(net.op("Add", net.op("Conv", x, weight, bias), net.op("Conv", x, weight, bias)), params=unit(net)))

    model = Net("overflow", dtype=dtype, opset=22)
    draw(model)
    fused, report = bnfold.fuse(model.model())
    assert report.merged == ()
    assert (report.batchnorms.after, operators(fused)["Conv"]) == (0, 2)


def unit(net: Net) -> tuple[str, ...]:
    """A BatchNorm that does next to nothing."""
    return tuple(net.weight(array) for array in (np.ones(2), np.zeros(2), np.zeros(2), np.ones(2)))
