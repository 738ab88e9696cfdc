"""Operators that the catalogue doesn't name, one case each: every row of the tables is reached."""

from __future__ import annotations

from functools import partial

from .builder import Net
from .case import Theme

CASES = Theme()


def between(net: Net, *, kind: str) -> None:
    """conv, operator, BatchNorm whose scales are positive and whose shifts are zero."""
    y = net.conv(net.input("N", 4, 5, 6), 4, 3)
    y = net.reduce(kind.removeprefix("Reduce"), y, 2, 3) if kind in ("ReduceL1", "ReduceL2") else net.op(kind, y)
    net.output(net.bn(y, 3, positive=True, shift=False))


for kind in ("Abs", "GlobalLpPool", "ReduceL1", "ReduceL2"):
    CASES.case(f"{kind} between, scales positive and no shift", 24, draw=partial(between, kind=kind))


def several(net: Net, *, kind: str, positive: bool = True) -> None:
    """The same map goes into every operand."""
    x = net.input("N", 4, 5, 6)
    net.output(net.bn(net.op(kind, net.conv(x, 4, 3), net.conv(x, 4, 3)), 3, positive=positive))


for kind in ("Max", "Min"):
    CASES.case(f"{kind} of two convs", 19, draw=partial(several, kind=kind))
    CASES.case(
        f"{kind} of two convs, some scales negative", 19, draw=partial(several, kind=kind, positive=False), left=1, reason="negative"
    )
CASES.case("Mean of two convs", 19, draw=partial(several, kind="Mean", positive=False))


@CASES.case("Max of a conv and a constant", 13)
def _(net: Net) -> None:
    y = net.op("Max", net.conv(net.input("N", 4, 5, 6), 4, 3), net.weight(net.normal(1, 3, 1, 1)))
    net.output(net.bn(y, 3, positive=True))


@CASES.case("ReduceMin between", 13)
def _(net: Net) -> None:
    net.output(net.bn(net.reduce("Min", net.conv(net.input("N", 4, 5, 6), 4, 3), 2, 3), 3, positive=True))


@CASES.case("Where of two convs", 19)
def _(net: Net) -> None:
    x = net.input("N", 4, 5, 6)
    net.output(net.bn(net.op("Where", net.op("Greater", x, net.scalar(0.1)), net.conv(x, 4, 4, 1), net.conv(x, 4, 4, 1)), 4))


@CASES.case("product of two activations, no shift", 9, 21)
def _(net: Net) -> None:
    x = net.input("N", 4, 5, 6)
    net.output(net.bn(net.op("MatMul", net.conv(x, 4, 3), net.op("Sigmoid", net.transpose(net.conv(x, 4, 3), 0, 1, 3, 2))), 3, shift=False))


@CASES.case("crop to the size of another value", 16)
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    small = net.op("Relu", net.conv(x, 4, 3, 3))
    sizes = net.op("Slice", net.op("Shape", small), net.ints(2), net.ints(4))
    cropped = net.op("Slice", net.conv(x, 4, 3), net.ints(0, 0), sizes, net.ints(2, 3))
    net.output(net.bn(cropped, 3), small)
