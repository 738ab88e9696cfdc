"""BatchNorms that may not fold, or whose parameters are ill (lines 41, 42, 45, 47, 48)."""

from __future__ import annotations

from functools import partial

import numpy as np

from .builder import Net
from .case import Theme

CASES = Theme()


# --- quantised (lines 41, 42) --------------------------------------------------------------------------------------


def quantised(net: Net, *, positive: bool = True, per_axis: bool = True) -> str:
    """A conv whose int8 filter is dequantised in the graph; its bias is float."""
    q = net.constant(net.rng.integers(-120, 120, (6, 4, 3, 3)).astype(np.int8), "q")
    scale = net.weight(net.rng.uniform(0.01, 0.03, 6) if per_axis else np.array(0.02), "scale")
    zero = net.constant(np.zeros(6 if per_axis else (), np.int8))
    w = net.op("DequantizeLinear", q, scale, zero, **({"axis": 0} if per_axis else {}))
    return net.bn(net.op("Conv", net.input("N", 4, "H", "W"), w, net.bias(6)), 6, positive=positive)


CASES.case("int8 filter dequantised per channel", 41, draw=lambda net: net.output(quantised(net)), double=False)
CASES.case(
    "int8 filter dequantised per channel, negative scales", 41, draw=lambda net: net.output(quantised(net, positive=False)), double=False
)


@CASES.case("activations quantised between conv and BatchNorm", 42, left=1, reason=r"QuantizeLinear|rule")
def _(net: Net) -> None:
    scale, zero = net.constant(np.array(0.05, np.float32)), net.constant(np.array(10, np.uint8))
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    if net.dtype == np.float64:
        y = net.op("Cast", y, to=1)
    y = net.op("DequantizeLinear", net.op("QuantizeLinear", y, scale, zero), scale, zero)
    if net.dtype == np.float64:
        y = net.op("Cast", y, to=11)
    net.output(net.bn(y, 6))


# --- training mode (line 45) ------------------------------------------------------------------------------------------


@CASES.case("training mode on activations", 45, left=1, reason="training", opset=15)
def _(net: Net) -> None:
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    y = net.ops("BatchNormalization", y, *net.bn_params(6), outputs=3, training_mode=1)[0]
    net.output(y)


@CASES.case("training mode, running statistics as outputs of the model", 45, left=1, reason="training", opset=15)
def _(net: Net) -> None:
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    net.output(*net.ops("BatchNormalization", y, *net.bn_params(6), outputs=3, training_mode=1))


@CASES.case("training mode at opset 9: five outputs", 45, left=1, reason="training", opset=9, ort=False)
def _(net: Net) -> None:
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    y, *moments = net.ops("BatchNormalization", y, *net.bn_params(6), outputs=5)
    net.output(y)
    net.output(*moments, shape=(6,))


@CASES.case("one BatchNorm in training mode, one not", 45, left=1, reason="training", opset=15)
def _(net: Net) -> None:
    y = net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6)
    y = net.conv(net.relu(y), 6, 4)
    net.output(net.ops("BatchNormalization", y, *net.bn_params(4), outputs=3, training_mode=1)[0])


# --- nobody absorbs it (line 47) ------------------------------------------------------------------------------------------


@CASES.case("a BatchNorm alone", 47, left=1, reason=r"input|output")
def _(net: Net) -> None:
    net.output(net.bn(net.input("N", 4, "H", "W"), 4))


@CASES.case("a BatchNorm between activations", 47, left=1, reason=r"Sigmoid|Tanh|rule")
def _(net: Net) -> None:
    net.output(net.op("Tanh", net.bn(net.op("Sigmoid", net.input("N", 4, "H", "W")), 4)))


@CASES.case("a BatchNorm behind an operator of another domain", 47, left=1, reason=r"Gelu|rule", ort=False, double=False)
def _(net: Net) -> None:
    body = net.child("Gelu")
    net.function("Gelu", ["x"], [body.op("Mul", "x", body.op("Erf", "x"))], body)
    net.output(net.bn(net.op("Gelu", net.conv(net.input("N", 4, "H", "W"), 4, 6), domain="local"), 6), shape=("N", 6, "h", "w"))


# --- ill parameters (line 48) -----------------------------------------------------------------------------------------------


def ill(net: Net, *, which: int, value: float, epsilon: float = 1e-5) -> None:
    """Channel 2's gamma, beta, mean or variance is `value`."""
    arrays = [net.rng.uniform(0.5, 1.5, 6), net.normal(6), net.normal(6), net.rng.uniform(0.5, 1.5, 6)]
    arrays[which][2] = value
    params = [net.weight(a, "p") for a in arrays]
    net.output(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), params=params, epsilon=epsilon))


for stem, which in (("gamma", 0), ("beta", 1), ("mean", 2), ("variance", 3)):
    CASES.case(f"NaN in {stem}", 48, draw=partial(ill, which=which, value=np.nan), left=1, reason=r"(?i)nan|finite", lively=False)
CASES.case("infinite mean", 48, draw=partial(ill, which=2, value=np.inf), left=1, reason=r"(?i)inf", lively=False)
CASES.case("infinite variance", 48, draw=partial(ill, which=3, value=np.inf), left=1, reason=r"(?i)inf", lively=False)
CASES.case("negative variance", 48, draw=partial(ill, which=3, value=-0.5), left=1, reason=r"(?i)negative variance|variance", lively=False)
CASES.case("slightly negative variance that epsilon makes up for", 48, draw=partial(ill, which=3, value=-1e-6), left=1, reason="variance")
CASES.case(
    "variance 0 and epsilon 0",
    48,
    draw=partial(ill, which=3, value=0.0, epsilon=0.0),
    left=1,
    reason=r"(?i)variance|finite|zero",
    lively=False,
)
CASES.case("variance 0 with epsilon", 48, draw=partial(ill, which=3, value=0.0))
CASES.case("a gamma of zero", 48, draw=partial(ill, which=0, value=0.0), notes=r"(?i)dead|zero|0|prun", lively=False)


@CASES.case("every gamma zero", 48, lively=False)
def _(net: Net) -> None:
    params = [net.weight(a, "p") for a in (np.zeros(6), net.normal(6), net.normal(6), net.rng.uniform(0.5, 1.5, 6))]
    net.output(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), params=params))


@CASES.case("an ill BatchNorm beside a sound one", 48, left=1, reason=r"variance", lively=False)
def _(net: Net) -> None:
    y = net.relu(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6))
    arrays = [net.rng.uniform(0.5, 1.5, 3), net.normal(3), net.normal(3), np.array([1.0, -0.2, 0.5])]
    net.output(net.bn(net.conv(y, 6, 3), params=[net.weight(a, "p") for a in arrays]))
