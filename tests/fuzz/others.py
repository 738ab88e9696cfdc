"""The operators of random graphs that hold graphs of their own, clip, normalise, or read weights that are stored as integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np
from cases.builder import element
from cases.quantised import weight as quantised
from onnx import helper

from . import moves
from .operators import Growing, Shape, _fits, _image, batchnorm, constant, convolution, elementwise, gemm, matmul, pool

CODES = (
    (np.int8, 0, 10),
    (np.uint8, 128, 10),
    (np.uint8, 100, 13),
    (np.int16, 0, 21),
    (ml_dtypes.int4, 0, 21),
    (ml_dtypes.uint4, 8, 21),
    (ml_dtypes.float8_e4m3fn, 0, 19),
)  # of stored weights: their type, zero point and first opset
PLAIN = (batchnorm, batchnorm, convolution, elementwise, gemm, matmul, constant, pool, moves.reshape, moves.transpose)


def _along(g: Growing, shape: Shape) -> list[int]:
    """The shape of numbers that vary along the channels, or along nothing."""
    varies = len(shape) >= 2 and shape[1] > 0 and g.chance(0.6)
    return [n if varies and i == 1 else 1 for i, n in enumerate(shape)]


def clamp(g: Growing) -> str | bool:
    """ReLU6, hardtanh and their kin: bounds that are missing, that meet, that are swapped, that differ by channel."""
    x = g.choose()
    if x is None:
        return False
    shape, op = g.shapes[x], str(g.pick("Clip", "Clip", "Max", "Min", "both", "HardSigmoid", "HardSwish", "Elu", "Softplus"))
    if op == "HardSwish" and g.net.opset < 14:
        op = "HardSigmoid"
    if op in ("HardSigmoid", "HardSwish", "Elu", "Softplus"):
        return g.add(op, [x], shape)
    if op != "Clip":
        names = ["Max", "Min"] if op == "both" else [op]
        for name in names[:: g.whole(0, 1) * 2 - 1]:
            bound = g.weight(np.asarray(g.tensor(*_along(g, shape)) + (0.8 if name == "Min" else -0.8)), "bound")
            x = g.made(g.net.op(name, *([bound, x] if g.chance(0.3) else [x, bound])), [x], shape)
        return x
    low, high = ((0.0, 6.0), (-1.0, 1.0), (None, 0.5), (-0.5, None), (0.7, 0.2), (0.3, 0.3), (-np.inf, 1.0))[g.rng.integers(7)]
    if g.net.opset < 11:
        bounds = {k: v for k, v in (("min", low), ("max", high)) if v is not None}
        return g.add("Clip", [x], shape, **bounds)
    ends = ["" if v is None else g.weight(np.array(v), "bound") for v in (low, high)]
    return g.made(g.net.op("Clip", x, *ends[: 1 if high is None else 2]), [x], shape)


def normalisation(g: Growing) -> str | bool:
    """Group, RMS and instance normalisations with coefficients, which a product may read."""
    x = g.choose(_image if g.chance(0.6) else lambda s: len(s) >= 2 and s[-1] > 1)
    if x is None:
        return False
    shape = g.shapes[x]
    if _image(shape) and math.prod(shape[2:]) > 1 and g.chance(0.7):
        c = shape[1]
        groups = int(g.pick(*[d for d in range(1, c + 1) if c % d == 0]))
        if g.net.opset >= 21 and math.prod(shape[2:]) * c // groups > 1:
            affine = [g.weight(g.tensor(c)), g.weight(g.tensor(c))]
            return g.made(g.net.op("GroupNormalization", x, *affine, num_groups=groups, epsilon=0.1), [x], shape)
        y = g.made(g.net.op("InstanceNormalization", x, *(g.weight(a) for a in (np.ones(c), np.zeros(c))), epsilon=0.1), [x], shape)
        along = [1 if i != 1 else n for i, n in enumerate(shape)][1:]
        y = g.made(g.net.op("Mul", y, g.weight(g.tensor(*along))), [y], shape)
        return g.made(g.net.op("Add", y, g.weight(g.tensor(*along))), [y], shape)
    n = shape[-1]
    if n < 2:
        return False
    if g.net.opset >= 23 and g.chance(0.5):
        y = g.made(g.net.op("RMSNormalization", x, g.weight(g.tensor(n)), epsilon=0.1), [x], shape)
    elif g.net.opset >= 17:
        y = g.made(g.net.op("LayerNormalization", x, g.weight(g.tensor(n)), g.weight(g.tensor(n)), epsilon=0.1), [x], shape)
    else:
        return False
    if g.chance(0.6) and _fits((*shape[:-1], 4)):  # what reads it
        return g.made(g.net.op("MatMul", y, g.weight(g.tensor(n, 4, scale=n**-0.5))), [y], (*shape[:-1], 4))
    return y


def linear_twice(g: Growing) -> str | bool:
    """Two linear layers in a row, with or without a BatchNorm between."""
    how = (gemm, matmul, convolution)[g.rng.integers(3)]
    y = how(g)
    if not y:
        return False
    if g.chance(0.5) and len(g.shapes[y]) >= 2 and g.shapes[y][1] > 0:
        y = batchnorm(g, y)
    if how is convolution:
        return convolution(g, y, plain=g.chance(0.6))
    shape = g.shapes[str(y)]
    if len(shape) < 2 or shape[-1] < 0 or not _fits((*shape[:-1], 5)):
        return False
    return g.made(g.net.op("MatMul", str(y), g.weight(g.tensor(shape[-1], 5, scale=shape[-1] ** -0.5))), [str(y)], (*shape[:-1], 5))


def coded(g: Growing) -> str | bool:
    """A convolution, or a product, whose weight is stored as integers, or rounded to them when the model runs."""
    if g.net.dtype != np.float32 or (x := g.choose(lambda s: len(s) >= 2 and all(n > 0 for n in s[1:]))) is None:
        return False
    shape = g.shapes[x]
    kind, zero, since = CODES[g.rng.integers(len(CODES))]
    if g.net.opset < max(since, 10):
        return False
    conv, out = _image(shape) and g.chance(0.7), g.whole(1, 6)
    size = (out, shape[1], *[1] * (len(shape) - 2)) if conv else (shape[-1], out)
    after = (shape[0], out, *shape[2:]) if conv else (*shape[:-1], out)
    if not _fits(after):
        return False
    axis: int | None = int(g.pick(0, 1)) if g.net.opset >= 13 and g.chance(0.7) else None
    integers = not np.issubdtype(kind, np.inexact) and kind is not ml_dtypes.float8_e4m3fn
    block = g.whole(1, 2) if axis is not None and g.net.opset >= 21 and g.chance(0.3) else 0
    if integers:
        how = {"full": g.chance(0.4), "float_first": g.chance(0.4), "signed": g.chance(0.2), "bare": zero == 0 and g.chance(0.3)}
        w = quantised(g.net, size, axis=axis, block=block, kind=kind, zero=zero, **how)
    else:
        w = g.net.op(
            "DequantizeLinear",
            g.net.constant(g.tensor(*size).astype(kind), "q"),
            g.weight(g.rng.uniform(0.5, 1, () if axis is None else (size[axis],)), "scale"),
            **({} if axis is None else {"axis": axis}),
        )
    return g.made(g.net.op("Conv" if conv else "MatMul", x, w), [x], after)


def training(g: Growing) -> str | bool:
    """A BatchNorm in training mode, which stays, and in front of it one at inference."""
    x = g.choose(lambda s: len(s) >= 3 and s[1] > 0 and math.prod(abs(n) for n in s) > 2 * s[1])
    if x is None or g.net.opset < 14 or not g.chance(0.3):
        return False
    y = str(batchnorm(g, x))
    params = g.net.bn_params(g.shapes[y][1])
    return g.made(g.net.ops("BatchNormalization", y, *params, outputs=3, training_mode=1, epsilon=0.1)[0], [y], g.shapes[y])


def enlarge(g: Growing) -> str | bool:
    """Upsample, and the first Resize."""
    x = g.choose(lambda s: len(s) == 4 and all(n > 0 for n in s[1:]))
    if x is None or g.net.opset > 10:
        return False
    n, c, h, w = g.shapes[x]
    if not _fits((n, c, 2 * h, w)):
        return False
    scales = g.net.constant(np.array([1, 1, 2, 1], np.float32), "scales")
    op = "Resize" if g.net.opset == 10 else "Upsample"
    return g.made(g.net.op(op, x, scales, mode=str(g.pick("nearest", "linear"))), [x], (n, c, 2 * h, w))


def mixing(g: Growing) -> str | bool:
    """Operators that nothing passes, or little."""
    x = g.choose(lambda s: len(s) >= 2 and all(n > 0 for n in s[1:]))
    if x is None:
        return False
    shape = g.shapes[x]
    op = str(g.pick("Softmax", "CumSum", "LpNormalization", "Erf", "Gelu", "TopK", "ScatterElements", "ReverseSequence", "Trilu", "Cast"))
    since = {"CumSum": 11, "Gelu": 20, "TopK": 11, "ScatterElements": 11, "ReverseSequence": 10, "Trilu": 14}
    if g.net.opset < since.get(op, 9):
        return False
    if op in ("Softmax", "LpNormalization"):
        return g.add(op, [x], shape, axis=1)
    if op == "CumSum":
        return g.made(g.net.op(op, x, g.place(g.whole(1, len(shape) - 1))), [x], shape)
    if op == "TopK":
        k = g.whole(1, shape[1])
        return g.made(g.net.ops(op, x, g.net.ints(k), outputs=2, axis=1)[0], [x], (shape[0], k, *shape[2:]))
    if op == "ScatterElements":
        if shape[0] < 0:
            return False
        places = g.net.constant(np.zeros((1,) * len(shape), np.int64))
        return g.made(g.net.op(op, x, places, g.weight(g.tensor(*(1,) * len(shape))), axis=g.whole(0, len(shape) - 1)), [x], shape)
    if op == "ReverseSequence":
        if shape[0] < 0:
            return False
        return g.made(g.net.op(op, x, g.net.ints(*[shape[1]] * shape[0]), batch_axis=0, time_axis=1), [x], shape)
    if op == "Cast":
        return g.add(op, [x], shape, to=element(g.net.dtype))
    return g.add(op, [x], shape)


# --- graphs within ---------------------------------------------------------------------------------------------------------------


def _inner(g: Growing, label: str, holds: Sequence[str] = ()) -> Growing:
    """A graph within the one that grows, of which it sees all."""
    own = {"net": g.net.child(g.net.fresh(label)), "norms": list(g.norms), "filters": list(g.filters), "holds": holds or g.holds}
    return replace(g, shapes={}, used=set(), **own)


def _grown(inner: Growing, x: str, shape: Shape, keep: Shape | None = None) -> str:
    """What comes of x after a few operators. keep: the shape that it must have."""
    inner.shapes[x] = shape
    for _ in range(inner.whole(1, 4)):
        PLAIN[inner.rng.integers(len(PLAIN))](inner)
    ends = [v for v, s in inner.shapes.items() if v != x and keep in (None, s)]
    return ends[-1] if ends else inner.add("Identity", [x], shape)


def branches(g: Growing) -> str | bool:
    """An If, whose branches read what is outside; one of them may do nothing."""
    x = g.choose()
    if x is None:
        return False
    shape = g.shapes[x]
    flag = g.net.constant(np.array(True)) if g.chance(0.2) else _flag(g, x)
    graphs = []
    for label in ("then", "else"):
        inner = _inner(g, label)
        y = _grown(inner, x, shape, shape)
        inner.net.output(y)
        graphs.append(inner.net.graph(label))
    y = g.net.op("If", flag, then_branch=graphs[0], else_branch=graphs[1])
    g.used.add(x)
    return g.made(y, [x], shape)


def _flag(g: Growing, x: str) -> str:
    total = g.net.op("ReduceSum", x, keepdims=0)
    return g.net.op("Greater", total, g.net.scalar(0.12345))


def loop(g: Growing) -> str | bool:
    """A Loop of two turns, whose body reads its state and, perhaps, what is outside."""
    x = g.choose(lambda s: len(s) >= 2)
    if x is None or g.net.opset < 11:
        return False
    shape, inner = g.shapes[x], _inner(g, "loop")
    names = [inner.net.fresh(n) for n in ("turn", "go_on", "state")]
    inner.net.inputs = [
        helper.make_tensor_value_info(names[0], 7, ()),
        helper.make_tensor_value_info(names[1], 9, ()),
        helper.make_tensor_value_info(names[2], element(g.net.dtype), None if g.chance(0.5) else [n if n > 0 else None for n in shape]),
    ]
    y = _grown(inner, names[2], shape, shape)
    y = inner.net.op("Tanh", y)
    if g.chance(0.3):
        y = inner.net.op("Add", y, x)
    inner.net.output(inner.net.op("Identity", names[1]), dtype=np.bool_)
    inner.net.output(y)
    turns = g.net.constant(np.array(2, np.int64))
    return g.made(g.net.op("Loop", turns, "", x, body=inner.net.graph("loop")), [x], shape)


def scan(g: Growing) -> str | bool:
    """A Scan over the first axis."""
    x = g.choose(lambda s: len(s) >= 3 and all(n > 0 for n in s))
    if x is None or g.net.opset < 9:
        return False
    shape, inner = g.shapes[x], _inner(g, "scan")
    item = inner.net.fresh("item")
    inner.net.inputs = [helper.make_tensor_value_info(item, element(g.net.dtype), shape[1:])]
    y = _grown(inner, item, shape[1:])
    after = inner.shapes.get(y, shape[1:])
    if not _fits((shape[0], *after)) or min(after, default=1) < 0:
        return False
    inner.net.output(y)
    return g.made(g.net.op("Scan", x, body=inner.net.graph("scan"), num_scan_inputs=1), [x], (shape[0], *after))


def function(g: Growing) -> str | bool:
    """A local function, called once or twice; its weights are constants within, or come in."""
    x = g.choose(lambda s: len(s) >= 2 and s[1] > 0)
    if x is None:
        return False
    shape, inner = g.shapes[x], _inner(g, "function", ("constant",))
    inner.net.inputs, inner.norms, inner.filters = [], [], []
    y = _grown(inner, "x", shape, shape)
    given = ["x"]
    passed = [x]
    if g.chance(0.5):
        params = g.net.bn_params(shape[1])
        given += ["gamma", "beta", "mean", "var"]
        passed += params
        y = inner.net.bn(y, params=given[1:])
    for tensor in inner.net.initializers:  # which a function can't have
        inner.net.nodes.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    name = f"Block{len(g.net.functions)}"
    g.net.function(name, given, [y], inner.net)
    z = g.made(g.net.op(name, *passed, domain="local"), [x], shape)
    if g.chance(0.4):
        z = g.made(g.net.op(name, z, *passed[1:], domain="local"), [z], shape)
    return z


def microsoft(g: Growing) -> str | bool:
    """Operators as ONNX Runtime fuses them."""
    x = g.choose(lambda s: len(s) == 4 and all(n > 0 for n in s[1:]))
    if x is None or g.net.dtype != np.float32:
        return False
    n, c, h, w = g.shapes[x]
    if g.chance(0.5):
        out = g.whole(1, 6)
        inputs = [g.weight(g.tensor(out, c, 1, 1, scale=c**-0.5)), g.weight(g.tensor(out))]
        act = str(g.pick("Relu", "Sigmoid", "Tanh", ""))
        y = g.net.op("FusedConv", x, *inputs, domain="com.microsoft", kernel_shape=[1, 1], **({"activation": act} if act else {}))
        return g.made(y, [x], (n, out, h, w))
    if g.chance(0.5):
        matrix = g.tensor(5, w) if (turned := g.chance(0.5)) else g.tensor(w, 5)
        y = g.net.op("FusedMatMul", x, g.weight(matrix), domain="com.microsoft", alpha=0.5, transB=int(turned))
        return g.made(y, [x], (n, c, h, 5))
    return g.made(g.net.op(str(g.pick("Gelu", "QuickGelu")), x, domain="com.microsoft"), [x], (n, c, h, w))
