"""Values, weights and parameters that several operators use (lines 36 to 39)."""

from __future__ import annotations

from functools import partial

from .builder import Net
from .case import Theme

CASES = Theme()
SHARED = r"used|elsewhere|users|output|several"


# --- a layer's output with several users (lines 36, 37) -------------------------------------------------------


def two_users(net: Net, *, second: str = "Relu", kind: str = "conv") -> None:
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6) if kind == "conv" else net.gemm(net.input("N", 4), 4, 6)
    net.output(net.bn(y, 6))
    net.output(net.bn(y, 6) if second == "bn" else y if second == "output" else net.op(second, y))


for kind in ("conv", "gemm"):
    for clone in (False, True):
        how = ", cloned" if clone else ""
        left = 0 if clone else 1
        CASES.case(f"{kind} with another user{how}", 36, draw=partial(two_users, kind=kind), clone=clone, left=left, reason=SHARED)
        CASES.case(
            f"{kind} with two BatchNorms{how}",
            36,
            draw=partial(two_users, kind=kind, second="bn"),
            clone=clone,
            left=2 * left,
            reason=SHARED,
        )
        CASES.case(
            f"{kind} whose output is one of the model's{how}",
            37,
            draw=partial(two_users, kind=kind, second="output"),
            clone=clone,
            left=left,
            reason=SHARED,
        )


@CASES.case("conv used by a BatchNorm and by the skip connection around it", 36, left=1, reason=SHARED)
def _(net: Net) -> None:
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    net.output(net.op("Add", y, net.relu(net.bn(y, 6))))


@CASES.case("a difference that is doubled behind convolutions that are doubled", 36, clone=True)
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    one, other = net.conv(x, 4, 6), net.conv(x, 4, 6)
    y = net.bn(net.op("Sub", one, other), 6)
    net.output(net.op("Add", y, net.weight(net.normal(6, 1, 1))), net.op("Sigmoid", y), net.op("Sigmoid", other))


@CASES.case("Relu between with another user", 36, left=1, reason=SHARED + r"|shift|Relu")
def _(net: Net) -> None:
    y = net.relu(net.conv(net.input("N", 4, "H", "W"), 4, 6))
    net.output(net.bn(y, 6), net.op("Sigmoid", y))


@CASES.case("BatchNorm output that is an output of the model and used too", 37)
def _(net: Net) -> None:
    y = net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6)
    net.output(y, net.relu(y))


@CASES.case("BatchNorm output that is two outputs' source", 37)
def _(net: Net) -> None:
    y = net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6)
    net.output(y, net.op("Identity", y))


@CASES.case("BatchNorm on an input that is an output too", 37, 47, left=1, reason=r"input|output")
def _(net: Net) -> None:
    net.output(net.bn(net.input("N", 4, "H", "W"), 4))


# --- shared weights (line 38) ----------------------------------------------------------------------------------


def siamese(net: Net, *, equal: bool, kind: str = "conv", bias: bool = True) -> None:
    """One layer on two inputs; equal: one BatchNorm for both calls, else one each."""
    size = ("H", "W") if kind == "conv" else ()
    x, z = net.input("N", 4, *size), net.input("N", 4, *size, name="z")
    w = net.filters(6, 4, 3, 3) if kind == "conv" else net.matrix(4, 6)
    b = net.bias(6) if bias else ""
    ys = [net.conv(v, 4, 6, weight=w, bias=b) if kind == "conv" else net.op("Gemm", v, w, b) for v in (x, z)]
    params = [net.bn_params(6)] * 2 if equal else [net.bn_params(6), net.bn_params(6)]
    net.output(*(net.op("LeakyRelu", net.bn(y, params=p)) for y, p in zip(ys, params, strict=True)))


for kind in ("conv", "gemm"):
    CASES.case(f"{kind} called twice, one BatchNorm", 38, 39, draw=partial(siamese, equal=True, kind=kind), adds_bytes=False)
    CASES.case(f"{kind} called twice, two BatchNorms", 38, draw=partial(siamese, equal=False, kind=kind), adds_bytes=True)
