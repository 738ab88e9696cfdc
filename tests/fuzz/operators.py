"""What random graphs are made of: every function adds one operator, or one well-known block, to a graph that grows.

A shape is a tuple of integers in which -k stands for k times the batch size, so that a dynamic batch axis can be moved about and merged
with others; at most one axis of a tensor is dynamic. A function that finds no operand that suits it returns False.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from cases.builder import Net

Shape = tuple[int, ...]
LIMIT = 600  # elements of a tensor per sample, so that thousands of graphs run in minutes


@dataclass
class Growing:
    """A graph under construction, and what may be shared between its operators."""

    net: Net
    rng: np.random.Generator
    shapes: dict[str, Shape] = field(default_factory=dict)  # of every activation, in the order in which they were made
    used: set[str] = field(default_factory=set)
    norms: list[tuple[int, Sequence[str]]] = field(default_factory=list)  # (channels, parameters)
    filters: list[tuple[Shape, int, str]] = field(default_factory=list)  # (shape, groups, weight)
    holds: Sequence[str] = ("initializer", "initializer", "initializer", "constant", "identity")  # where weights may live
    dead: float = 0.0  # the share of gammas that are 0, in BatchNorms that have some

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def pick(self, *options: object) -> object:
        return options[self.rng.integers(len(options))]

    def whole(self, low: int, high: int) -> int:
        """A number between the two, both included."""
        return int(self.rng.integers(low, high + 1))

    def values(self, fits: Callable[[Shape], bool] = lambda s: True) -> list[str]:
        return [v for v, s in self.shapes.items() if fits(s)]

    def choose(self, fits: Callable[[Shape], bool] = lambda s: True) -> str | None:
        """An activation, a fresh one rather than an old one."""
        found = self.values(fits)
        if not found:
            return None
        unused = [v for v in found if v not in self.used]
        if unused and self.chance(0.75):
            return unused[-1] if self.chance(0.7) else unused[self.rng.integers(len(unused))]
        return found[-1 - min(int(self.rng.exponential(1.5)), len(found) - 1)]

    def add(self, op: str, inputs: Sequence[str], shape: Shape, **attrs: object) -> str:
        """An operator with one output of this shape."""
        return self.made(self.net.op(op, *inputs, **attrs), inputs, shape)

    def made(self, value: str, inputs: Sequence[str], shape: Shape) -> str:
        self.used |= set(inputs)
        self.shapes[value] = shape
        return value

    def place(self, index: int) -> str:
        """A place in a sequence."""
        return self.net.constant(np.array(index, np.int64))

    def axis(self, shape: Shape, static: bool = True) -> int:
        return int(self.pick(*[i for i, n in enumerate(shape) if n > 0 or not static]))

    def named(self, axis: int, rank: int) -> int:
        """An axis as an operator may name it: counted from the back, sometimes."""
        return axis - rank if self.net.opset >= 13 and self.chance(0.3) else axis

    def tensor(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return self.rng.normal(0, scale, shape)

    def weight(self, array: np.ndarray, stem: str = "w") -> str:
        self.net.hold = str(self.pick(*self.holds))
        return self.net.weight(array, stem)


def _fits(shape: Shape) -> bool:
    return len(shape) <= 5 and math.prod(abs(n) for n in shape) <= LIMIT and sum(n < 0 for n in shape) <= 1


def _static_from(first: int) -> Callable[[Shape], bool]:
    return lambda s: all(n > 0 for n in s[first:])


def _image(s: Shape) -> bool:
    return len(s) in (3, 4) and all(n > 0 for n in s[1:])


# --- what has weights ------------------------------------------------------------------------------------------------------------


def batchnorm(g: Growing, x: str | None = None) -> str | bool:
    x = x or g.choose(lambda s: len(s) >= 2 and s[1] > 0)
    if x is None:
        return False
    channels = g.shapes[x][1]
    shared = [params for c, params in g.norms if c == channels]
    if shared and g.chance(0.2):
        params = shared[-1]
        if g.chance(0.3):  # another layer that shares gamma and beta alone
            params = [*params[:2], *_statistics(g, channels)]
    else:
        gamma = g.rng.uniform(0.5, 1.5, channels)
        kind = g.rng.random()
        if kind < 0.5:
            gamma *= g.rng.choice([-1, 1], channels)
        if kind < 0.1:
            gamma[g.rng.integers(channels)] = 0
        elif g.dead and g.chance(0.6):
            gamma[g.rng.random(channels) < g.dead] = 0
        shifted = not g.chance(0.15)
        params = [g.weight(gamma, "gamma"), g.weight(g.tensor(channels) * shifted, "beta"), *_statistics(g, channels, shifted)]
    g.norms.append((channels, params))
    return g.made(g.net.bn(x, params=params), [x], g.shapes[x])


def _statistics(g: Growing, channels: int, shifted: bool = True) -> list[str]:
    return [g.weight(g.tensor(channels) * shifted, "mean"), g.weight(g.rng.uniform(0.3, 2.0, channels), "var")]


def convolution(g: Growing, x: str | None = None, *, cout: int | None = None, keep: bool = False, plain: bool = False) -> str | bool:
    """keep: the size of space. plain: no groups."""
    x = x or g.choose(_image)
    if x is None:
        return False
    n, cin, *space = g.shapes[x]
    dims = len(space)
    groups = 1 if plain else int(g.pick(*[d for d in range(1, cin + 1) if cin % d == 0], 1))
    cout = cout or groups * g.whole(1, max(1, 8 // groups))
    if cout % groups:
        groups = 1
    kernel = [int(g.pick(1, 1, 2, 3)) for _ in space]
    dilation = [g.whole(1, 2) if g.chance(0.2) else 1 for _ in space]
    stride = [g.whole(1, 2) if g.chance(0.3) else 1 for _ in space]
    if keep:
        kernel, stride = [int(g.pick(1, 3)) for _ in space], [1] * dims
    attrs: dict[str, object] = {"group": groups, "kernel_shape": kernel, "strides": stride, "dilations": dilation}
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if g.chance(0.15):
        attrs["auto_pad"] = g.pick("SAME_UPPER", "SAME_LOWER")
        after = [-(-size // s) for size, s in zip(space, stride, strict=True)]
    else:
        low, high = ([r // 2 for r in reach],) * 2 if keep else ([g.whole(0, 1) * g.whole(0, 1) for _ in space] for _ in "lh")
        attrs["pads"] = [*low, *high]
        after = [(size + a + b - r - 1) // s + 1 for size, a, b, r, s in zip(space, low, high, reach, stride, strict=True)]
    if min(after) < 1 or not _fits((n, cout, *after)):
        return False
    shape = (cout, cin // groups, *kernel)
    known = [w for s, k, w in g.filters if s == shape and k == groups]
    w = known[-1] if known and g.chance(0.3) else g.weight(g.tensor(*shape, scale=math.prod(shape[1:]) ** -0.5), "filters")
    g.filters.append((shape, groups, w))
    bias = [g.weight(g.tensor(cout), "bias")] if g.chance(0.5) else []
    return g.made(g.net.op("Conv", x, w, *bias, **attrs), [x], (n, cout, *after))


def conv_transpose(g: Growing) -> str | bool:
    x = g.choose(_image)
    if x is None:
        return False
    n, cin, *space = g.shapes[x]
    groups = int(g.pick(*[d for d in range(1, cin + 1) if cin % d == 0], 1))
    cout = groups * g.whole(1, max(1, 6 // groups))
    kernel = [g.whole(1, 3) for _ in space]
    stride = [g.whole(1, 2) for _ in space]
    extra = [s - 1 if g.chance(0.3) else 0 for s in stride]
    pads = [min(g.whole(0, 1) * g.whole(0, 1), k - 1) for k in kernel]
    after = [s * (size - 1) + e + k - 2 * p for size, s, e, k, p in zip(space, stride, extra, kernel, pads, strict=True)]
    if min(after) < 1 or not _fits((n, cout, *after)):
        return False
    w = g.weight(g.tensor(cin, cout // groups, *kernel, scale=(cin // groups * math.prod(kernel)) ** -0.5), "filters")
    bias = [g.weight(g.tensor(cout), "bias")] if g.chance(0.5) else []
    attrs = {"group": groups, "kernel_shape": kernel, "strides": stride, "pads": pads + pads, "output_padding": extra}
    return g.made(g.net.op("ConvTranspose", x, w, *bias, **attrs), [x], (n, cout, *after))


def gemm(g: Growing) -> str | bool:
    x = g.choose(lambda s: len(s) == 2)
    if x is None:
        return False
    second, across = g.chance(0.2), g.chance(0.2)
    rows, fan = g.shapes[x][::-1] if across else g.shapes[x]
    if second:
        rows, fan = fan, rows
    if fan < 0:
        return False
    out, turned = g.whole(1, 8), g.chance(0.5)
    w = g.tensor(fan, out, scale=fan**-0.5)
    if second:  # w' x: the activation is the right matrix
        shape: Shape = (out, rows)
        attrs = {"transB": int(across), "transA": int(turned)}
        inputs = [g.weight(w if turned else w.T), x]
    else:
        shape = (rows, out)
        attrs = {"transA": int(across), "transB": int(turned)}
        inputs = [x, g.weight(w.T if turned else w)]
    if g.chance(0.3):
        attrs |= {"alpha": 0.5, "beta": -1.5}
    if g.chance(0.6) or g.net.opset < 11:
        options = [s for s in ((shape[1],), (1, shape[1]), (1,), (), (1, 1), (shape[0], 1), shape) if all(n > 0 for n in s)]
        inputs.append(g.weight(g.tensor(*options[g.rng.integers(len(options))]), "bias"))
    return g.made(g.net.op("Gemm", *inputs, **attrs), [x], shape)


def matmul(g: Growing) -> str | bool:
    x = g.choose(lambda s: len(s) >= 2)
    if x is None:
        return False
    *lead, m, k = g.shapes[x]
    out = g.whole(1, 8)
    extra = [int(g.pick(1, n)) if n > 0 else 1 for n in lead[len(lead) - g.whole(0, len(lead)) :]] if lead and g.chance(0.3) else []
    if g.chance(0.25) and m > 0:
        shape = (*lead, out, k)
        if not _fits(shape):
            return False
        return g.made(g.net.op("MatMul", g.weight(g.tensor(*extra, out, m, scale=m**-0.5)), x), [x], shape)
    shape = (*lead, m, out)
    if k < 0 or not _fits(shape):
        return False
    return g.made(g.net.op("MatMul", x, g.weight(g.tensor(*extra, k, out, scale=k**-0.5))), [x], shape)


def einsum(g: Growing) -> str | bool:
    x = g.choose(lambda s: len(s) == 3 and s[1] > 1 and s[2] > 1)
    if x is None or g.net.opset < 12:
        return False
    n, c, d = g.shapes[x]
    out = g.whole(2, 6)
    equation, w, shape = (
        ("ncd,de->nce", (d, out), (n, c, out)),
        ("ncd,ec->ned", (out, c), (n, out, d)),
        ("ncd,cde->nce", (c, d, out), (n, c, out)),
        ("ncd,ce->ned", (c, out), (n, out, d)),
        ("ncd,cd->dcn", (c, d), (d, c, n)),
        ("...d,de->...e", (d, out), (n, c, out)),
        ("n...d,...de->n...e", (c, d, out), (n, c, out)),
        ("ncd->ndc", (), (n, d, c)),
        ("...d->d...", (), (d, n, c)),
        ("ncd->nd", (), (n, d)),
    )[g.rng.integers(10)]
    constant = [g.weight(g.tensor(*w, scale=0.5))] if w else []
    return g.made(g.net.op("Einsum", x, *constant, equation=equation), [x], shape)


def product(g: Growing) -> str | bool:
    """A matrix product of two activations."""
    x = g.choose(lambda s: len(s) >= 2)
    if x is None:
        return False
    *lead, m, k = g.shapes[x]
    others = g.values(lambda s: len(s) >= 2 and s[-2] == k and list(s[:-2]) in (lead, []) and _fits((*lead, m, s[-1])) and k > 0)
    if others:
        y = others[g.rng.integers(len(others))]
        return g.add("MatMul", [x, y], (*lead, m, g.shapes[y][-1]))
    if k < 0 or m < 0 or not _fits((*lead, m, m)):
        return False
    order = [*range(len(lead)), len(lead) + 1, len(lead)]
    y = g.add("Transpose", [x], (*lead, k, m), perm=order)
    return g.add("MatMul", [x, y], (*lead, m, m))


def normalisation(g: Growing) -> str | bool:
    if g.chance(0.5):
        x = g.choose(_image)
        if x is None or math.prod(g.shapes[x][2:]) < 2:
            return False
        c = g.shapes[x][1]
        return g.made(g.net.op("InstanceNormalization", x, g.weight(g.tensor(c)), g.weight(g.tensor(c)), epsilon=0.1), [x], g.shapes[x])
    x = g.choose(lambda s: len(s) >= 2 and s[-1] > 1)
    if x is None or g.net.opset < 17:
        return False
    n = g.shapes[x][-1]
    bias = [g.weight(g.tensor(n))] if g.chance(0.7) else []
    return g.made(g.net.op("LayerNormalization", x, g.weight(g.tensor(n)), *bias, epsilon=0.1, axis=-1), [x], g.shapes[x])


def recurrent(g: Growing) -> str | bool:
    x = g.choose(lambda s: len(s) == 3 and s[2] > 0)
    if x is None or g.net.opset < 11:
        return False
    length, batch, features = g.shapes[x]
    op, gates = (("RNN", 1), ("GRU", 3), ("LSTM", 4))[g.rng.integers(3)]
    hidden, ways = g.whole(1, 3), g.whole(1, 2)
    if not _fits((length, ways, batch, hidden)):
        return False
    weights = [g.weight(g.tensor(ways, gates * hidden, n, scale=0.5)) for n in (features, hidden)]
    bias = [g.weight(g.tensor(ways, 2 * gates * hidden))] if g.chance(0.6) else []
    attrs = {"hidden_size": hidden, "direction": "bidirectional" if ways == 2 else "forward"}
    return g.made(g.net.op(op, x, *weights, *bias, **attrs), [x], (length, ways, batch, hidden))


def table(g: Growing) -> str | bool:
    """Rows of a table, looked up by an activation's signs."""
    x = g.choose(lambda s: 2 <= len(s) <= 3)
    if x is None or not _fits((*g.shapes[x], 3)):
        return False
    indices = g.net.op("Cast", g.net.op("Greater", x, g.net.scalar(0.12345)), to=7)
    return g.made(g.net.op("Gather", g.weight(g.tensor(2, 3), "table"), indices), [x], (*g.shapes[x], 3))


