"""Other normalisations before a BatchNorm, and weights that are computed in the graph (lines 34, 46, 50)."""

from __future__ import annotations

from functools import partial

import numpy as np

from .builder import Net
from .case import Theme

CASES = Theme()


# --- Instance-, Group-, LayerNormalization (line 34) -----------------------------------------------------


@CASES.case("InstanceNormalization", 34)
def _(net: Net) -> None:
    y = net.op("InstanceNormalization", net.input("N", 4, "H", "W"), net.bias(4), net.bias(4))
    net.output(net.bn(y, 4))


CASES.case("InstanceNormalization at opset 6", 34, draw=lambda net: instance(net), opset=6, ort=False)
CASES.case("InstanceNormalization at opset 22", 34, draw=lambda net: instance(net), opset=22)


def instance(net: Net) -> None:
    net.output(net.bn(net.op("InstanceNormalization", net.input("N", 4, "H", "W"), net.bias(4), net.bias(4), epsilon=1e-3), 4))


@CASES.case("GroupNormalization with a scale per channel", 34, opset=21)
def _(net: Net) -> None:
    net.output(
        net.bn(net.op("GroupNormalization", net.input("N", 6, "H", "W"), net.bias(6), net.bias(6), num_groups=2), 6),
        shape=("N", 6, "H", "W"),
    )


@CASES.case("GroupNormalization of opset 25, whose type ONNX doesn't infer", 34, opset=25, dtype="float16", ort=False)
def _(net: Net) -> None:
    y = net.op("GroupNormalization", net.input("N", 6, "H", "W"), net.bias(6), net.bias(6), num_groups=2)
    net.output(net.bn(net.conv(net.op("Gather", y, net.ints(4, 1), axis=1), 2, 3, 1, bias=False), 3), shape=("N", 3, "H", "W"))


@CASES.case("GroupNormalization of opset 21, whose shape ONNX doesn't infer, before a Flatten and a Gemm", 34, opset=21)
def _(net: Net) -> None:
    y = net.op("GroupNormalization", net.input("N", 4, 3, 2), net.bias(4), net.bias(4), num_groups=2)
    net.output(net.gemm(net.op("Flatten", net.bn(net.op("Sigmoid", y), 4)), 24, 5), shape=("N", 5))


@CASES.case("GroupNormalization as torch writes it", 34)
def _(net: Net) -> None:
    """Reshape, InstanceNormalization of the groups, Reshape, Mul, Add."""
    one, zero = net.weight(np.ones(2), "one"), net.weight(np.zeros(2), "zero")
    y = net.op("InstanceNormalization", net.reshape(net.input("N", 6, 4, 5), 0, 2, -1), one, zero)
    y = net.op("Mul", net.reshape(y, -1, 6, 4, 5), net.weight(net.normal(6, 1, 1), "scale"))
    net.output(net.bn(net.op("Add", y, net.weight(net.normal(6, 1, 1), "bias")), 6))


def layernorm(net: Net, *, bias: bool = True) -> None:
    y = net.op("LayerNormalization", net.input("N", "L", 6), net.bias(6), *[net.bias(6)] * bias)
    net.output(net.bn(net.transpose(y, 0, 2, 1), 6))


CASES.case(
    "LayerNormalization over channels last",
    34,
    draw=layernorm,
    torch=lambda nn: nn.Sequential(nn.LayerNorm(6), nn.Flatten(0, 1), nn.BatchNorm1d(6)),
    example=((2, 5, 6),),
)
CASES.case("LayerNormalization without bias", 34, draw=partial(layernorm, bias=False))


@CASES.case("LayerNormalization over channels and space", 34)
def _(net: Net) -> None:
    """Its scale has the shape (4, 3, 5), so a map per channel fits."""
    y = net.op("LayerNormalization", net.input("N", 4, 3, 5), net.weight(net.normal(4, 3, 5)), net.weight(net.normal(4, 3, 5)), axis=1)
    net.output(net.bn(y, 4))


@CASES.case("LayerNormalization over another axis, sizes equal", 34, left=1, reason=r"ax[ie]s|input|channels")
def _(net: Net) -> None:
    net.output(net.bn(net.op("LayerNormalization", net.input("N", 6, 6), net.bias(6), net.bias(6)), 6))


@CASES.case("LpNormalization", 34, left=1, reason=r"LpNormalization|rule")
def _(net: Net) -> None:
    net.output(net.bn(net.op("LpNormalization", net.input("N", 4, "L"), axis=1), 4))


# --- weights computed in the graph (lines 46, 50) -------------------------------------------------------------


