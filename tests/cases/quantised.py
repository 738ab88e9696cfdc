"""BatchNorms behind weights that are stored as integers, or rounded to them in the graph (lines 41, 42, 51, 52, 53)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from .builder import Net, Value
from .case import Theme

CASES = Theme()
SHAPES = {"Conv": (6, 4, 3, 3), "ConvTranspose": (4, 6, 3, 3), "Gemm": (4, 6), "MatMul": (4, 6), "Linear": (6, 4)}


def weight(
    net: Net,
    shape: tuple[int, ...],
    *,
    axis: int | None = 0,
    block: int = 0,
    kind: Any = np.int8,
    zero: int = 0,
    full: bool = False,
    float_first: bool = False,
    scale_type: Any = None,
    bare: bool = False,
    signed: bool = False,
    domain: str = "",
    behind: Sequence[str] = (),
) -> Value:
    """A quantised weight. axis: of its scales, None for one; block: along the axis; full: with all codes of its type, the lowest too.

    float_first: a float weight, which QuantizeLinear rounds; bare: without zero points; signed: with negative scales;
    domain: of the operators; behind: what lays it out anew.
    """
    info = ml_dtypes.iinfo(kind)
    low, high = (int(info.min), int(info.max)) if full else (max(int(info.min), 2 * zero - int(info.max)), int(info.max))
    codes = net.rng.integers(low, high + 1, shape)
    codes.flat[0] = low
    count: tuple[int, ...] = () if axis is None else (shape[axis],)
    attrs: dict[str, Any] = {} if axis is None else {"axis": axis}
    if block:
        assert axis is not None
        count, attrs = tuple(-(-n // block) if i == axis else n for i, n in enumerate(shape)), {"axis": axis, "block_size": block}
    attrs["domain"] = domain
    numbers = (net.rng.uniform(1, 2, count) / (high - low)).astype(scale_type or net.dtype)
    if signed:
        numbers = numbers * np.resize([-1, 1, 1], count).astype(numbers.dtype)
    scale = net.weight(numbers, "scale", dtype=scale_type)
    zeros = [] if bare else [net.constant(np.full(count, zero).astype(kind), "zero")]
    if float_first:  # not at the middle of a step
        spread = numbers if not block else np.repeat(numbers, block, axis).take(range(shape[axis or 0]), axis)
        if axis is not None and not block:
            spread = numbers.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        inside = net.rng.uniform(-0.45, 0.45, shape)
        q = net.op("QuantizeLinear", net.weight((codes - zero + inside) * spread, "w", dtype=scale_type), scale, *zeros, **attrs)
    else:
        q = net.constant(codes.astype(kind), "q")
    w = net.op("DequantizeLinear", q, scale, *zeros, **attrs)
    for op in behind:
        w = net.op(op, w, **({"to": 1} if op == "Cast" else {"perm": [1, 0]} if op == "Transpose" else {}))
    return w


def rounded(net: Net, x: Value, zero: int = 128, scale: float = 0.05) -> Value:
    """Activations through QuantizeLinear and DequantizeLinear."""
    s, z = net.constant(np.array(scale, net.dtype), "act_scale"), net.constant(np.array(zero, np.uint8), "act_zero")
    return net.op("DequantizeLinear", net.op("QuantizeLinear", x, s, z), s, z)


def integer_bias(net: Net, *, each: bool = True) -> Value:
    """An int32 bias, as wide as the products that it is added to."""
    scale = net.weight(net.rng.uniform(1e-4, 2e-4, (6,) if each else ()), "bias_scale")
    return net.op(
        "DequantizeLinear", net.constant(net.rng.integers(-9000, 9000, 6).astype(np.int32), "qb"), scale, **{"axis": 0} if each else {}
    )


def layer(net: Net, x: Value, op: str = "Conv", *, bias: str = "float", **how: Any) -> Value:
    """A layer from 4 to 6 channels. bias: "float", "int32", "int32 of one scale" or ""."""
    w = weight(net, SHAPES[op], **how)
    b = [] if not bias or op in ("MatMul", "Linear") else [net.bias(6) if bias == "float" else integer_bias(net, each=bias == "int32")]
    if op == "Linear":
        w, op = net.op("Transpose", w, perm=[1, 0]), "MatMul"
    return net.op(op, x, w, *b)


def drawn(net: Net, op: str = "Conv", *, positive: bool = False, act: bool = False, shift: bool = True, **how: Any) -> None:
    """act: with activations quantised in front."""
    x = net.input("N", 4, "H", "W") if "Conv" in op else net.input("N", 4)
    y = net.bn(layer(net, rounded(net, x) if act else x, op, **how), 6, positive=positive, shift=shift)
    net.output(y, shape=["N", 6, "H out", "W out"] if "domain" in how else None)  # which no inference finds


def case(name: str, *lines: int, opset: int = 19, notes: str = "takes it in its scales", **how: Any) -> None:
    CASES.case(name, *(lines or (52,)), draw=partial(drawn, **how), opset=opset, notes=notes, double=False)


def stays(name: str, reason: str, *lines: int, opset: int = 19, **how: Any) -> None:
    CASES.case(name, *(lines or (52,)), draw=partial(drawn, **how), opset=opset, left=1, reason=reason, double=False)


MICROSOFT = "com.microsoft"
ONE = "one scale becomes one for each channel"
BEHIND = "is multiplied by a factor for each channel, and none of the integers"
SIGN = "change their sign"
MIRRORED = "move their zero point"

# stored as integers
case("int8 filter, a scale per channel", 41, positive=True, notes="none of its integers changes")
case("int8 filter, a scale per channel, both signs", 41, notes=SIGN)
case("int8 filter, one scale", 41, axis=None, positive=True, notes=ONE)
case("int8 filter, one scale, both signs, opset 13", axis=None, opset=13, notes=ONE)
stays("int8 filter, one scale, opset 12", "opset 12 has no scale for each channel", 41, axis=None, opset=12)
case("int8 filter that holds -128, both signs", 41, full=True, notes=MIRRORED)
case("int8 filter of one scale that holds -128, both signs", axis=None, full=True, notes=MIRRORED)
case("uint8 filter, zero point 128", kind=np.uint8, zero=128, full=True, notes=MIRRORED)
case("uint8 filter, zero point 100, activations quantised", kind=np.uint8, zero=100, full=True, act=True)
case("int8 filter without zero points", bare=True)
case("int8 filter that holds -128 without zero points", bare=True, full=True, notes=MIRRORED)
case("int16 filter", opset=21, kind=np.int16)
case("uint16 filter", opset=21, kind=np.uint16, zero=30000)
case("int4 filter", opset=21, kind=ml_dtypes.int4)
case("uint4 filter that holds 0", opset=21, kind=ml_dtypes.uint4, zero=8, full=True, notes=MIRRORED)
case("int8 filter, half-precision scales", scale_type=np.float16, behind=["Cast"])
case("int8 filter in blocks of the input channels", opset=21, axis=1, block=2)
case("int8 filter in uneven blocks that holds -128", opset=21, axis=1, block=3, full=True, notes=MIRRORED)
case("int8 filter in blocks without zero points", opset=21, axis=1, block=2, bare=True)
stays("int8 filter in blocks of two output channels", "in blocks of 2 along axis 0", opset=21, axis=0, block=2)
stays("int8 filter, a scale per input channel", "scales along axis 1, and the map varies along axis 0", axis=1)
case("int8 filter of a transposed conv", op="ConvTranspose", axis=1, full=True, notes=MIRRORED)
case("int8 filter of a transposed conv, one scale", 41, op="ConvTranspose", axis=None, notes=ONE)
stays("int8 filter of a transposed conv, a scale per input channel", "scales along axis 0", op="ConvTranspose", axis=0)
case("int8 matrix of a gemm", 41, op="Gemm", axis=1)
case("int8 matrix of a gemm, one scale", op="Gemm", axis=None, notes=ONE)
case("int8 matrix", op="MatMul", axis=1)
case("int8 matrix, transposed behind", op="Linear", axis=0, full=True, notes=MIRRORED)
case("int8 matrix of one scale, transposed behind", op="Linear", axis=None, notes=ONE)
case("int4 matrix in blocks", opset=21, op="MatMul", axis=0, block=2, kind=ml_dtypes.int4)
case("int8 filter and int32 bias, which becomes a float one", 41, bias="int32", act=True, notes="becomes floats")
case("int8 filter and int32 bias, no shift", bias="int32", shift=False, act=True)
case("int8 filter and int32 bias of one scale, no shift", bias="int32 of one scale", shift=False)
case("int8 filter without bias", bias="")
case("int8 filter, negative scales", signed=True, notes=SIGN)
case("int8 filter, ONNX Runtime's operators, one scale", opset=11, domain=MICROSOFT, axis=None, notes=ONE)
case("int16 filter, ONNX Runtime's operators", opset=17, domain=MICROSOFT, kind=np.int16, full=True, notes=MIRRORED)
case("uint16 filter, ONNX Runtime's operators, rounded in the graph", 51, opset=17, domain=MICROSOFT, kind=np.uint16, float_first=True)
case("int8 filter of one negative scale that holds -128", axis=None, signed=True, full=True, notes=MIRRORED)


@CASES.case("int8 filters of one, two and three axes, grouped and depthwise", 52, double=False, opset=19, notes=MIRRORED)
def _(net: Net) -> None:
    outputs = []
    for i, (out, fan_in, groups, *kernel) in enumerate(((6, 4, 1, 3), (6, 2, 2, 3, 3), (4, 1, 4, 3, 3), (6, 4, 1, 2, 2, 2))):
        x = net.input("N", 4, *"DHW"[: len(kernel)], name=f"x{i}")
        w = weight(net, (out, fan_in, *kernel), full=True, axis=0 if i else None)
        outputs.append(net.bn(net.op("Conv", x, w, net.bias(out), group=groups), out))
    net.output(*outputs)


@CASES.case("an int8 matrix of a gemm, transposed and halved", 52, double=False, opset=19, notes="takes it in its scales")
def _(net: Net) -> None:
    net.output(net.bn(net.op("Gemm", net.input("N", 4), weight(net, (6, 4), full=True), net.bias(6), transB=1, alpha=0.5), 6))


@CASES.case("an int8 matrix that is made a filter", 52, double=False, opset=19, notes="takes it in its scales")
def _(net: Net) -> None:
    w = net.reshape(weight(net, (6, 36), full=True), 6, 4, 3, 3)
    net.output(net.bn(net.op("Conv", net.input("N", 4, "H", "W"), w), 6))


@CASES.case("an int8 table", 52, double=False, opset=19, below=5, notes="takes it in its scales")
def _(net: Net) -> None:
    rows = net.op("Gather", weight(net, (5, 6), axis=1), net.input("N", dtype=np.int64))
    net.output(net.bn(rows, 6, shift=False))


@CASES.case("an int8 filter whose scales are of half precision", 52, double=False, opset=23, notes="takes it in its scales")
def _(net: Net) -> None:
    scale = net.weight(net.rng.uniform(0.01, 0.02, 6), "scale", dtype=np.float16)
    w = net.op("DequantizeLinear", net.constant(net.rng.integers(-120, 120, SHAPES["Conv"]).astype(np.int8)), scale, axis=0, output_dtype=1)
    net.output(net.bn(net.op("Conv", net.input("N", 4, "H", "W"), w), 6))


@CASES.case("int8 numbers in a row that Reshape makes a filter", 52, double=False, opset=19, notes=BEHIND)
def _(net: Net) -> None:
    w = net.reshape(weight(net, (216,), axis=None), *SHAPES["Conv"])
    net.output(net.bn(net.op("Conv", net.input("N", 4, "H", "W"), w), 6))


case("int2 filter that holds -2", opset=25, kind=ml_dtypes.int2, full=True, notes=MIRRORED)
case("uint2 filter, rounded in the graph", 51, opset=25, kind=ml_dtypes.uint2, zero=1, float_first=True)
case("int2 filter in blocks", opset=25, kind=ml_dtypes.int2, axis=1, block=2)


def of_float4(
    net: Net, *, axis: int | None = 0, block: int = 0, scales: str = "float32", rounds: bool = False, zeros: bool = False
) -> None:
    """A filter of four-bit floats. scales: their type, or "codes" with a scale of their own. rounds: when the model runs."""
    shape, kind = SHAPES["Conv"], ml_dtypes.float4_e2m1fn
    numbers = net.rng.choice([-6.0, -4.0, -3.0, -1.5, -0.5, 0.0, 1.0, 2.0, 6.0], shape)
    count = () if axis is None else (shape[axis],) if not block else tuple(-(-n // block) if i == axis else n for i, n in enumerate(shape))
    how: dict[str, Any] = ({} if axis is None else {"axis": axis}) | ({"block_size": block} if block else {})
    scale = net.rng.uniform(0.5, 1, count)
    if scales == "codes":
        s = net.op("DequantizeLinear", net.constant(scale.astype(ml_dtypes.float8_e4m3fn)), net.weight(np.array(0.1), "scale"))
    else:
        s = net.constant(scale.astype(np.float32 if scales == "float32" else ml_dtypes.float8_e8m0fnu), "scale")
        how |= {"output_dtype": 1} if scales != "float32" else {}
    z = [net.constant(np.zeros(count, kind), "zero")] if zeros or rounds else []
    q = net.op("QuantizeLinear", net.weight(0.7 * numbers), s, *z, **how) if rounds else net.constant(numbers.astype(kind), "q")
    net.output(net.bn(net.op("Conv", net.input("N", 4, "H", "W"), net.op("DequantizeLinear", q, s, *z, **how), net.bias(6)), 6))


for name, settings, notes, reason in (
    ("a scale per channel", {"zeros": True}, SIGN, ""),
    ("one scale", {"axis": None}, ONE, ""),
    ("in blocks whose scales are codes with a scale", {"axis": 1, "block": 2, "scales": "codes"}, "become float32", ""),
    ("rounded in the graph", {"rounds": True}, "", "rounded to float4_e2m1fn when the model runs"),
    ("scales that are powers of two", {"scales": "float8_e8m0fnu"}, "", "scales aren't of a type of which any multiple"),
):
    CASES.case(
        f"float4 filter, {name}",
        52,
        draw=partial(of_float4, **settings),
        opset=25,
        left=int(bool(reason)),
        notes=notes,
        reason=reason,
        double=False,
        ort=False,
    )


case("int8 filter in the newest opset", opset=25, full=True, notes=MIRRORED)
case("int8 filter in the newest opset, rounded in the graph", 51, opset=25, float_first=True)


# rounded when the model runs, as quantisation-aware training is exported
for kind, name, opset in ((np.int8, "int8", 13), (np.uint8, "uint8", 19), (np.int16, "int16", 21), (ml_dtypes.int4, "int4", 21)):
    zero = 128 if kind == np.uint8 else 0
    case(f"{name} filter, a scale per channel, rounded in the graph", 51, opset=opset, kind=kind, zero=zero, float_first=True, full=True)
case("int8 filter, one scale, rounded in the graph", 51, axis=None, float_first=True, notes=ONE)
stays("int8 filter, one scale, rounded in the graph at opset 10", "opset 10 has no scale", 51, axis=None, float_first=True, opset=10)
case("int8 filter, activations quantised, int32 bias, rounded in the graph", 51, float_first=True, act=True, bias="int32")
case("int8 filter in blocks, rounded in the graph", 51, float_first=True, opset=21, axis=1, block=2)
case("int8 filter, half-precision scales, rounded in the graph", 51, float_first=True, scale_type=np.float16, behind=["Cast"])
case("int8 filter behind a copy, rounded in the graph", 51, float_first=True, behind=["Identity"])
case("int8 filter of a transposed conv, rounded in the graph", 51, op="ConvTranspose", axis=1, float_first=True, full=True)
case("int8 filter, negative scales, rounded in the graph", 51, float_first=True, signed=True, full=True, notes=MIRRORED)
case("int8 matrix, rounded in the graph", 51, op="MatMul", axis=1, float_first=True)
case("int8 matrix, transposed behind, rounded in the graph", 51, op="Linear", float_first=True)
case("int8 filter with an Abs behind it, rounded in the graph", 51, float_first=True, behind=["Abs"], notes=BEHIND)


# the same in plain operators, as exporters write it that know no QuantizeLinear
def scaled(net: Net, shape: tuple[int, ...], kind: str, *, axis: int | None = 0, dtype: Any = np.int8) -> Value:
    """Integers times a scale. kind: how they are made: stored, or of a float weight."""
    s = net.weight(net.rng.uniform(0.01, 0.02, [n if i == axis else 1 for i, n in enumerate(shape)] if axis is not None else ()), "s")
    if "stored" in kind:
        info = np.iinfo(dtype)
        q = net.op("Cast", net.constant(net.rng.integers(info.min, info.max + 1, shape).astype(dtype), "q"), to=1)
    else:
        q = net.op("Div", net.weight(net.normal(*shape)), s)
        around = q
        q = net.op("Round", net.op("Add", q, net.scalar(3)) if "zero" in kind else q)
        q = net.op("Add", net.op("Sub", q, around), around) if "gradient" in kind else q
        q = net.op("Clip", q, net.scalar(-128), net.scalar(127))
    if "zero" in kind:
        q = net.op("Sub", q, net.scalar(3))
    return net.op("Mul", s, q) if "first" in kind else net.op("Mul", q, s)


def by_mul(net: Net, op: str, kind: str, axis: int | None, dtype: Any) -> None:
    x = net.input("N", 4, "H", "W") if "Conv" in op else net.input("N", 4)
    net.output(net.bn(net.op(op, x, scaled(net, SHAPES[op], kind, axis=axis, dtype=dtype)), 6))


for kind, op, axis, dtype in (
    ("stored", "Conv", 0, np.int8),
    ("stored, a zero point", "MatMul", 1, np.uint8),
    ("rounded", "Conv", 0, np.int8),
    ("rounded, a zero point", "Conv", None, np.int8),
    ("rounded, the scale first", "ConvTranspose", 1, np.int8),
    ("rounded past the gradient", "Gemm", None, np.int8),
):
    CASES.case(
        f"integers that a Mul scales, {kind}, in a {op}",
        52,
        draw=partial(by_mul, op=op, kind=kind, axis=axis, dtype=dtype),
        double=False,
        notes="none of its integers changes",
    )


def packed(net: Net) -> Value:
    q = net.constant(net.rng.integers(0, 256, (6, 2, 3, 3)).astype(np.uint8), "q")
    low = net.op("BitwiseAnd", q, net.constant(np.array(15, np.uint8)))
    high = net.op("BitShift", q, net.constant(np.array(4, np.uint8)), direction="RIGHT")
    return net.op("Sub", net.op("Cast", net.op("Concat", low, high, axis=1), to=1), net.scalar(8))


def of_codebook(net: Net) -> Value:
    places = net.op("Cast", net.constant(net.rng.integers(0, 16, SHAPES["Conv"]).astype(np.uint8), "q"), to=7)
    return net.op("Gather", net.weight(net.normal(16), "table"), places)


def of_two(net: Net) -> Value:
    return net.op("Where", net.op("GreaterOrEqual", net.filters(6, 4, 3, 3), net.scalar(0)), net.scalar(1), net.scalar(-1))


def of_truths(net: Net) -> Value:
    w = net.op("Cast", net.op("Greater", net.filters(6, 4, 3, 3), net.scalar(0)), to=1)
    return net.op("Sub", net.op("Mul", w, net.scalar(2)), net.scalar(1))


for name, kept, make in (
    ("packed", {"Mul": 1, "BitShift": 1}, packed),
    ("of a codebook", {"Mul": 1, "Gather": 1}, of_codebook),
    ("one of two numbers", {"Mul": 1, "Where": 1}, of_two),
    ("made of truths", {"Mul": 2, "Greater": 1}, of_truths),
):

    @CASES.case(f"integers that a Mul scales, {name}", 52, double=False, opset=18, notes="none of its integers changes", after=kept)
    def _(net: Net, make: Callable[[Net], Value] = make) -> None:
        w = net.op("Mul", make(net), net.weight(net.rng.uniform(0.01, 0.02, (6, 1, 1, 1)), "s"))
        net.output(net.bn(net.op("Conv", net.input("N", 4, "H", "W"), w), 6))


@CASES.case("int8 matrix whose products a Mul scales", 52, double=False, notes="scales integers", after={"Mul": 1, "Cast": 1})
def _(net: Net) -> None:
    stored = net.constant(net.rng.integers(-127, 128, SHAPES["MatMul"]).astype(np.int8), "q")
    y = net.op("Mul", net.op("MatMul", net.input("N", 4), net.op("Cast", stored, to=1)), net.weight(net.rng.uniform(0.01, 0.02, 6), "s"))
    net.output(net.bn(net.op("Add", y, net.bias(6)), 6))


@CASES.case("int8 filter less an offset, without a scale", 52, double=False, notes=BEHIND)
def _(net: Net) -> None:
    w = net.op("Sub", net.op("Cast", net.constant(net.rng.integers(-99, 99, SHAPES["Conv"]).astype(np.int8)), to=1), net.scalar(3))
    net.output(net.bn(net.op("Conv", net.input("N", 4, "H", "W"), w), 6))


@CASES.case("int8 filter whose scales the data tell", 52, left=1, reason="its scales are computed when the model runs", double=False)
def _(net: Net) -> None:
    x, stored = net.input("N", 4, "H", "W"), net.constant(net.rng.integers(-120, 120, SHAPES["Conv"]).astype(np.int8))
    scale = net.op("Mul", net.reduce("Max", net.op("Abs", x), 0, 1, 2, 3, keepdims=0), net.weight(net.rng.uniform(0.01, 0.02, 6)))
    net.output(net.bn(net.op("Conv", x, net.op("DequantizeLinear", stored, scale, axis=0)), 6))


@CASES.case("int8 filter with computed scales", 41, double=False, notes="none of its integers changes", opset=19)
def _(net: Net) -> None:
    scale = net.op("Mul", net.constant(np.full(6, 0.02, net.dtype)), net.constant(np.array(0.5, net.dtype)))
    stored = net.constant(net.rng.integers(-120, 120, (6, 4, 3, 3)).astype(np.int8))
    w = net.op("DequantizeLinear", stored, scale, axis=0)
    net.output(net.bn(net.op("Conv", net.input("N", 4, "H", "W"), w), 6, positive=True))


@CASES.case("int8 filter behind Identity", 41, double=False)
def _(net: Net) -> None:
    stored = net.op("Identity", net.constant(net.rng.integers(-120, 120, (6, 4, 3, 3)).astype(np.int8)))
    scale = net.op("Identity", net.constant(np.full(6, 0.02, net.dtype)))
    net.output(net.bn(net.op("Conv", net.input("N", 4, "H", "W"), net.op("DequantizeLinear", stored, scale, axis=0)), 6))


@CASES.case("a float filter, computed and then rounded", 51, double=False, opset=19, after={"QuantizeLinear": 1, "Mul": 0})
def _(net: Net) -> None:
    w = net.op("Mul", net.filters(6, 4, 3, 3), net.weight(net.rng.uniform(0.5, 1, (6, 1, 1, 1))))
    scale, zero = net.weight(net.rng.uniform(0.004, 0.006, 6), "scale"), net.constant(np.zeros(6, np.int8))
    w = net.op("DequantizeLinear", net.op("QuantizeLinear", w, scale, zero, axis=0), scale, zero, axis=0)
    net.output(net.bn(net.op("Conv", net.input("N", 4, "H", "W"), w), 6))


@CASES.case("int8 factors behind a conv, which stay as they are", 13, 41, double=False, opset=12)
def _(net: Net) -> None:
    stored, scale = net.constant(net.rng.integers(20, 120, (6, 1, 1)).astype(np.int8)), net.constant(np.array(0.02, net.dtype))
    net.output(net.bn(net.op("Mul", net.conv(net.input("N", 4, "H", "W"), 4, 6), net.op("DequantizeLinear", stored, scale)), 6))


@CASES.case("one int8 filter for two convolutions and two BatchNorms", 38, 52, double=False, opset=19, adds_bytes=True)
def _(net: Net) -> None:
    w, x, z = weight(net, SHAPES["Conv"]), net.input("N", 4, "H", "W"), net.input("N", 4, "H", "W", name="z")
    net.output(net.bn(net.op("Conv", x, w), 6), net.bn(net.op("Conv", z, w), 6))


@CASES.case("an int8 filter of one scale, whose channels are multiplied by factors", 52, double=False, opset=12, after={"Mul": 1})
def _(net: Net) -> None:
    y = layer(net, net.input("N", 4, "H", "W"), axis=None)
    net.output(net.bn(net.op("Mul", y, net.weight(net.rng.uniform(0.5, 1, (6, 1, 1)))), 6))


@CASES.case("an int8 filter of one scale, times what a float filter gives", 52, double=False, opset=12)
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    net.output(net.bn(net.op("Mul", layer(net, x, axis=None), net.conv(x, 4, 6)), 6, shift=False))


@CASES.case("a chain of quantised layers, activations between", 52, double=False, opset=19)
def _(net: Net) -> None:
    x = rounded(net, net.relu(net.bn(layer(net, rounded(net, net.input("N", 4, "H", "W"))), 6)), zero=0, scale=0.1)
    net.output(net.bn(net.op("Conv", x, weight(net, (5, 6, 3, 3), full=True)), 5))


@CASES.case("two quantised branches, which don't become one", 52, double=False, opset=19, after={"Conv": 2, "Add": 1})
def _(net: Net) -> None:
    x = net.input("N", 4, "H", "W")
    one = net.op("Conv", x, weight(net, SHAPES["Conv"]), pads=[1, 1, 1, 1])
    net.output(net.op("Add", net.bn(one, 6), net.bn(net.op("Conv", x, weight(net, (6, 4, 1, 1))), 6)))


@CASES.case(
    "a BatchNorm before an int8 filter in blocks along its input channels", 52, double=False, opset=21, notes="takes it in its scales"
)
def _(net: Net) -> None:
    x = net.op("Sigmoid", net.input("N", 4, "H", "W"))
    net.output(net.op("Conv", net.bn(x, 4), weight(net, SHAPES["Conv"], axis=1, block=1)))


for axis, reason in (
    (0, "scales along axis 0, and the map varies along axis 1"),
    (None, "scales can't vary along the axis that is summed over"),
):

    @CASES.case(f"a BatchNorm before an int8 filter, scales along {axis}", 52, double=False, left=1, reason=reason, opset=19)
    def _(net: Net, axis: int | None = axis) -> None:
        x = net.op("Sigmoid", net.input("N", 4, "H", "W"))
        net.output(net.op("Conv", net.bn(x, 4), weight(net, SHAPES["Conv"], axis=axis)))


@CASES.case("a channel of a BatchNorm that is dead", 48, 52, double=False, opset=19, notes="become their zero point")
def _(net: Net) -> None:
    params = net.bn_params(6)
    gamma = next(t for t in net.initializers if t.name == params[0])
    values = np.frombuffer(gamma.raw_data, net.dtype).copy()
    values[2] = 0
    gamma.raw_data = values.tobytes()
    net.output(net.bn(layer(net, net.input("N", 4, "H", "W")), 6, params=params))


@CASES.case(
    "activations quantised between conv and BatchNorm", 42, left=1, reason="rounds activations.*fold before quantising, or recalibrate"
)
def _(net: Net) -> None:
    scale, zero = net.constant(np.array(0.05, np.float32)), net.constant(np.array(10, np.uint8))
    y = net.conv(net.input("N", 4, "H", "W"), 4, 6)
    if net.dtype == np.float64:
        y = net.op("Cast", y, to=1)
    y = net.op("DequantizeLinear", net.op("QuantizeLinear", y, scale, zero), scale, zero)
    if net.dtype == np.float64:
        y = net.op("Cast", y, to=11)
    net.output(net.bn(y, 6))