CASES.case("conv without bias called twice, one BatchNorm", 38, 39, draw=partial(siamese, equal=True, bias=False))


@CASES.case("conv called twice, only one call normalised", 38, adds_bytes=True)
def _(net: Net) -> None:
    x, w = net.input("N", 4, "H", "W"), net.filters(6, 4, 3, 3)
    net.output(net.bn(net.conv(x, 4, 6, weight=w), 6), net.conv(net.relu(x), 4, 6, weight=w))


@CASES.case("conv called twice, one BatchNorm, one call multiplied by a constant", 38, adds_bytes=False, after={"Mul": 1})
def _(net: Net) -> None:
    """A Mul isn't worth a copy of the weight."""
    x, w = net.input("N", 4, "H", "W"), net.filters(6, 4, 3, 3)
    y, z = (net.conv(v, 4, 6, weight=w) for v in (net.conv(x, 4, 4), x))
    net.output(net.op("Mul", y, net.weight(net.normal(6, 1, 1))), z, net.bn(net.conv(x, 4, 6), 6))


@CASES.case("conv called in a row, BatchNorm between", 38)
def _(net: Net) -> None:
    """A recurrence unrolled: the same weight and the same BatchNorm three times."""
    x, w, b, params = net.input("N", 4, 12, 12), net.filters(4, 4, 3, 3), net.bias(4), net.bn_params(4)
    for _ in range(3):
        x = net.relu(net.bn(net.conv(x, 4, 4, weight=w, bias=b), params=params))
    net.output(x)


@CASES.case("a bias that two convs share, one of them normalised", 38)
def _(net: Net) -> None:
    b = net.bias(6)
    x = net.input("N", 4, "H", "W")
    net.output(net.bn(net.conv(x, 4, 6, bias=b), 6), net.conv(x, 4, 6, bias=b))


@CASES.case("a square matrix used by two matmuls, plain and transposed", 38)
def _(net: Net) -> None:
    x, w = net.input("N", 6), net.matrix(6, 6)
    y = net.relu(net.bn(net.op("Gemm", x, w, net.bias(6)), 6))
    net.output(net.bn(net.op("Gemm", y, w, net.bias(6), transB=1), 6))


@CASES.case("a weight that is an output of the model", 38)
def _(net: Net) -> None:
    w = net.filters(6, 4, 3, 3)
    net.output(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6, weight=w), 6), net.op("Identity", w))


@CASES.case("a filter that is an output of the model itself", 38)
def _(net: Net) -> None:
    w = net.filters(6, 4, 3, 3)
    net.output(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6, weight=w), 6))
    net.output(w, shape=(6, 4, 3, 3))


@CASES.case("two BatchNorms in a row, the first an output of the model", 33, 37, left=1, reason=SHARED)
def _(net: Net) -> None:
    y = net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6)
    net.output(y, net.bn(y, 6))


@CASES.case("BatchNorm output added to itself", 37)
def _(net: Net) -> None:
    y = net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6)
    net.output(net.op("Add", y, y))


# --- shared BatchNorm parameters (line 39) ------------------------------------------------------------------------


@CASES.case("one BatchNorm's parameters on two convs", 39, adds_bytes=False)
def _(net: Net) -> None:
    x, params = net.input("N", 4, "H", "W"), net.bn_params(6)
    net.output(net.bn(net.conv(x, 4, 6), params=params), net.bn(net.conv(x, 4, 6), params=params))


@CASES.case("one BatchNorm's parameters on a conv and on an input", 39, left=1, reason=r"input|output")
def _(net: Net) -> None:
    x, params = net.input("N", 4, "H", "W"), net.bn_params(4)
    net.output(net.bn(net.conv(x, 4, 4), params=params), net.bn(x, params=params))


@CASES.case("one tensor as gamma and variance", 39)
def _(net: Net) -> None:
    gamma, beta, mean, _ = net.bn_params(6, positive=True)
    net.output(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), params=[gamma, beta, mean, gamma]))


@CASES.case("beta is the conv's bias", 39)
def _(net: Net) -> None:
    gamma, beta, mean, var = net.bn_params(6)
    net.output(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6, bias=beta), params=[gamma, beta, mean, var]))
