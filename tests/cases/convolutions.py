"""A BatchNorm straight behind a convolution, a transposed convolution or a Conv of a special form (lines 1, 2)."""

from __future__ import annotations

from functools import partial
from typing import Any

from .builder import Net
from .case import Theme

CASES = Theme()
SPATIAL = {1: ("L",), 2: ("H", "W"), 3: (5, 4, 6)}
OPSETS = (6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 21, 22, 23, 24)


def conv_bn(
    net: Net, *, cin: int = 4, cout: int = 6, dims: int = 2, groups: int = 1, bias: bool = True, epsilon: float | None = 1e-2, **attrs: Any
) -> None:
    x = net.input("N", cin, *SPATIAL[dims])
    net.output(net.bn(net.conv(x, cin, cout, 3 if dims < 3 else 2, dims=dims, groups=groups, bias=bias, **attrs), cout, epsilon=epsilon))


def conv_transpose_bn(net: Net, *, cin: int = 4, cout: int = 6, dims: int = 2, groups: int = 1, bias: bool = True) -> None:
    x = net.input("N", cin, *SPATIAL[dims])
    net.output(net.bn(net.conv_transpose(x, cin, cout, dims=dims, groups=groups, bias=bias, strides=[2] * dims, pads=[1] * 2 * dims), cout))


for dims in (1, 2, 3):
    for bias in (False, True):
        what = "with" if bias else "without"
        CASES.case(
            f"conv {dims}-d {what} bias",
            1,
            draw=partial(conv_bn, dims=dims, bias=bias),
            torch=lambda nn, d=dims, b=bias: nn.Sequential(getattr(nn, f"Conv{d}d")(4, 6, 3, bias=b), getattr(nn, f"BatchNorm{d}d")(6)),
            example=((3, 4, 9, 7, 6)[: dims + 2],),
        )
        CASES.case(
            f"conv transpose {dims}-d {what} bias",
            2,
            draw=partial(conv_transpose_bn, dims=dims, bias=bias),
            torch=lambda nn, d=dims, b=bias: nn.Sequential(
                getattr(nn, f"ConvTranspose{d}d")(4, 6, 3, 2, bias=b), getattr(nn, f"BatchNorm{d}d")(6)
            ),
            example=((3, 4, 5, 4, 3)[: dims + 2],),
        )

for groups, cin, cout in ((2, 4, 6), (4, 4, 4), (4, 4, 8), (2, 8, 2)):
    CASES.case(
        f"conv of {groups} groups {cin} to {cout}",
        1,
        draw=partial(conv_bn, cin=cin, cout=cout, groups=groups),
        torch=lambda nn, g=groups, i=cin, o=cout: nn.Sequential(nn.Conv2d(i, o, 3, groups=g), nn.BatchNorm2d(o)),
        example=((2, cin, 9, 7),),
    )
    CASES.case(
        f"conv transpose of {groups} groups {cin} to {cout}",
        2,
        draw=partial(conv_transpose_bn, cin=cin, cout=cout, groups=groups),
        torch=lambda nn, g=groups, i=cin, o=cout: nn.Sequential(nn.ConvTranspose2d(i, o, 3, 2, groups=g), nn.BatchNorm2d(o)),
        example=((2, cin, 5, 4),),
    )

CASES.case("conv transpose with equal channels", 2, draw=partial(conv_transpose_bn, cin=5, cout=5))
CASES.case("conv transpose 1-d depthwise", 2, draw=partial(conv_transpose_bn, cin=4, cout=4, groups=4, dims=1, bias=False))
CASES.case("conv to one channel", 1, draw=partial(conv_bn, cout=1))
CASES.case("conv from one channel", 1, draw=partial(conv_bn, cin=1))
CASES.case("conv with equal channels and stride", 1, draw=partial(conv_bn, cin=5, cout=5, strides=[2, 2], pads=1))
CASES.case("conv with dilation", 1, draw=partial(conv_bn, dilations=[2, 2]))
CASES.case("conv with padding", 1, draw=partial(conv_bn, pads=1))
CASES.case("conv with auto_pad", 1, draw=partial(conv_bn, auto_pad="SAME_UPPER"))
CASES.case("conv with default epsilon", 1, draw=partial(conv_bn, epsilon=None))
CASES.case("conv with epsilon 0", 1, draw=partial(conv_bn, epsilon=0.0))

