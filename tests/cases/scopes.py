"""BatchNorms inside If, Loop, Scan and local functions, with weights from inside or outside (line 40)."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
from onnx import helper

from .builder import Net, Value, element
from .case import Theme

CASES = Theme()


def branch(net: Net, name: str, x: Value, *, shared: tuple[Value, list[Value]] | None = None, conv: bool = True) -> object:
    """conv and BatchNorm on the outer value x; shared: the filter and parameters of the outer scope."""
    body = net.child(name)
    body.hold = "constant" if net.opset < 9 else net.hold  # below IR 4 a subgraph can't have initializers
    y = body.conv(x, 4, 6, weight=shared[0] if shared else None) if conv else x
    y = body.bn(y, 6, params=shared[1] if shared else ())
    body.output(y)
    return body.graph(name)


def conditional(net: Net, *, outer: bool = False) -> None:
    flag, x = net.input(name="flag", dtype=np.bool_), net.input("N", 4, "H", "W")
    shared = (net.filters(6, 4, 3, 3), net.bn_params(6)) if outer else None
    y = net.op("If", flag, then_branch=branch(net, "then", x, shared=shared), else_branch=branch(net, "else", x))
    net.output(y, shape=("N", 6, "h", "w"))


for opset in (7, 11, 13, 18, 22):
    CASES.case(f"both branches of an If, opset {opset}", 40, draw=conditional, opset=opset)
CASES.case("both branches of an If, one with weights of the outer scope", 40, draw=partial(conditional, outer=True))


@CASES.case(
    "conv outside, BatchNorm inside an If", 40, left=2, reason=r"scope|subgraph|outer|If|input|used|elsewhere|users|produced|outside"
)
def _(net: Net) -> None:
    """The conv is read by both branches."""
    flag, x = net.input(name="flag", dtype=np.bool_), net.input("N", 4, "H", "W")
    y = net.conv(x, 4, 6)
    net.output(
        net.op("If", flag, then_branch=branch(net, "then", y, conv=False), else_branch=branch(net, "else", y, conv=False)),
        shape=("N", 6, "h", "w"),
    )


@CASES.case("conv outside, BatchNorm inside one branch of an If", 40)
def _(net: Net) -> None:
    """Nobody else reads the conv. The branch's output must still be made inside the branch."""
    flag, x = net.input(name="flag", dtype=np.bool_), net.input("N", 4, "H", "W")
    y = net.conv(x, 4, 6)
    plain = net.child("else")
    plain.output(plain.conv(x, 4, 6))
    net.output(
        net.op("If", flag, then_branch=branch(net, "then", y, conv=False), else_branch=plain.graph("else")), shape=("N", 6, "h", "w")
    )


def turn(net: Net) -> Net:
    """The body of a Loop, which goes on as it is told to; `state` goes around. Its output is left to draw."""
    body = net.child("loop")
    body.inputs = [
        helper.make_tensor_value_info("turn", 7, ()),
        helper.make_tensor_value_info("go_on", 9, ()),
        helper.make_tensor_value_info("state", element(net.dtype), None),
    ]
    body.output(body.op("Identity", "go_on"), dtype=np.bool_)
    return body


@CASES.case("conv outside, BatchNorm inside a Loop", 40)
def _(net: Net) -> None:
    """Every turn adds the same normalised value."""
    y = net.conv(net.input("N", 4, 6, 6), 4, 4)
    body = turn(net)
    body.output(body.op("Add", "state", body.bn(y, 4)))
    start = net.input("N", 4, 4, 4, name="start")
    net.output(net.op("Loop", net.constant(np.array(3, np.int64)), "", start, body=body.graph("body")), shape=("N", 4, 4, 4))


@CASES.case("BatchNorm outside, conv inside an If", 40, 22, left=1, reason=r"If|scope|used|output|subgraph|rule")
def _(net: Net) -> None:
    """Both branches read the BatchNorm's output, one of them as it is."""
    flag, x = net.input(name="flag", dtype=np.bool_), net.input("N", 4, "H", "W")
    y = net.bn(x, 4)
    inner, plain = net.child("then"), net.child("else")
    inner.output(inner.conv(y, 4, 4, 1))
    plain.output(plain.op("Sigmoid", y))
    net.output(net.op("If", flag, then_branch=inner.graph("then"), else_branch=plain.graph("else")), shape=("N", 4, "h", "w"))


@CASES.case("conv inside an If, BatchNorm behind it", 40, left=1, reason=r"If|rule")
def _(net: Net) -> None:
    flag, x = net.input(name="flag", dtype=np.bool_), net.input("N", 4, "H", "W")
    graphs = []
    for name in ("then", "else"):
        body = net.child(name)
        body.output(body.conv(x, 4, 6))
        graphs.append(body.graph(name))
    net.output(net.bn(net.op("If", flag, then_branch=graphs[0], else_branch=graphs[1]), 6), shape=("N", 6, "h", "w"))