@CASES.case("weight standardisation by a BatchNorm in training mode (timm's StdConv)", 46)
def _(net: Net) -> None:
    """The weights, one channel each, are normalised by their own moments: a constant."""
    w = net.reshape(net.weight(net.normal(6, 4, 3, 3), "filters"), 1, 6, -1)
    params = [net.weight(a, "p") for a in (net.rng.uniform(0.5, 1.5, 6), np.zeros(6), np.zeros(6), np.ones(6))]
    w = net.ops("BatchNormalization", w, *params, outputs=3, training_mode=1, epsilon=1e-6)[0]
    y = net.op("Conv", net.input("N", 4, "H", "W"), net.reshape(w, 6, 4, 3, 3), net.bias(6))
    net.output(net.bn(y, 6))


@CASES.case("weight standardisation alone", 46)
def _(net: Net) -> None:
    """No other BatchNorm in the model: that one is a constant, so none is left."""
    w = net.reshape(net.weight(net.normal(6, 4, 3, 3), "filters"), 1, 6, -1)
    params = [net.weight(a, "p") for a in (np.ones(6), np.zeros(6), np.zeros(6), np.ones(6))]
    w = net.ops("BatchNormalization", w, *params, outputs=3, training_mode=1)[0]
    net.output(net.op("Conv", net.input("N", 4, "H", "W"), net.reshape(w, 6, 4, 3, 3), net.bias(6)))


@CASES.case("weight norm", 50)
def _(net: Net) -> None:
    v, g = net.weight(net.normal(6, 4, 3, 3), "v"), net.weight(net.rng.uniform(0.5, 2, (6, 1, 1, 1)), "g")
    w = net.op("Mul", v, net.op("Div", g, net.reduce("L2", v, 1, 2, 3)))
    net.output(net.bn(net.op("Conv", net.input("N", 4, "H", "W"), w, net.bias(6)), 6))


@CASES.case("weight norm of a dense layer", 50, opset=18)
def _(net: Net) -> None:
    v, g = net.weight(net.normal(6, 4), "v"), net.weight(net.rng.uniform(0.5, 2, (6, 1)), "g")
    w = net.op("Div", net.op("Mul", v, g), net.reduce("L2", v, 1))
    net.output(net.bn(net.op("Gemm", net.input("N", 4), w, net.bias(6), transB=1), 6))


@CASES.case("spectral norm", 50)
def _(net: Net) -> None:
    w, u, v = net.weight(net.normal(6, 4), "w"), net.weight(net.normal(6), "u"), net.weight(net.normal(4), "v")
    sigma = net.op("ReduceSum", net.op("Mul", u, net.op("MatMul", w, v)), keepdims=0)
    net.output(net.bn(net.op("Gemm", net.input("N", 4), net.op("Div", w, sigma), net.bias(6), transB=1), 6))


@CASES.case("linear weight transposed in the graph", 50)
def _(net: Net) -> None:
    y = net.op("MatMul", net.input("N", 4), net.transpose(net.matrix(6, 4), 1, 0))
    net.output(net.bn(net.op("Add", y, net.bias(6)), 6))


@CASES.case("a bias that torch's exporter makes from the weight's shape", 50, opset=18)
def _(net: Net) -> None:
    """A conv without bias, as the dynamo exporter writes it: Expand(CastLike(0, W), Slice(Shape(W)))."""
    w = net.filters(6, 4, 3, 3)
    size = net.op("Shape", w, start=0, end=1)
    zero = net.op("CastLike", net.constant(np.array(0.0, np.float32)), w)
    y = net.op("Conv", net.input("N", 4, "H", "W"), w, net.op("Expand", zero, size))
    net.output(net.bn(y, 6))


@CASES.case("parameters cast in the graph", 50)
def _(net: Net) -> None:
    to = 11 if net.dtype == np.float64 else 1
    cast = [
        net.op("Cast", net.constant(a.astype(np.float16)), to=to)
        for a in (net.rng.uniform(0.5, 1.5, 6), net.normal(6), net.normal(6), net.rng.uniform(0.5, 1.5, 6))
    ]
    net.output(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), params=cast))


@CASES.case("a filter assembled by Concat", 50)
def _(net: Net) -> None:
    w = net.op("Concat", net.filters(2, 4, 3, 3), net.filters(4, 4, 3, 3), axis=0)
    net.output(net.bn(net.op("Conv", net.input("N", 4, "H", "W"), w), 6))


@CASES.case("a weight that depends on the input", 50, left=1, reason=r"weight|constant|rule|computed|input")
def _(net: Net) -> None:
    """Dynamic convolution: the filters are data."""
    x = net.input("N", 4, "H", "W")
    net.output(net.bn(net.op("Conv", x, net.input(6, 4, 3, 3, name="kernels")), 6))