for opset in OPSETS:
    CASES.case(f"conv at opset {opset}", 1, draw=conv_bn, opset=opset, ort=opset > 6)
for opset in (6, 9, 11, 22):
    CASES.case(f"conv transpose at opset {opset}", 2, draw=partial(conv_transpose_bn, groups=2), opset=opset, ort=opset > 6)


@CASES.case("conv with an empty bias", 1)
def _(net: Net) -> None:
    net.output(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6, bias=""), 6))


@CASES.case("conv on a fixed batch of one", 1)
def _(net: Net) -> None:
    net.output(net.bn(net.conv(net.input(1, 4, 8, 8), 4, 6), 6))


@CASES.case("conv whose output is as wide as it has channels", 1)
def _(net: Net) -> None:
    net.output(net.bn(net.conv(net.input(6, 4, 8, 8), 4, 6), 6))


@CASES.case("conv without kernel_shape", 1)
def _(net: Net) -> None:
    net.output(net.bn(net.op("Conv", net.input("N", 4, "H", "W"), net.filters(6, 4, 3, 2), net.bias(6)), 6))


@CASES.case("a chain of three conv and BatchNorm", 1, torch=lambda nn: nn.Sequential(*_stack(nn)), example=((2, 3, 9, 8),))
def _(net: Net) -> None:
    x = net.input("N", 3, "H", "W")
    for cin, cout in ((3, 5), (5, 4), (4, 6)):
        x = net.relu(net.bn(net.conv(x, cin, cout, pads=1, bias=cin == 4), cout))
    net.output(x)


def _stack(nn: Any) -> list[Any]:
    return [f for i, o in ((3, 5), (5, 4), (4, 6)) for f in (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())]


@CASES.case("residual block with a downsample branch", 1, 19)
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    y = net.relu(net.bn(net.conv(x, 4, 6, pads=1, strides=[2, 2], bias=False), 6))
    y = net.bn(net.conv(y, 6, 6, pads=1, bias=False), 6)
    net.output(net.relu(net.op("Add", y, net.bn(net.conv(x, 4, 6, 1, strides=[2, 2], bias=False), 6))))


# --- deformable: linear in its weight, wherever it reads ------------------------------------------


def deformed(net: Net, x: str, cin: int, cout: int, *, groups: int = 1, masked: bool = True, bias: bool = True) -> str:
    """The offsets, and how much each tap counts, are computed from the same input by small convolutions."""
    taps = 3 * 2
    offset = net.conv(x, cin, 2 * 2 * taps, pads=1)
    steers = [net.op("Sigmoid", net.conv(x, cin, 2 * taps, pads=1))] if masked else []
    w, b = net.filters(cout, cin, 3, 2, groups=groups), net.bias(cout) if bias else ""
    return net.op("DeformConv", x, w, offset, *[b] * (bias or masked), *steers, group=groups, offset_group=2, pads=[1, 0, 1, 1])


def deform_bn(net: Net, **options: Any) -> None:
    net.output(net.bn(deformed(net, net.input("N", 4, "H", "W"), 4, 6, **options), 6), shape=["N", 6, "H", "W"])


CASES.case("DeformConv", 57, draw=deform_bn, opset=19)
CASES.case("DeformConv in groups, without mask and bias", 57, draw=partial(deform_bn, groups=2, masked=False, bias=False), opset=22)
CASES.case("DeformConv with a mask and no bias", 57, draw=partial(deform_bn, bias=False), opset=19)


def bn_deform(net: Net, *, shift: bool = False, own: bool = False) -> None:
    """Before a deformable convolution: what steers it must not change, and beyond the border it reads zeros."""
    x, z = net.input("N", 4, "H", "W"), net.input("N", 4, "H", "W", name="z")
    y = net.bn(net.op("Sigmoid", x), 4, shift=shift)
    offset = net.conv(y if own else z, 4, 12, pads=1)
    y = net.op("DeformConv", y, net.filters(6, 4, 3, 2), offset, net.bias(6), offset_group=1, pads=[1, 0, 1, 1])
    net.output(y, shape=["N", 6, "H", "W"])


CASES.case("BatchNorm without shift before a DeformConv", 57, draw=bn_deform, opset=19)
CASES.case("BatchNorm without shift before a DeformConv and what steers it", 57, draw=partial(bn_deform, own=True), opset=19)
CASES.case("BatchNorm before a DeformConv", 57, draw=partial(bn_deform, shift=True), opset=19, left=1, reason="zeros beyond the border")