@CASES.case("a conv's output that a branch reads too", 40, 36, left=1, reason=r"used|elsewhere|users|scope|subgraph|If")
def _(net: Net) -> None:
    """The only other use of the value is hidden inside the If."""
    flag, x = net.input(name="flag", dtype=np.bool_), net.input("N", 4, "H", "W")
    y = net.conv(x, 4, 6)
    graphs = []
    for name, op in (("then", "Relu"), ("else", "Sigmoid")):
        body = net.child(name)
        body.output(body.op(op, y))
        graphs.append(body.graph(name))
    net.output(net.bn(y, 6))
    net.output(net.op("If", flag, then_branch=graphs[0], else_branch=graphs[1]), shape=("N", 6, "h", "w"))


@CASES.case("a filter that a branch uses too", 40, 38)
def _(net: Net) -> None:
    """The branch's conv has no BatchNorm, so it keeps the old filter."""
    flag, x = net.input(name="flag", dtype=np.bool_), net.input("N", 4, "H", "W")
    w = net.filters(6, 4, 3, 3)
    plain = net.child("else")
    plain.output(plain.conv(x, 4, 6, weight=w))
    net.output(net.bn(net.conv(x, 4, 6, weight=w), 6))
    inner = branch(net, "then", x, shared=(w, net.bn_params(6)))
    net.output(net.op("If", flag, then_branch=inner, else_branch=plain.graph("else")), shape=("N", 6, "h", "w"))


@CASES.case("an If within an If", 40)
def _(net: Net) -> None:
    flag, x = net.input(name="flag", dtype=np.bool_), net.input("N", 4, "H", "W")
    inner = net.child("outer")
    inner.output(inner.op("If", flag, then_branch=branch(inner, "deep_then", x), else_branch=branch(inner, "deep_else", x)))
    net.output(net.op("If", flag, then_branch=inner.graph("outer"), else_branch=branch(net, "else", x)), shape=("N", 6, "h", "w"))


def loop(net: Net, *, scanned: bool = False, outer: bool = False) -> None:
    """Three turns of x = relu(bn(conv(x)))."""
    x = net.input("N", 4, 6, 6)
    turns = net.constant(np.array(3, np.int64))
    w = net.filters(4, 4, 3, 3) if outer else None
    body = turn(net)
    y = body.relu(body.bn(body.conv("state", 4, 4, pads=1, weight=w), 4))
    body.output(y)
    if scanned:
        body.output(body.op("GlobalAveragePool", y))
    results = net.ops("Loop", turns, net.constant(np.array(True)), x, outputs=1 + scanned, body=body.graph("body"))
    net.output(results[0], shape=("N", 4, 6, 6))
    if scanned:
        net.output(results[1], shape=(3, "N", 4, 1, 1))


CASES.case("a Loop", 40, draw=loop)
CASES.case("a Loop with a scanned output", 40, draw=partial(loop, scanned=True), opset=13)
CASES.case("a Loop with a filter of the outer scope", 40, draw=partial(loop, outer=True))


@CASES.case("a Loop whose BatchNorm reads the state", 40, left=1, reason=r"input|output|state|shift")
def _(net: Net) -> None:
    """The state of the last turn comes in, so nothing stands behind the BatchNorm; before it is the loop's border."""
    body = turn(net)
    body.output(body.bn("state", 4))
    x = net.input("N", 4, 5)
    net.output(net.op("Loop", net.constant(np.array(2, np.int64)), "", x, body=body.graph("body")), shape=("N", 4, 5))


def scan(net: Net) -> None:
    """A dense layer, a BatchNorm and a running sum over the sequence [L, N, 4]."""
    body = net.child("scan")
    body.inputs = [
        helper.make_tensor_value_info("sum", element(net.dtype), (2, 5)),
        helper.make_tensor_value_info("item", element(net.dtype), (2, 4)),
    ]
    y = body.op("Add", "sum", body.relu(body.bn(body.gemm("item", 4, 5), 5)))
    body.output(y, body.op("Identity", y), shape=(2, 5))
    start, x = net.constant(np.zeros((2, 5), net.dtype)), net.input("L", 2, 4)
    last, every = net.ops("Scan", start, x, outputs=2, body=body.graph("body"), num_scan_inputs=1)
    net.output(last, shape=(2, 5))
    net.output(every, shape=("L", 2, 5))


for opset in (9, 11, 18):
    CASES.case(f"a Scan at opset {opset}", 40, draw=scan, opset=opset)


# --- local functions --------------------------------------------------------------------------------------------