# --- arithmetic ----------------------------------------------------------------------------------------------------------------


def constant(g: Growing) -> str | bool:
    """Add, Sub, Mul or Div by a constant, on either side."""
    x = g.choose()
    if x is None:
        return False
    shape = g.shapes[x]
    kind = g.rng.random()
    if kind < 0.5 and len(shape) >= 2 and shape[1] > 0:
        c: Shape = tuple(n if i == 1 else 1 for i, n in enumerate(shape) if i >= g.whole(0, 1))
    elif kind < 0.7:
        c = ()
    else:
        c = tuple(n if n > 0 and g.chance(0.5) else 1 for n in shape)[g.whole(0, len(shape)) :]
    array = g.rng.uniform(0.5, 1.5, c) * g.rng.choice([-1, 1], c)
    op = str(g.pick("Add", "Sub", "Mul", "Div"))
    if op == "Mul" and array.size and g.chance(0.1):
        array.flat[0] = 0
    w = g.weight(array, "c")
    return g.made(g.net.op(op, *([w, x] if op != "Div" and g.chance(0.4) else [x, w])), [x], shape)


def _joined(a: Shape, b: Shape) -> Shape | None:
    """The shape to which two broadcast, or None."""
    rank = max(len(a), len(b))
    pairs = list(zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True))
    if any(p != q and 1 not in (p, q) for p, q in pairs):
        return None
    joined = tuple(q if p == 1 else p for p, q in pairs)
    return joined if _fits(joined) else None


