"""Sums, products and chains of affine maps around a BatchNorm (lines 19, 20, 21, 33)."""

from __future__ import annotations

from functools import partial

import numpy as np

from .builder import Net
from .case import Theme

CASES = Theme()


# --- sums (lines 19, 20) -----------------------------------------------------------------------------


def add_bn(net: Net, *, op: str = "Add", biases: tuple[bool, bool] = (True, True), flip: bool = False) -> None:
    x = net.input("N", 4, "H", "W")
    ys = [net.conv(x, 4, 6, kernel, pads=kernel // 2, strides=[2, 2], bias=b) for kernel, b in zip((3, 5), biases, strict=True)]
    net.output(net.bn(net.op(op, *(ys[::-1] if flip else ys)), 6))


CASES.case("Add of two convs", 19, draw=add_bn)
CASES.case("Add of two convs without bias", 19, draw=partial(add_bn, biases=(False, False)))
CASES.case("Add of two convs, the second with bias", 19, draw=partial(add_bn, biases=(False, True), flip=True))
CASES.case("Sub of two convs", 19, draw=partial(add_bn, op="Sub"))
CASES.case("Sum of two convs", 19, draw=partial(add_bn, op="Sum"))
CASES.case("Add at opset 6", 19, draw=add_bn, opset=6, ort=False)


@CASES.case("Sum of three convs", 19)
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    net.output(net.bn(net.op("Sum", *(net.conv(net.relu(x), 4, 6, k, pads=k // 2, strides=[2, 2]) for k in (1, 3, 5))), 6))


@CASES.case("Add of a conv and a pooled conv that broadcasts", 19, 12)
def _(net: Net) -> None:
    """Only the scale goes into the global branch: (1, 6, 1, 1) against (1, 6, H, W)."""
    x = net.input("N", 4, "H", "W")
    pooled = net.op("GlobalAveragePool", net.conv(x, 4, 6))
    net.output(net.bn(net.op("Add", pooled, net.conv(x, 4, 6)), 6))


@CASES.case("Add of a conv and a single map that broadcasts over channels", 19, left=1, reason=r"broadcast|axis")
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    net.output(net.bn(net.op("Add", net.conv(x, 4, 6), net.conv(x, 4, 1)), 6))


@CASES.case("Add of two matmuls", 4, 19)
def _(net: Net) -> None:
    x = net.input("N", 4)
    net.output(net.bn(net.op("Add", net.op("MatMul", x, net.matrix(4, 6)), net.op("MatMul", x, net.matrix(4, 6))), 6))


@CASES.case("Add of a conv to itself", 19, left=1, reason=r"used|elsewhere|twice|users")
def _(net: Net) -> None:
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    net.output(net.bn(net.op("Add", y, y), 6))


@CASES.case("Add of a conv and a skip connection", 20, left=1, reason=r"input")
def _(net: Net) -> None:
    """The block of a ResNet v2: the skip reads another value than the conv."""
    x = net.input("N", 6, "H", "W")
    net.output(net.bn(net.op("Add", net.conv(net.relu(x), 6, 6, pads=1), x), 6))


@CASES.case("Add of a conv and of its own input, which merge", 20, after={"Conv": 1, "Add": 0})
def _(net: Net) -> None:
    """x is a convolution of x with the unit kernel, so the sum is one convolution, and the BatchNorm goes into that."""
    x = net.input("N", 6, "H", "W")
    net.output(net.bn(net.op("Add", net.conv(x, 6, 6, pads=1), x), 6))


@CASES.case("Add of a conv and a skip connection, folded forward", 20, 22)
def _(net: Net) -> None:
    x = net.input("N", 6, "H", "W")
    net.output(net.conv(net.bn(net.op("Add", net.conv(net.relu(x), 6, 6, pads=1), x), 6), 6, 3))


@CASES.case("three parallel branches of RepVGG", 19, after={"Conv": 1, "Add": 0})
def _(net: Net) -> None:
    x = net.input("N", 6, "H", "W")
    branches = net.bn(net.conv(x, 6, 6, 3, pads=1, bias=False), 6), net.bn(net.conv(x, 6, 6, 1, bias=False), 6), net.bn(x, 6)
    net.output(net.relu(net.op("Add", net.op("Add", *branches[:2]), branches[2])))


# --- products with gates (line 21) --------------------------------------------------------------------


def gated(net: Net, *, shift: bool = True, flip: bool = False) -> None:
    x = net.input("N", 4, "H", "W")
    gate = net.op("Sigmoid", net.conv(net.op("GlobalAveragePool", x), 4, 6, 1))
    y = net.conv(x, 4, 6)
    net.output(net.bn(net.op("Mul", *((gate, y) if flip else (y, gate))), 6, shift=shift))


CASES.case("gate on a conv", 21, draw=gated, left=1, reason=r"shift|Sigmoid")
CASES.case("gate on a conv, BatchNorm without shift", 21, draw=partial(gated, shift=False))
CASES.case("gate on a conv, gate first, without shift", 21, draw=partial(gated, shift=False, flip=True))


@CASES.case("square of a conv", 21, left=1, reason=r"used|elsewhere|twice|users|shift")
def _(net: Net) -> None:
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    net.output(net.bn(net.op("Mul", y, y), 6))


# --- chains of affine maps (line 33) ---------------------------------------------------------------------


@CASES.case("two BatchNorms in a row", 33)
def _(net: Net) -> None:
    net.output(net.bn(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6), 6))


@CASES.case("three BatchNorms in a row on a gemm", 33)
def _(net: Net) -> None:
    net.output(net.bn(net.bn(net.bn(net.gemm(net.input("N", 4), 4, 6), 6), 6), 6))


@CASES.case("two BatchNorms in a row on the input: one stays", 33, 47, left=1, reason=r"input|output")
def _(net: Net) -> None:
    net.output(net.bn(net.bn(net.input("N", 4, "H", "W"), 4), 4))


def chain(net: Net, *, ops: tuple[str, ...], before: bool, shape: tuple[int, ...] = (6, 1, 1)) -> None:
    """Constant arithmetic between a conv and its BatchNorm, or behind both; "-" before the name puts the constant first."""
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    y = y if before else net.bn(y, 6)
    for op in ops:
        c = net.weight(net.rng.uniform(0.5, 2.0, shape) * net.rng.choice([-1, 1], shape), "c")
        y = net.op(op.lstrip("-"), *((c, y) if op.startswith("-") else (y, c)))
    net.output(net.bn(y, 6) if before else y)


for before in (True, False):
    where = "before" if before else "behind"
    for ops in (
        ("Mul", "Add"),
        ("-Mul", "-Add"),
        ("Sub",),
        ("-Sub",),
        ("Div",),
        ("Sub", "Div", "Mul", "Add"),
        ("Add", "-Mul", "-Sub", "Div"),
    ):
        CASES.case(f"{' '.join(ops)} {where} the BatchNorm", 33, draw=partial(chain, ops=ops, before=before))
CASES.case("scalar Mul and Add before the BatchNorm", 33, draw=partial(chain, ops=("Mul", "Add"), before=True, shape=()))
CASES.case("Mul by (1, 6, 1, 1) before the BatchNorm", 33, draw=partial(chain, ops=("Mul", "-Sub"), before=True, shape=(1, 6, 1, 1)))
CASES.case("Mul and Add at opset 7", 33, draw=partial(chain, ops=("Mul", "Add"), before=True), opset=7)


@CASES.case("a constant over a conv before the BatchNorm", 33, left=1, reason=r"Div|rule")
def _(net: Net) -> None:
    """c / x is no affine map of x."""
    y = net.op("Div", net.weight(net.normal(6, 1, 1), "c"), net.op("Exp", net.conv(net.input("N", 4, "H", "W"), 4, 6)))
    net.output(net.bn(y, 6))


@CASES.case("negation before the BatchNorm", 33)
def _(net: Net) -> None:
    net.output(net.bn(net.op("Neg", net.conv(net.input("N", 4, "H", "W"), 4, 6)), 6))


@CASES.case("Mul and Add with axis and broadcast, opset 6", 33, 44, opset=6, ort=False)
def _(net: Net) -> None:
    """Caffe's Scale as old exporters wrote it: the constant (6,) lies along axis 1."""
    y = net.op("Mul", net.conv(net.input("N", 4, 8, 9), 4, 6), net.bias(6), axis=1, broadcast=1)
    net.output(net.bn(net.op("Add", y, net.bias(6), axis=1, broadcast=1), 6))


@CASES.case("Mul along the width with equal sizes", 33, left=0, after={"Mul": 1})
def _(net: Net) -> None:
    """A constant (6,) against (N, 6, H, 6) lies along W: it may not go into the conv, and the BatchNorm passes it or enters it."""
    y = net.op("Mul", net.bn(net.conv(net.input("N", 4, "H", 8), 4, 6), 6), net.bias(6))
    net.output(y)


@CASES.case("Mul along the width before the BatchNorm, equal sizes", 33)
def _(net: Net) -> None:
    """The scale commutes with the Mul and the shift stays behind as an Add, or the Mul becomes a (6, 1, 6) map: both are right."""
    y = net.op("Mul", net.conv(net.input("N", 4, "H", 8), 4, 6), net.bias(6))
    net.output(net.bn(net.op("Add", y, net.bias(6)), 6))


@CASES.case("frozen BatchNorm, then a live one", 33)
def _(net: Net) -> None:
    """Detectron's FrozenBatchNorm2d: scale and bias computed from its buffers in the graph."""
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6, bias=False)
    gamma, beta, mean, var = net.bn_params(6)
    scale = net.op("Mul", gamma, net.op("Reciprocal", net.op("Sqrt", net.op("Add", var, net.scalar(1e-3)))))
    shift = net.op("Sub", beta, net.op("Mul", mean, scale))
    y = net.op("Add", net.op("Mul", y, net.reshape(scale, 1, 6, 1, 1)), net.reshape(shift, 1, 6, 1, 1))
    net.output(net.bn(y, 6))


@CASES.case("LayerScale behind a BatchNorm, then a skip connection", 33)
def _(net: Net) -> None:
    x = net.input("N", 6, "H", "W")
    y = net.bn(net.conv(x, 6, 6, pads=1), 6)
    net.output(net.op("Add", x, net.op("Mul", y, net.weight(np.linspace(0.1, 0.4, 6).reshape(6, 1, 1), "layerscale"))))
