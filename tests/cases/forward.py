"""A BatchNorm that stands before what could absorb it (lines 22 to 32)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .builder import Net
from .case import Theme

CASES = Theme()
PADDED = r"shift|pad"


# --- BatchNorm, then a convolution (lines 22, 23, 32) ---------------------------------------------------


def bn_conv(net: Net, *, dims: int = 2, groups: int = 1, bias: bool = True, shift: bool = True, kernel: int = 3, **attrs: Any) -> None:
    """A BatchNorm on the input, so that it can only go forward."""
    x = net.input("N", 4, *{1: ("L",), 2: ("H", "W"), 3: (5, 4, 6)}[dims])
    net.output(net.conv(net.bn(x, 4, shift=shift), 4, 6, kernel, dims=dims, groups=groups, bias=bias, **attrs))


for dims in (1, 2, 3):
    CASES.case(
        f"BatchNorm before a conv {dims}-d",
        22,
        32,
        draw=partial(bn_conv, dims=dims),
        torch=lambda nn, d=dims: nn.Sequential(getattr(nn, f"BatchNorm{d}d")(4), getattr(nn, f"Conv{d}d")(4, 6, 3)),
        example=((3, 4, 9, 7, 6)[: dims + 2],),
    )
CASES.case("BatchNorm before a conv without bias", 22, 32, draw=partial(bn_conv, bias=False))
CASES.case("BatchNorm before a conv of two groups", 22, 32, draw=partial(bn_conv, groups=2))
CASES.case("BatchNorm before a conv of kernel 1", 22, draw=partial(bn_conv, kernel=1))
CASES.case("BatchNorm before a strided, dilated conv", 22, draw=partial(bn_conv, kernel=2, strides=[2, 1], dilations=[1, 2]))
CASES.case("BatchNorm before a VALID conv", 22, draw=partial(bn_conv, auto_pad="VALID"))
CASES.case(
    "BatchNorm before a padded conv",
    23,
    32,
    draw=partial(bn_conv, pads=1),
    left=1,
    reason=PADDED,
    torch=lambda nn: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)),
    example=((2, 4, 8, 7),),
)
CASES.case("BatchNorm before a conv with auto_pad SAME_UPPER", 23, draw=partial(bn_conv, auto_pad="SAME_UPPER"), left=1, reason=PADDED)
CASES.case("BatchNorm before a conv with auto_pad SAME_LOWER", 23, draw=partial(bn_conv, auto_pad="SAME_LOWER"), left=1, reason=PADDED)
CASES.case("BatchNorm without shift before a padded conv", 23, draw=partial(bn_conv, pads=1, shift=False))
CASES.case("BatchNorm without shift before a padded conv of two groups", 23, draw=partial(bn_conv, pads=1, shift=False, groups=2))
for opset in (6, 9, 11, 15, 22):
    CASES.case(f"BatchNorm before a conv at opset {opset}", 22, draw=bn_conv, opset=opset, ort=opset > 6)


def conv_relu_bn_conv(net: Net, *, pads: int = 0, groups: int = 1, kernel: int = 3) -> None:
    y = net.relu(net.conv(net.input("N", 3, "H", "W"), 3, 4, pads=1))
    net.output(net.conv(net.bn(y, 4), 4, 6, kernel, pads=pads, groups=groups))


CASES.case(
    "conv, Relu, BatchNorm, conv",
    22,
    draw=conv_relu_bn_conv,
    torch=lambda nn: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)),
    example=((2, 3, 8, 7),),
)
CASES.case("conv, Relu, BatchNorm, pointwise conv", 22, draw=partial(conv_relu_bn_conv, kernel=1))
CASES.case("conv, Relu, BatchNorm, depthwise conv", 22, draw=lambda net: net.output(_depthwise(net)))
CASES.case("conv, Relu, BatchNorm, conv of two groups", 22, draw=partial(conv_relu_bn_conv, groups=2))
CASES.case("conv, Relu, BatchNorm, padded conv", 23, draw=partial(conv_relu_bn_conv, pads=1), left=1, reason=PADDED)


def _depthwise(net: Net) -> str:
    y = net.relu(net.conv(net.input("N", 3, "H", "W"), 3, 4))
    return net.conv(net.bn(y, 4), 4, 8, groups=4)


@CASES.case("preprocessing by Sub and Div before a BatchNorm and a conv", 32, 33)
def _(net: Net) -> None:
    x = net.op("Sub", net.input("N", 3, "H", "W"), net.weight(net.normal(1, 3, 1, 1), "mean"))
    x = net.op("Div", x, net.weight(net.rng.uniform(0.5, 2, (1, 3, 1, 1)), "std"))
    net.output(net.conv(net.bn(x, 3), 3, 4))


@CASES.case("BatchNorm before Pad and a conv", 23, left=1, reason=r"shift|pad|Pad|fill")
def _(net: Net) -> None:
    x = net.bn(net.relu(net.input("N", 4, "H", "W")), 4)
    net.output(net.conv(net.pad(x, 0, 0, 1, 1, 0, 0, 1, 1), 4, 6))


@CASES.case("BatchNorm before a reflect Pad and a conv", 49, 22)
def _(net: Net) -> None:
    x = net.bn(net.relu(net.input("N", 4, "H", "W")), 4)
    net.output(net.conv(net.pad(x, 0, 0, 1, 1, 0, 0, 1, 1, mode="reflect"), 4, 6))


# --- BatchNorm, activation, layer (lines 24, 25) ----------------------------------------------------------


def preactivation(
    net: Net, *, activation: str = "Relu", positive: bool = True, shift: bool = True, constants: tuple[float | None, ...] = ()
) -> None:
    x = net.bn(net.input("N", 4, "H", "W"), 4, positive=positive, shift=shift)
    if activation == "PRelu":
        y = net.op("PRelu", x, net.weight(net.rng.uniform(0.1, 0.5, (4, 1, 1)), "slope"))
    elif activation == "Clip":
        y = net.op("Clip", x, *("" if c is None else net.scalar(c) for c in constants))
    else:
        y = net.op(activation, x)
    net.output(net.conv(y, 4, 6, pads=1))


CASES.case(
    "BatchNorm, Relu, conv",
    24,
    draw=preactivation,
    left=1,
    reason="shift",
    torch=lambda nn: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1)),
    example=((2, 4, 8, 7),),
)
CASES.case("BatchNorm without shift, Relu, conv", 24, draw=partial(preactivation, shift=False))
CASES.case(
    "BatchNorm without shift, Relu, conv, scales of both signs",
    24,
    draw=partial(preactivation, shift=False, positive=False),
    left=1,
    reason="negative",
)
CASES.case("BatchNorm, LeakyRelu, conv", 25, draw=partial(preactivation, activation="LeakyRelu"), left=1, reason="shift")
CASES.case("BatchNorm without shift, LeakyRelu, conv", 25, draw=partial(preactivation, activation="LeakyRelu", shift=False))
CASES.case("BatchNorm without shift, PRelu, conv", 25, draw=partial(preactivation, activation="PRelu", shift=False))
CASES.case(
    "BatchNorm without shift, Clip to 6, conv",
    25,
    draw=partial(preactivation, activation="Clip", shift=False, constants=(0.0, 0.5)),
    left=1,
    reason="Clip",
)
CASES.case("BatchNorm without shift, Clip from 0, conv", 25, draw=partial(preactivation, activation="Clip", shift=False, constants=(0.0,)))
CASES.case("BatchNorm, Clip from 0, conv", 25, draw=partial(preactivation, activation="Clip", constants=(0.0,)), left=1, reason="shift")
CASES.case("BatchNorm, Sigmoid, conv", 25, draw=partial(preactivation, activation="Sigmoid", shift=False), left=1, reason="Sigmoid")
CASES.case("BatchNorm, HardSwish, conv", 25, draw=partial(preactivation, activation="HardSwish"), left=1, reason="HardSwish")


@CASES.case("pre-activation block: conv, BatchNorm, Relu, conv with a skip behind", 24, 1)
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    y = net.relu(net.bn(net.conv(x, 4, 4, pads=1), 4))
    net.output(net.op("Add", net.conv(y, 4, 4, pads=1), x))


# --- BatchNorm, pooling, layer (line 26) --------------------------------------------------------------------


@CASES.case("BatchNorm, MaxPool, conv", 26)
def _(net: Net) -> None:
    x = net.op("MaxPool", net.bn(net.input("N", 4, "H", "W"), 4, positive=True), kernel_shape=[2, 2])
    net.output(net.conv(x, 4, 6))


@CASES.case("BatchNorm with scales of both signs, MaxPool, conv", 26, left=1, reason="negative")
def _(net: Net) -> None:
    x = net.op("MaxPool", net.bn(net.input("N", 4, "H", "W"), 4), kernel_shape=[2, 2])
    net.output(net.conv(x, 4, 6))


@CASES.case(
    "BatchNorm, GlobalAveragePool, Flatten, gemm",
    26,
    torch=lambda nn: nn.Sequential(nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    example=((2, 4, 6, 5),),
)
def _(net: Net) -> None:
    x = net.op("Flatten", net.op("GlobalAveragePool", net.bn(net.input("N", 4, "H", "W"), 4)))
    net.output(net.gemm(x, 4, 3, transB=1))


@CASES.case("BatchNorm, AveragePool, conv", 26)
def _(net: Net) -> None:
    x = net.op("AveragePool", net.bn(net.input("N", 4, "H", "W"), 4), kernel_shape=[2, 2], strides=[2, 2])
    net.output(net.conv(x, 4, 6, bias=False))


@CASES.case("BatchNorm, Relu, GlobalAveragePool, gemm", 24, 26, left=1, reason="shift")
def _(net: Net) -> None:
    """The head of a DenseNet."""
    x = net.relu(net.bn(net.input("N", 4, "H", "W"), 4, positive=True))
    net.output(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", x)), 4, 3))


# --- BatchNorm, dense layer (line 27) -------------------------------------------------------------------------


def bn_gemm(net: Net, *, k: int = 4, c: tuple[int, ...] | None = (6,), rows: int | str = "N", **attrs: Any) -> None:
    bias = False if c is None else net.weight(net.normal(*c), "bias")
    net.output(net.gemm(net.bn(net.input(rows, k), k), k, 6, bias=bias, **attrs))


CASES.case(
    "BatchNorm before a gemm", 27, draw=bn_gemm, torch=lambda nn: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6)), example=((5, 4),)
)
CASES.case("BatchNorm before a gemm without bias", 27, draw=partial(bn_gemm, c=None))
CASES.case("BatchNorm before a square gemm with transB", 27, draw=partial(bn_gemm, k=6, transB=1))
CASES.case("BatchNorm before a gemm with alpha and beta", 27, draw=partial(bn_gemm, alpha=0.6, beta=-2.0))
CASES.case("BatchNorm before a gemm with beta 0", 27, draw=partial(bn_gemm, beta=0.0, alpha=1.5))
CASES.case("BatchNorm before a gemm with a scalar bias", 27, draw=partial(bn_gemm, c=()))
CASES.case("BatchNorm before a gemm with a matrix of bias", 27, draw=partial(bn_gemm, c=(3, 6), rows=3))
CASES.case("BatchNorm before a gemm with alpha 0", 27, draw=partial(bn_gemm, alpha=0.0), lively=False, left=1, reason="alpha")


@CASES.case("BatchNorm before a gemm with transA", 27, left=1, reason=r"ax[ie]s|rows|output")
def _(net: Net) -> None:
    """Axis 1 of the data is then the row of the product."""
    net.output(net.gemm(net.bn(net.input(4, 5), 5), 4, 6, transA=1))


@CASES.case("BatchNorm before a matmul without an Add", 4, 27, after={"Add": 1})
def _(net: Net) -> None:
    net.output(net.op("MatMul", net.bn(net.input("N", 4), 4), net.matrix(4, 6)))


@CASES.case("BatchNorm before a matmul and an Add", 27)
def _(net: Net) -> None:
    net.output(net.op("Add", net.bias(6), net.op("MatMul", net.bn(net.input("N", 4), 4), net.matrix(4, 6))))


@CASES.case("BatchNorm before a weight on the left", 8, 27)
def _(net: Net) -> None:
    """[6, 4] x [N, 4, L]: the rows of the data are the channels."""
    net.output(net.op("MatMul", net.matrix(6, 4), net.bn(net.input("N", 4, "L"), 4)))


@CASES.case("BatchNorm, Dropout, Flatten, gemm", 7, 11, 27)
def _(net: Net) -> None:
    x = net.op("Flatten", net.dropout(net.bn(net.input("N", 4, 3, 2), 4)))
    net.output(net.gemm(x, 24, 5))


@CASES.case("BatchNorm, Flatten of dynamic sizes, gemm", 7, 27)
def _(net: Net) -> None:
    x = net.op("Flatten", net.op("GlobalMaxPool", net.bn(net.input("N", 4, "H", "W"), 4, positive=True)))
    net.output(net.gemm(x, 4, 5))


@CASES.case("BatchNorm, Transpose, dense layer on tokens", 6, 27)
def _(net: Net) -> None:
    x = net.transpose(net.bn(net.input("N", 4, "L"), 4), 0, 2, 1)
    net.output(net.op("Add", net.op("MatMul", x, net.matrix(4, 6)), net.bias(6)))


@CASES.case("BatchNorm over a length that the dense layer doesn't touch", 6, 27, left=1, reason=r"ax[ie]s|output")
def _(net: Net) -> None:
    net.output(net.op("Add", net.op("MatMul", net.bn(net.input("N", 4, 4), 4), net.matrix(4, 6)), net.bias(6)))


@CASES.case("BatchNorm before an Einsum", 10, 27, after={"Add": 1})
def _(net: Net) -> None:
    net.output(net.op("Einsum", net.bn(net.input("N", 4, "L"), 4), net.matrix(4, 6), equation="nkl,kc->ncl"))


# --- several consumers (line 28) ---------------------------------------------------------------------------------


def fan_out(net: Net, *, pads: int = 0, last: str = "conv") -> None:
    x = net.bn(net.relu(net.input("N", 4, "H", "W")), 4)
    first, second = net.conv(x, 4, 6), net.conv(x, 4, 3, pads=pads)
    net.output(first, second)
    if last == "output":
        net.output(x)
    elif last == "Sigmoid":
        net.output(net.op("Sigmoid", x))


CASES.case("BatchNorm before two convs", 28, draw=fan_out)
CASES.case("BatchNorm before two convs, one padded", 28, 23, draw=partial(fan_out, pads=1), left=1, reason=PADDED)
CASES.case("BatchNorm before two convs and a Sigmoid", 28, draw=partial(fan_out, last="Sigmoid"), left=1, reason="Sigmoid")
CASES.case("BatchNorm before two convs, itself an output", 28, draw=partial(fan_out, last="output"), left=1, reason="output")


@CASES.case("BatchNorm before a conv and a global gemm", 28)
def _(net: Net) -> None:
    x = net.bn(net.relu(net.input("N", 4, "H", "W")), 4)
    net.output(net.conv(x, 4, 6), net.gemm(net.op("Flatten", net.op("GlobalAveragePool", x)), 4, 3))


@CASES.case("BatchNorm into two layers that share a weight", 28, 38)
def _(net: Net) -> None:
    x = net.bn(net.relu(net.input("N", 4, "H", "W")), 4)
    w = net.filters(6, 4, 3, 3)
    net.output(net.conv(x, 4, 6, weight=w), net.conv(x, 4, 6, weight=w, strides=[2, 2]))


# --- Concat, recurrences, ConvTranspose (lines 29 to 31) ------------------------------------------------------------


@CASES.case("BatchNorm of numbers, beside embeddings, before a gemm", 29)
def _(net: Net) -> None:
    """The tabular network of fastai: only the matching rows of the weight change."""
    numbers = net.bn(net.input("N", 5), 5)
    embedded = net.op("Gather", net.matrix(4, 3), net.input("N", name="category", dtype="int64"))
    net.output(net.gemm(net.op("Concat", embedded, numbers, axis=1), 8, 6))


@CASES.case("BatchNorms on both sides of a Concat before a conv", 29)
def _(net: Net) -> None:
    x, z = net.input("N", 2, "H", "W"), net.input("N", 3, "H", "W", name="z")
    net.output(net.conv(net.op("Concat", net.bn(x, 2), net.bn(z, 3), axis=1), 5, 4))


def recurrent(net: Net, *, kind: str = "LSTM", direction: str = "forward", bias: bool = True, lengths: bool = False, **attrs: Any) -> None:
    gates, both = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], 2 if direction == "bidirectional" else 1
    x = net.transpose(net.bn(net.input("N", 4, "L"), 4), 2, 0, 1)
    w = net.weight(net.normal(both, gates * 5, 4, scale=0.5), "W")
    r = net.weight(net.normal(both, gates * 5, 5, scale=0.4), "R")
    b = net.weight(net.normal(both, 2 * gates * 5), "B") if bias else ""
    steps = [net.input("N", name="lengths", dtype="int32")] * lengths
    hidden = net.ops(kind, x, w, r, b, *steps, outputs=2, hidden_size=5, direction=direction, **attrs)
    net.output(*hidden)


for kind in ("LSTM", "GRU", "RNN"):
    for direction in ("forward", "reverse", "bidirectional"):
        ort = True
        CASES.case(f"BatchNorm before a {direction} {kind}", 30, draw=partial(recurrent, kind=kind, direction=direction), ort=ort, opset=14)
    CASES.case(f"BatchNorm before a {kind} without bias", 30, draw=partial(recurrent, kind=kind, bias=False), opset=14)
CASES.case("BatchNorm before a GRU with linear_before_reset", 30, draw=partial(recurrent, kind="GRU", linear_before_reset=1), opset=14)
CASES.case("BatchNorm before an LSTM at opset 7", 30, draw=recurrent, opset=7)
CASES.case("BatchNorm before an LSTM with lengths", 30, draw=partial(recurrent, lengths=True), opset=14, below=4)


def bn_conv_transpose(net: Net, *, shift: bool = True, groups: int = 1, **attrs: Any) -> None:
    net.output(net.conv_transpose(net.bn(net.input("N", 4, "H", "W"), 4, shift=shift), 4, 6, groups=groups, **attrs))


CASES.case("BatchNorm before a ConvTranspose", 31, draw=bn_conv_transpose, left=1, reason="shift")
CASES.case("BatchNorm before a strided ConvTranspose", 31, draw=partial(bn_conv_transpose, strides=[2, 2]), left=1, reason="shift")
CASES.case("BatchNorm without shift before a ConvTranspose", 31, draw=partial(bn_conv_transpose, shift=False, strides=[2, 2]))
CASES.case("BatchNorm without shift before a grouped ConvTranspose", 31, draw=partial(bn_conv_transpose, shift=False, groups=2))


@CASES.case("BatchNorm before an Add of a constant and a gemm", 27, 33)
def _(net: Net) -> None:
    x = net.op("Add", net.bn(net.input("N", 4), 4), net.weight(np.array([1.0, -2.0, 0.5, 3.0]), "c"))
    net.output(net.gemm(x, 4, 5))