@CASES.case("BatchNorm of what steers a DeformConv", 57, opset=19, left=1, reason="the places that it reads")
def _(net: Net) -> None:
    x, z = net.input("N", 4, "H", "W"), net.input("N", 12, "H", "W", name="z")
    offset = net.bn(net.op("Sigmoid", z), 12, shift=False)
    net.output(net.op("DeformConv", x, net.filters(6, 4, 3, 2), offset, offset_group=1, pads=[1, 0, 1, 1]), shape=["N", 6, "H", "W"])


# --- what ONNX Runtime writes where it optimises ------------------------------------------------------

MICROSOFT = "com.microsoft"


def fused_conv(net: Net, x: str, cin: int, cout: int, activation: str = "", *rest: str, **attrs: Any) -> str:
    given = {"activation": activation} if activation else {}
    return net.op("FusedConv", x, net.filters(cout, cin, 3, 3), net.bias(cout), *rest, domain=MICROSOFT, **given, **attrs)


@CASES.case("FusedConv with Relu, a BatchNorm that stretches", 1)
def _(net: Net) -> None:
    y = net.bn(fused_conv(net, net.input("N", 4, "H", "W"), 4, 6, "Relu"), 6, positive=True, shift=False)
    net.output(y, shape=["N", 6, "H", "W"])


@CASES.case("FusedConv with Relu, a BatchNorm that moves", 1, left=1, reason="Relu .*shift is not zero")
def _(net: Net) -> None:
    net.output(net.bn(fused_conv(net, net.input("N", 4, "H", "W"), 4, 6, "Relu"), 6, positive=True), shape=["N", 6, "H", "W"])


@CASES.case("FusedConv that adds another convolution", 1)
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    net.output(net.bn(fused_conv(net, x, 4, 6, "", net.conv(x, 4, 6)), 6), shape=["N", 6, "H", "W"])


@CASES.case("BatchNorm between two FusedConvs", 1)
def _(net: Net) -> None:
    y = net.bn(fused_conv(net, net.input("N", 4, "H", "W"), 4, 6, "LeakyRelu", activation_params=[0.2]), 6)
    net.output(fused_conv(net, y, 6, 3, "Clip", activation_params=[0.0, 6.0]), shape=["N", 3, "H", "W"])


@CASES.case("FusedConv with Sigmoid", 1, left=1, reason="Sigmoid .*no rule")
def _(net: Net) -> None:
    net.output(net.bn(fused_conv(net, net.input("N", 4, "H", "W"), 4, 6, "Sigmoid"), 6), shape=["N", 6, "H", "W"])


@CASES.case("FusedGemm before and behind a BatchNorm", 5)
def _(net: Net) -> None:
    x = net.input("N", 5)
    y = net.op("FusedGemm", x, net.matrix(5, 6), net.bias(6), domain=MICROSOFT, activation="Tanh")
    z = net.op("FusedGemm", net.bn(y, 6), net.matrix(4, 6), net.bias(4), domain=MICROSOFT, activation="Relu", transB=1, alpha=0.5)
    net.output(net.bn(z, 4, positive=True, shift=False), shape=["N", 4])


@CASES.case("FusedMatMul with a factor", 6, after={"Add": 1})
def _(net: Net) -> None:
    y = net.op("FusedMatMul", net.input("N", 5), net.matrix(6, 5), domain=MICROSOFT, transB=1, alpha=0.5)
    net.output(net.bn(y, 6), shape=["N", 6])


@CASES.case("FusedMatMul that transposes its input", 6)
def _(net: Net) -> None:
    y = net.op("FusedMatMul", net.bn(net.op("Sigmoid", net.input("N", 5, 3)), 5), net.matrix(5, 4), domain=MICROSOFT, transA=1, alpha=2.0)
    net.output(net.op("Add", y, net.bias(4)), shape=["N", 3, 4])


@CASES.case("FusedMatMul with its weight on the left", 6)
def _(net: Net) -> None:
    y = net.op("FusedMatMul", net.matrix(5, 6), net.input("N", 5, 3), domain=MICROSOFT, transA=1)
    net.output(net.bn(y, 6), shape=["N", 6, 3])
