"""How a model holds its weights and names its parts: none of it may change what folds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from onnx import helper, numpy_helper

from tests.cases.builder import Net
from tests.cases.case import Theme
from tests.cases.convolutions import conv_bn
from tests.cases.linear import gemm_bn, matmul_add_bn

CASES = Theme()
OVERRIDABLE = r"overrid|input|caller|constant"


def held(net: Net, *, hold: str, draw: Callable[[Net], None]) -> None:
    net.hold = hold
    draw(net)


for hold, where in (("constant", "Constant nodes"), ("identity", "initializers behind Identity")):
    for what, drawing in (
        ("conv", conv_bn),
        ("gemm", gemm_bn),
        ("matmul and Add", matmul_add_bn),
        ("conv without bias", partial(conv_bn, bias=False)),
    ):
        CASES.case(f"{what}, weights in {where}", 1, 3, 5, draw=partial(held, hold=hold, draw=drawing))
CASES.case("conv, weights in Constant nodes, opset 9", 1, draw=partial(held, hold="constant", draw=conv_bn), opset=9)


# --- initializers that callers may override: IR 4 and later --------------------------------------------------------------

CASES.case(
    "conv and BatchNorm, all weights overridable", 1, draw=partial(held, hold="overridable", draw=conv_bn), left=1, reason=OVERRIDABLE, ir=8
)
CASES.case("conv and BatchNorm in IR 3, where initializers are inputs", 1, draw=conv_bn, opset=8, ir=3)
CASES.case("conv and BatchNorm in IR 3, opset 9", 1, draw=conv_bn, opset=9, ir=3)
CASES.case("gemm and BatchNorm in IR 3", 3, draw=gemm_bn, opset=7, ir=3)
CASES.case("matmul and BatchNorm in IR 3: an Add comes in", 4, draw=lambda net: bare_matmul(net), opset=8, ir=3, after={"Add": 1})


def bare_matmul(net: Net) -> None:
    net.output(net.bn(net.op("MatMul", net.input("N", 4), net.matrix(4, 6)), 6))


def partly_overridable(net: Net, *, layer: bool) -> None:
    """Either the layer's weights or the BatchNorm's parameters may be overridden."""
    x = net.input("N", 4, "H", "W")
    net.hold = "overridable" if layer else "initializer"
    y = net.conv(x, 4, 6)
    net.hold = "initializer" if layer else "overridable"
    net.output(net.bn(y, 6))


CASES.case("the conv's weights overridable", 1, draw=partial(partly_overridable, layer=True), left=1, reason=OVERRIDABLE)
CASES.case("the BatchNorm's parameters overridable", 1, draw=partial(partly_overridable, layer=False), left=1, reason=OVERRIDABLE)


@CASES.case("an overridable default beside the folding", 1)
def _(net: Net) -> None:
    y = net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6)
    net.hold = "overridable"
    net.output(net.op("Mul", y, net.weight(np.array([0.7]), "gain")))


@CASES.case("only the conv's bias is overridable", 1, left=1, reason=OVERRIDABLE)
def _(net: Net) -> None:
    x, w = net.input("N", 4, "H", "W"), net.filters(6, 4, 3, 3)
    net.hold = "overridable"
    b = net.bias(6)
    net.hold = "initializer"
    net.output(net.bn(net.conv(x, 4, 6, weight=w, bias=b), 6))


# --- names and extras -----------------------------------------------------------------------------------------------------------


@CASES.case("nodes without names", 1)
def _(net: Net) -> None:
    net.named = False
    x = net.relu(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6))
    net.output(net.bn(net.conv(x, 6, 3), 3))


@CASES.case("every node with the same name", 1, ort=False)
def _(net: Net) -> None:
    x = net.relu(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6))
    net.output(net.bn(net.conv(x, 6, 3), 3))
    for node in net.nodes:
        node.name = "node"


@CASES.case("metadata, documentation and value_info", 1)
def _(net: Net) -> None:
    net.metadata, net.value_info = {"classes": "cat,dog", "stride": "32"}, True
    x = net.relu(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6))
    net.output(net.bn(net.conv(x, 6, 3), 3))
    for node in net.nodes:
        node.doc_string = f"made by {node.op_type}"


@CASES.case("an operator that nobody reads", 1)
def _(net: Net) -> None:
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    net.output(net.bn(y, 6))
    net.op("Relu", net.input("N", 2, name="z"))


@CASES.case("an initializer that nobody reads", 1)
def _(net: Net) -> None:
    net.bias(7)
    net.output(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6))


@CASES.case("an input that nobody reads, outputs not in the graph's order", 1)
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    net.input("N", 3, name="unused")
    first = net.bn(net.conv(x, 4, 6), 6)
    net.output(net.bn(net.conv(net.relu(first), 6, 3), 3), first)


@CASES.case("an input that is an output", 1)
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    net.output(net.op("Identity", x), net.bn(net.conv(x, 4, 6), 6))


@CASES.case("names that bnfold might want for itself", 1)
def _(net: Net) -> None:
    """Values are called as new weights of the conv might be."""
    x, w = net.input("N", 4, "H", "W"), net.filters(6, 4, 3, 3)
    y = net.op("Conv", x, w, output="conv")
    net.output(net.bn(y, 6))
    for name in (
        "conv.bias",
        "conv.weight",
        "conv_bias",
        "conv_weight",
        f"{w}_folded",
        "conv_folded",
        "Conv_node_0.bias",
        "Conv_node_0.weight",
    ):
        x = net.op("Relu", x, output=name)
    net.output(x)


@CASES.case("weights as raw bytes, typed fields and a one-element tensor", 1)
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    y = net.bn(net.conv(x, 4, 6), 6)
    net.output(y)
    for i, t in enumerate(net.initializers):
        array = numpy_helper.to_array(t)
        if i % 2:
            net.initializers[i].CopyFrom(helper.make_tensor(t.name, t.data_type, array.shape, array.ravel().tolist()))


# --- shapes that are not known -------------------------------------------------------------------------------------------------


@CASES.case("dynamic axes without names", 1, 7)
def _(net: Net) -> None:
    y = net.bn(net.conv(net.input(None, 4, None, None), 4, 6), 6)
    net.output(net.bn(net.gemm(net.op("Flatten", net.op("GlobalAveragePool", net.relu(y))), 6, 5), 5))


@CASES.case("linear on tokens, BatchNorm on a dynamic axis", 6, left=1, reason="ax[ie]s")
def _(net: Net) -> None:
    """The length K is 6 whenever the model runs, but nothing says so."""
    y = net.op("Add", net.op("MatMul", net.input("N", "K", 4), net.matrix(4, 6)), net.bias(6))
    net.output(net.bn(y, 6))


@CASES.case("Reshape whose meaning hangs on a dynamic axis", 7, left=1, reason=r"dynamic|ax[ie]s|varies")
def _(net: Net) -> None:
    """[N, 6, L] -> [N L / 2, 12]: which channel an element gets depends on L."""
    y = net.conv(net.input("N", 4, "K"), 4, 6, 1, dims=1)
    net.output(net.bn(net.reshape(y, -1, 12), 12))


@CASES.case("Reshape to channels that the size of a dynamic axis hides", 7, left=1, reason=r"dynamic|ax[ie]s|varies|size|certain")
def _(net: Net) -> None:
    """[N, 6, K] -> [N, K, 6] without a Transpose, K being 6 when it runs."""
    y = net.conv(net.input("N", 4, "K"), 4, 6, 1, dims=1)
    net.output(net.bn(net.reshape(y, 0, -1, 6), 6))