def _partner(g: Growing, x: str) -> str | None:
    """Another activation that broadcasts with x; one of the same shape rather than another."""
    found = [v for v in g.values(lambda s: _joined(g.shapes[x], s) is not None) if v != x or g.chance(0.1)]
    alike = [v for v in found if g.shapes[v] == g.shapes[x]]
    some = alike if alike and g.chance(0.7) else found
    return some[g.rng.integers(len(some))] if some else None


def pair(g: Growing) -> str | bool:
    """Add, Sub, Mul or Div of two activations, or a choice between them."""
    x = g.choose()
    y = None if x is None else _partner(g, x)
    if x is None or y is None:
        return False
    shape = _joined(g.shapes[x], g.shapes[y])
    assert shape is not None
    op = str(g.pick("Add", "Add", "Sub", "Mul", "Max", "Min", "Mean", "Sum", "Where", "Div"))
    if op == "Where":
        z = x if g.chance(0.5) else y
        steer = g.net.op("Greater", z, g.net.scalar(0.12345))
        return g.add("Where", [steer, x, y], shape)
    if op == "Div":  # by what is well away from zero
        g.used.add(y)
        return g.add("Div", [x, g.net.op("Add", g.net.op("Abs", y), g.net.scalar(1.5))], shape)
    inputs = [x, y]
    if op in ("Max", "Min", "Mean", "Sum"):
        if (z := _partner(g, x)) is not None and (wider := _joined(shape, g.shapes[z])) is not None and g.chance(0.4):
            inputs, shape = [x, y, z], wider
        if g.chance(0.2):
            inputs.append(g.weight(g.tensor(*(n if n > 0 else 1 for n in shape)), "c"))
    return g.add(op, inputs, shape)


