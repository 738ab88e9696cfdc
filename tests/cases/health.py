"""BatchNorms that may not fold, or whose parameters are ill (lines 45, 47, 48)."""

from __future__ import annotations

from functools import partial

import numpy as np

from .builder import Net
from .case import Theme

CASES = Theme()


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


@CASES.case("training mode at opset 11: five outputs that nobody reads", 45, left=1, reason="5 outputs say, read or not", opset=11)
def _(net: Net) -> None:
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    net.output(net.ops("BatchNormalization", y, *net.bn_params(6), outputs=5)[0])


@CASES.case("outputs at opset 11 that are left out", 45, opset=11, ort=False)
def _(net: Net) -> None:
    """Four empty names state no output: inference. ONNX Runtime crashes."""
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    net.output(net.ops("BatchNormalization", y, *net.bn_params(6), outputs=["y", "", "", "", ""])[0])


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
CASES.case(
    "an epsilon of NaN", 48, draw=partial(ill, which=0, value=1.0, epsilon=float("nan")), left=1, reason="its epsilon is nan", lively=False
)
CASES.case("variance 0 with epsilon", 48, draw=partial(ill, which=3, value=0.0))


def unmeasured(net: Net, mean: float | None, variance: float) -> None:
    params = [net.normal(6), net.normal(6), net.normal(6) if mean is None else np.full(6, mean), np.full(6, variance)]
    net.output(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), params=[net.weight(a, "p") for a in params]))


for name, mean, variance, says in (
    ("every variance zero", None, 0.0, r"its variance is 0 in every channel, .* by 1/sqrt\(epsilon\)"),
    ("every mean and variance zero", 0.0, 0.0, "its mean and its variance are 0 in every channel"),
    ("statistics as a layer begins with", 0.0, 1.0, "as in a layer that never saw data"),
):
    CASES.case(name, 48, draw=partial(unmeasured, mean=mean, variance=variance), notes=says)


@CASES.case("a gamma that is computed from data", 48, left=1, reason="its gamma is not a constant", ort=False)
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    gamma = net.reduce("Mean", net.op("Sigmoid", x), 0, 2, 3)
    gamma = net.reshape(net.op("Concat", gamma, gamma, axis=1), -1)
    params = [net.weight(a, "p") for a in (net.normal(8), net.normal(8), net.rng.uniform(0.5, 1.5, 8))]
    net.output(net.bn(net.conv(x, 4, 8), params=[gamma, *params]))


CASES.case("a gamma of zero", 48, draw=partial(ill, which=0, value=0.0), notes=r"(?i)dead|zero|0|prun", lively=False)


@CASES.case("every gamma zero", 48, lively=False)
def _(net: Net) -> None:
    params = [net.weight(a, "p") for a in (np.zeros(6), net.normal(6), net.normal(6), net.rng.uniform(0.5, 1.5, 6))]
    net.output(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), params=params))


@CASES.case("a computed mean of another shape", 48, left=1, reason="its parameters differ in shape", opset=13, ort=False, lively=False)
def _(net: Net) -> None:
    mean = net.op("Abs", net.weight(net.normal(1), "m"))
    params = [net.weight(a, "p") for a in (net.normal(6), net.normal(6), net.rng.uniform(0.5, 1.5, 6))]
    net.output(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), params=[*params[:2], mean, params[2]]))


@CASES.case("an ill BatchNorm beside a sound one", 48, left=1, reason=r"variance", lively=False)
def _(net: Net) -> None:
    y = net.relu(net.bn(net.conv(net.input("N", 4, "H", "W"), 4, 6), 6))
    arrays = [net.rng.uniform(0.5, 1.5, 3), net.normal(3), net.normal(3), np.array([1.0, -0.2, 0.5])]
    net.output(net.bn(net.conv(y, 6, 3), params=[net.weight(a, "p") for a in arrays]))
