"""BatchNorms that may not fold, or whose parameters are ill (lines 41, 42, 45, 47, 48)."""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from .builder import Net
from .case import Theme

CASES = Theme()


# --- quantised (lines 41, 42) --------------------------------------------------------------------------------------


def quantised(
    net: Net, *, positive: bool = True, axis: int | None = 0, layer: str = "Conv", low: int = -120, zero: int = 0, bias: str = ""
) -> None:
    """A layer whose 8-bit weight is dequantised in the graph. axis: of its scales, None for one scale. bias: "int32" for one stored so."""
    shape = {"Conv": (6, 4, 3, 3), "ConvTranspose": (4, 6, 3, 3), "Gemm": (4, 6)}[layer]
    kind = np.uint8 if zero else np.int8
    stored = net.rng.integers(low + zero, 120 + zero, shape)
    stored.flat[0] = low + zero
    count = () if axis is None else (shape[axis],)
    scale = net.weight(net.rng.uniform(0.01, 0.03, count), "scale")
    attrs: dict[str, Any] = {} if axis is None else {"axis": axis}
    w = net.op("DequantizeLinear", net.constant(stored.astype(kind), "q"), scale, net.constant(np.full(count, zero, kind)), **attrs)
    x = net.input("N", 4, "H", "W") if layer != "Gemm" else net.input("N", 4)
    b = net.bias(6)
    if bias:
        b = net.op(
            "DequantizeLinear", net.constant(net.rng.integers(-9000, 9000, 6).astype(np.int32)), net.constant(np.array(1e-3, net.dtype))
        )
    net.output(net.bn(net.op(layer, x, w, b), 6, positive=positive))


def dequantised(name: str, left: int = 0, reason: str = "", **how: Any) -> None:
    CASES.case(f"{name}, dequantised", 41, draw=partial(quantised, **how), left=left, reason=reason, double=False, opset=19)


dequantised("int8 filter with a scale per channel")
dequantised("int8 filter with a scale per channel, BatchNorm of both signs", positive=False)
dequantised("int8 filter with one scale", axis=None)
dequantised("int8 filter with one scale, BatchNorm of both signs", axis=None, positive=False)
dequantised("int8 filter that holds -128, BatchNorm of both signs", low=-128, positive=False, left=1, reason=r"int8|quanti|negat|128")
dequantised("uint8 filter with zero point 128", zero=128)
dequantised("int8 matrix of a gemm", layer="Gemm", axis=1, positive=False)
dequantised("int8 filter of a transposed conv", layer="ConvTranspose", axis=1, positive=False)
dequantised("int8 filter of a transposed conv with one scale", layer="ConvTranspose", axis=None)
dequantised("int8 filter of a transposed conv with a scale per input channel", layer="ConvTranspose", axis=0, left=1, reason="axis 0")
dequantised("int8 matrix with one scale", layer="Gemm", axis=None, positive=False)
dequantised("int8 filter with a scale per input channel", axis=1, left=1, reason=r"quanti|axis|scale")
dequantised("int8 filter and int32 bias, which becomes a float one", bias="int32")


def rounded(net: Net, *, layer: str = "Conv", axis: int | None = 0, kind: Any = np.int8, behind: str = "", block: bool = False) -> None:
    """As quantisation-aware training is exported: a float weight, QuantizeLinear, DequantizeLinear, the layer, the BatchNorm."""
    shape = {"Conv": (6, 4, 3, 3), "MatMul": (4, 6)}[layer]
    w = net.weight(net.rng.uniform(-0.2, 0.2, shape), "w")
    count: tuple[int, ...] = () if axis is None else (shape[axis],)
    attrs: dict[str, Any] = {} if axis is None else {"axis": axis}
    if block:
        count, attrs = (6, 2, 3, 3), {"axis": 1, "block_size": 2}
    scale, zero = net.weight(net.rng.uniform(0.01, 0.03, count), "scale"), net.constant(np.zeros(count, kind))
    w = net.op("DequantizeLinear", net.op("QuantizeLinear", w, scale, zero, **attrs), scale, zero, **attrs)
    if behind:
        w = net.op(behind, w)
    if layer == "MatMul":
        net.output(net.bn(net.op(layer, net.input("N", 4), w), 6))
        return
    bias = net.op(
        "DequantizeLinear", net.constant(net.rng.integers(-9000, 9000, 6).astype(np.int32)), net.constant(np.array(1e-3, net.dtype))
    )
    net.output(net.bn(net.op(layer, net.input("N", 4, "H", "W"), w, bias), 6))


def rounding(name: str, opset: int, reason: str = "its weight is rounded by QuantizeLinear", **how: Any) -> None:
    CASES.case(f"{name}, rounded in the graph", 51, draw=partial(rounded, **how), left=1, reason=reason, double=False, opset=opset)


rounding("int8 filter with one scale", 10, axis=None)
rounding("int8 filter with a scale per channel", 13)
rounding("uint8 filter with a scale per channel", 19, kind=np.uint8)
rounding("int8 matrix", 13, layer="MatMul", axis=1)
rounding("int4 filter", 21, kind=ml_dtypes.int4)
rounding("int8 filter in blocks", 21, block=True)
rounding("int8 filter behind a copy", 13, behind="Identity")
rounding("int8 filter with an Abs behind it", 13, behind="Abs")


@CASES.case("int8 filter at opset 12, dequantised", 41, left=1, reason="opset 12 has no scale for each channel", double=False, opset=12)
def _(net: Net) -> None:
    quantised(net, axis=None)


@CASES.case("int8 filter with computed scales, dequantised", 41, left=1, reason="scales are computed", double=False)
def _(net: Net) -> None:
    scale = net.op("Mul", net.constant(np.full(6, 0.02, net.dtype)), net.constant(np.array(0.5, net.dtype)))
    stored = net.constant(net.rng.integers(-120, 120, (6, 4, 3, 3)).astype(np.int8))
    w = net.op("DequantizeLinear", stored, scale, axis=0)
    net.output(net.bn(net.op("Conv", net.input("N", 4, "H", "W"), w), 6))


@CASES.case("int8 filter behind Identity, dequantised", 41, double=False)
def _(net: Net) -> None:
    stored = net.op("Identity", net.constant(net.rng.integers(-120, 120, (6, 4, 3, 3)).astype(np.int8)))
    scale = net.op("Identity", net.constant(np.full(6, 0.02, net.dtype)))
    net.output(net.bn(net.op("Conv", net.input("N", 4, "H", "W"), net.op("DequantizeLinear", stored, scale, axis=0)), 6))


@CASES.case("int8 factors behind a conv, which stay as they are", 13, 41, double=False, opset=12)
def _(net: Net) -> None:
    stored, scale = net.constant(net.rng.integers(20, 120, (6, 1, 1)).astype(np.int8)), net.constant(np.array(0.02, net.dtype))
    net.output(net.bn(net.op("Mul", net.conv(net.input("N", 4, "H", "W"), 4, 6), net.op("DequantizeLinear", stored, scale)), 6))


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