def elementwise(g: Growing, x: str | None = None) -> str | bool:
    x = x or g.choose()
    if x is None:
        return False
    op = str(g.pick("Relu", "Relu", "Relu", "LeakyRelu", "PRelu", "Clip", "Clip0", "Abs", "Neg", "Sigmoid", "Tanh", "Identity", "Dropout"))
    shape = g.shapes[x]
    if op == "LeakyRelu":
        return g.add(op, [x], shape, alpha=float(g.pick(0.1, -0.3, 1.5)))
    if op == "PRelu":
        slope = (shape[1], *(1,) * (len(shape) - 2)) if len(shape) >= 2 and shape[1] > 0 and g.chance(0.6) else (1,)
        return g.made(g.net.op(op, x, g.weight(g.tensor(*slope), "slope")), [x], shape)
    if op.startswith("Clip"):
        low, high = (0.0, None) if op == "Clip0" else (-1.0, 1.5)
        if g.net.opset < 11:
            return g.add("Clip", [x], shape, min=low, **({} if high is None else {"max": high}))
        bounds = [g.net.scalar(low)] + ([] if high is None else [g.net.scalar(high)])
        return g.made(g.net.op("Clip", x, *bounds), [x], shape)
    if op == "Dropout":
        return g.made(g.net.dropout(x), [x], shape)
    return g.add(op, [x], shape)