def block(net: Net, name: str, params: int) -> None:
    """A local function: relu(bn(conv(x, w), gamma, beta, mean, var))."""
    inputs = ["x", "w", "gamma", "beta", "mean", "var"]
    body = net.child(name)
    y = body.relu(body.bn(body.op("Conv", "x", "w"), params=inputs[2:]))
    net.function(name, inputs[:params], [y], body)


@CASES.case("a local function called once", 40, ir=8)
def _(net: Net) -> None:
    block(net, "Block", 6)
    y = net.op("Block", net.input("N", 4, "H", "W"), net.filters(6, 4, 3, 3), *net.bn_params(6), domain="local")
    net.output(y, shape=("N", 6, "h", "w"))


@CASES.case("a local function called twice with different weights", 40, ir=9)
def _(net: Net) -> None:
    block(net, "Block", 6)
    y = net.op("Block", net.input("N", 4, "H", "W"), net.filters(6, 4, 3, 3), *net.bn_params(6), domain="local")
    y = net.op("Block", y, net.filters(5, 6, 3, 3), *net.bn_params(5), domain="local")
    net.output(y, shape=("N", 5, "h", "w"))


def constants_inside(net: Net, calls: int) -> None:
    """The weights are Constant nodes of the function's body."""
    body = net.child("Norm")
    body.hold = "constant"
    y = body.bn(body.conv("x", 4, 4, pads=1), 4)
    net.function("Norm", ["x"], [y], body)
    y = net.input("N", 4, "H", "W")
    for _ in range(calls):
        y = net.relu(net.op("Norm", y, domain="local"))
    net.output(y, shape=("N", 4, "h", "w"))


CASES.case("a local function with its weights inside", 40, draw=partial(constants_inside, calls=1), ir=8)
CASES.case("a local function with its weights inside, called twice", 40, draw=partial(constants_inside, calls=2), ir=8)


@CASES.case("a BatchNorm alone in a local function", 40, ir=8)
def _(net: Net) -> None:
    """The conv is outside: folding needs to look into the function."""
    body = net.child("Norm")
    y = body.bn("x", params=["gamma", "beta", "mean", "var"])
    net.function("Norm", ["x", "gamma", "beta", "mean", "var"], [y], body)
    y = net.op("Norm", net.conv(net.input("N", 4, "H", "W"), 4, 6), *net.bn_params(6), domain="local")
    net.output(y, shape=("N", 6, "h", "w"))


@CASES.case("a local function whose epsilon is an attribute of the call", 40, ir=8)
def _(net: Net) -> None:
    names = ["x", "gamma", "beta", "mean", "var"]
    node = helper.make_node("BatchNormalization", names, ["y"])
    node.attribute.append(onnx.AttributeProto(name="epsilon", ref_attr_name="eps", type=onnx.AttributeProto.FLOAT))
    net.functions.append(helper.make_function("local", "Norm", names, ["y"], [node], [helper.make_opsetid("", net.opset)], ["eps"]))
    x = net.input("N", 4, "H", "W")
    for cin, cout, eps in ((4, 6, 0.5), (6, 3, 2.0)):
        x = net.op("Norm", net.conv(x, cin, cout), *net.bn_params(cout), domain="local", eps=eps)
    net.output(x, shape=("N", 3, "h", "w"))


@CASES.case("a local function that calls another", 40, ir=8)
def _(net: Net) -> None:
    block(net, "Block", 6)
    body = net.child("Stage")
    names = ["x", "w", "gamma", "beta", "mean", "var"]
    y = body.relu(body.op("Block", *names, domain="local"))
    opsets = [helper.make_opsetid("", net.opset), helper.make_opsetid("local", 1)]
    net.functions.append(helper.make_function("local", "Stage", names, [y], body.nodes, opsets))
    y = net.op("Stage", net.input("N", 4, "H", "W"), net.filters(6, 4, 3, 3), *net.bn_params(6), domain="local")
    net.output(y, shape=("N", 6, "h", "w"))


@CASES.case("a local function beside the folding, left as it is", 40, ir=8)
def _(net: Net) -> None:
    body = net.child("Act")
    net.function("Act", ["x"], [body.op("Mul", "x", body.op("Sigmoid", "x"))], body)
    y = net.op("Act", net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6), domain="local")
    net.output(y, shape=("N", 6, "h", "w"))


@CASES.case("a local function between conv and BatchNorm", 40, ir=8, left=1, reason=r"Act|Mul|Sigmoid|rule|used|elsewhere|users")
def _(net: Net) -> None:
    body = net.child("Act")
    net.function("Act", ["x"], [body.op("Mul", "x", body.op("Sigmoid", "x"))], body)
    y = net.op("Act", net.conv(net.input("N", 4, "H", "W"), 4, 6), domain="local")
    net.output(net.bn(y, 6), shape=("N", 6, "h", "w"))