# --- windows and reductions ------------------------------------------------------------------------------------------------------


def pool(g: Growing) -> str | bool:
    x = g.choose(_image)
    if x is None:
        return False
    n, c, *space = g.shapes[x]
    op = str(g.pick("MaxPool", "AveragePool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool"))
    if op.startswith("Global"):
        return g.add(op, [x], (n, c, *(1 for _ in space)))
    kernel = [g.whole(1, min(3, size)) for size in space]
    stride = [g.whole(1, 2) for _ in space]
    pads = [g.whole(0, 1) if k > 1 else 0 for k in kernel]
    after = [(size + 2 * p - k) // s + 1 for size, p, k, s in zip(space, pads, kernel, stride, strict=True)]
    attrs: dict[str, object] = {"kernel_shape": kernel, "strides": stride, "pads": pads + pads}
    if op == "AveragePool":
        attrs["count_include_pad"] = g.whole(0, 1)
    return g.add(op, [x], (n, c, *after), **attrs)


def reduction(g: Growing) -> str | bool:
    x = g.choose(lambda s: len(s) >= 2)
    if x is None:
        return False
    shape = g.shapes[x]
    axes = sorted({g.axis(shape, static=False) for _ in range(g.whole(1, 2))})
    keep = g.whole(0, 1) if len(axes) < len(shape) else 1
    after = tuple(1 if i in axes else n for i, n in enumerate(shape) if keep or i not in axes)
    kind = str(g.pick("Mean", "Mean", "Sum", "Max", "Min", "L1", "L2"))
    named = [g.named(i, len(shape)) for i in axes]
    if kind == "Sum" and g.net.opset >= 13:
        return g.made(g.net.op("ReduceSum", x, g.net.ints(*named), keepdims=keep), [x], after)
    return g.made(g.net.reduce(kind, x, *named, keepdims=keep), [x], after)


def resize(g: Growing) -> str | bool:
    x = g.choose(lambda s: len(s) == 4 and s[2] > 0 and s[3] > 0)
    if x is None or g.net.opset < 11:
        return False
    n, c, h, w = g.shapes[x]
    fh, fw = g.whole(1, 2), g.whole(1, 2)
    if not _fits((n, c, h * fh, w * fw)):
        return False
    mode = str(g.pick("nearest", "linear"))
    where = "asymmetric" if mode == "nearest" else str(g.pick("half_pixel", "align_corners", "asymmetric"))
    scales = g.net.constant(np.array([1, 1, fh, fw], np.float32), "scales")
    roi = g.net.constant(np.zeros(0, np.float32), "roi") if g.net.opset < 13 else ""
    attrs = {"mode": mode, "coordinate_transformation_mode": where} | ({"nearest_mode": "floor"} if mode == "nearest" else {})
    return g.made(g.net.op("Resize", x, roi, scales, **attrs), [x], (n, c, h * fh, w * fw))
