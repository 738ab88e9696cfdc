"""The operators of random graphs that only move data, and the blocks that they are part of (see `operators`)."""

from __future__ import annotations

import math

import numpy as np
from cases.builder import element

from .operators import Growing, Shape, _fits, _image, batchnorm, convolution, elementwise, gemm


def transpose(g: Growing) -> str | bool:
    x = g.choose(lambda s: len(s) >= 2)
    if x is None:
        return False
    shape = g.shapes[x]
    order = [int(i) for i in g.rng.permutation(len(shape))]
    return g.add("Transpose", [x], tuple(shape[i] for i in order), perm=order)


def reshape(g: Growing) -> str | bool:
    """Merge neighbouring axes, then cut others: channels may mix with space, and the batch with both."""
    x = g.choose()
    if x is None:
        return False
    return _reshaped(g, x, _regrouped(g, g.shapes[x]))


def _regrouped(g: Growing, shape: Shape) -> Shape:
    dims = list(shape)
    for _ in range(g.whole(1, 3)):
        if len(dims) > 1 and g.chance(0.5):
            i = g.whole(0, len(dims) - 2)
            dims[i : i + 2] = [dims[i] * dims[i + 1]]
        else:
            i = g.whole(0, len(dims) - 1)
            divisors = [d for d in range(1, abs(dims[i]) + 1) if abs(dims[i]) % d == 0]
            d = divisors[g.rng.integers(len(divisors))]
            dims[i : i + 1] = [dims[i] // d, d] if dims[i] < 0 or g.chance(0.5) else [d, dims[i] // d]
    return tuple(dims)


def _reshaped(g: Growing, x: str, after: Shape) -> str | bool:
    if not _fits(after) or not after:
        return False
    before = g.shapes[x]
    target = [-1 if n < 0 else 0 if i < len(before) and before[i] == n and g.chance(0.5) else n for i, n in enumerate(after)]
    if -1 not in target and g.chance(0.3):
        target[g.rng.integers(len(target))] = -1
    if g.chance(0.3):
        return g.made(g.net.op("Reshape", x, _worked_out(g, x, target)), [x], after)
    return g.made(g.net.reshape(x, *target), [x], after)


def _worked_out(g: Growing, x: str, target: list[int]) -> str:
    """A Reshape's target as exporters write it: each size made of one that the tensor has."""
    shape, sizes, parts = g.shapes[x], g.net.op("Shape", x), []
    for i, n in enumerate(target):
        j = int(g.rng.integers(len(shape)))
        own = g.net.op("Gather", sizes, g.net.constant(np.array(j, np.int64)), axis=0)
        if n == 0 and i < len(shape) and g.chance(0.5):
            part = g.net.op("Gather", sizes, g.net.constant(np.array(i, np.int64)), axis=0)
        elif n > 0 and shape[j] > 0:
            part = g.net.op(
                "Div", g.net.op("Mul", own, g.net.constant(np.array(n, np.int64))), g.net.constant(np.array(shape[j], np.int64))
            )
        else:
            part = g.net.constant(np.array(n, np.int64))
        parts.append(g.net.unsqueeze(part, 0))
    return g.net.op("Concat", *parts, axis=0)


def flatten(g: Growing) -> str | bool:
    x = g.choose(lambda s: len(s) >= 2)
    if x is None:
        return False
    shape = g.shapes[x]
    axis = int(g.pick(1, 1, 0, 2))
    return g.add("Flatten", [x], (math.prod(shape[:axis]), math.prod(shape[axis:])), axis=axis)


def squeeze(g: Growing) -> str | bool:
    x = g.choose(lambda s: 1 in s[1:] and len(s) > 2)
    if x is None:
        return False
    shape = g.shapes[x]
    ones = [i for i, n in enumerate(shape) if n == 1]
    gone = sorted({int(ones[g.rng.integers(len(ones))]) for _ in range(2)})
    after = tuple(n for i, n in enumerate(shape) if i not in gone)
    return g.made(g.net.squeeze(x, *(g.named(i, len(shape)) for i in gone)), [x], after)


def unsqueeze(g: Growing) -> str | bool:
    x = g.choose(lambda s: len(s) <= 3)
    if x is None:
        return False
    shape = g.shapes[x]
    axes = sorted({g.whole(0, len(shape)) for _ in range(g.whole(1, 2))})
    rest = iter(shape)
    after = tuple(1 if i in axes else next(rest) for i in range(len(shape) + len(axes)))
    return g.made(g.net.unsqueeze(x, *axes), [x], after)


def grow(g: Growing) -> str | bool:
    """Expand or Tile."""
    x = g.choose(lambda s: len(s) >= 2)
    if x is None:
        return False
    shape = g.shapes[x]
    if g.chance(0.5):
        times = [g.whole(1, 3) if n > 0 and g.chance(0.5) else 1 for n in shape]
        after = tuple(n * t for n, t in zip(shape, times, strict=True))
        return _fits(after) and g.made(g.net.op("Tile", x, g.net.ints(*times)), [x], after)
    after = tuple(g.whole(1, 4) if n == 1 else n for n in shape)
    lead = g.whole(1, 3) if g.chance(0.2) else None
    target = [n if n > 1 and before == 1 else 1 for n, before in zip(after, shape, strict=True)]
    if lead is not None:
        after, target = (lead, *after), [lead, *target]
    return _fits(after) and g.made(g.net.op("Expand", x, g.net.ints(*target)), [x], after)


def concat(g: Growing) -> str | bool:
    x = g.choose(lambda s: len(s) >= 2)
    if x is None:
        return False
    shape = g.shapes[x]
    axis = 1 if shape[1] > 0 and g.chance(0.7) else g.axis(shape) if any(n > 0 for n in shape) else None
    if axis is None:
        return False
    rest = shape[:axis] + shape[axis + 1 :]
    found = g.values(lambda s: len(s) == len(shape) and s[:axis] + s[axis + 1 :] == rest and s[axis] > 0)
    parts = [x] + [found[g.rng.integers(len(found))] for _ in range(g.whole(1, 2))]
    sizes = [g.shapes[v][axis] for v in parts]
    if g.chance(0.15) and all(n > 0 for n in shape):
        n = g.whole(1, 3)
        parts.insert(g.whole(0, len(parts)), g.weight(g.tensor(*(n if i == axis else m for i, m in enumerate(shape))), "c"))
        sizes.append(n)
    after = tuple(sum(sizes) if i == axis else n for i, n in enumerate(shape))
    if _fits(after) and g.net.opset >= 11 and g.chance(0.2):
        return g.made(_joined(g, parts, g.named(axis, len(shape))), parts, after)
    return _fits(after) and g.add("Concat", parts, after, axis=g.named(axis, len(shape)))


def _joined(g: Growing, parts: list[str], axis: int) -> str:
    """A sequence of the parts, joined again: made at once, or grown from nothing in any order."""
    if g.chance(0.6):
        return g.net.op("ConcatFromSequence", g.net.op("SequenceConstruct", *parts), axis=axis)
    made = g.net.op("SequenceEmpty", dtype=element(g.net.dtype))
    order = [int(i) for i in g.rng.permutation(len(parts))]
    for n, i in enumerate(order):
        place = sum(j < i for j in order[:n])
        made = g.net.op("SequenceInsert", made, parts[i], *[g.place(place)] * (place < n))
    if g.chance(0.3):
        made = g.net.op("Identity", made) if g.net.opset >= 14 else made
        made = g.net.op("SequenceErase", g.net.op("SequenceInsert", made, parts[0], g.place(0)), g.place(0))
    return g.net.op("ConcatFromSequence", made, axis=axis)


def split(g: Growing) -> str | bool:
    x = g.choose(lambda s: any(n > 1 for n in s))
    if x is None:
        return False
    shape = g.shapes[x]
    axes = [i for i, n in enumerate(shape) if n > 1]
    axis = 1 if 1 in axes and g.chance(0.6) else axes[g.rng.integers(len(axes))]
    cut = g.whole(1, shape[axis] - 1)
    parts = [cut, shape[axis] - cut]
    if g.net.opset >= 11 and g.chance(0.25):
        even = g.chance(0.3)  # the last of them may be shorter
        parts = [min(cut, shape[axis] - i) for i in range(0, shape[axis], cut)] if even else parts
        sizes = g.net.constant(np.array(cut if even else parts, np.int64))
        made = g.net.op("SplitToSequence", x, sizes, axis=g.named(axis, len(shape)))
        known = not even or all(n > 0 for n in shape)
        names = [g.net.op("SequenceAt", made, g.place(i - len(parts) * (known and g.chance(0.4)))) for i in range(len(parts))]
    else:
        names = g.net.split(x, axis, *parts)
    for name, n in zip(names, parts, strict=True):
        g.made(name, [x], (*shape[:axis], n, *shape[axis + 1 :]))
    return True


def cut(g: Growing) -> str | bool:
    x = g.choose(lambda s: any(n > 1 for n in s))
    if x is None:
        return False
    shape = g.shapes[x]
    axes = [i for i, n in enumerate(shape) if n > 1]
    axis = axes[g.rng.integers(len(axes))]
    n = shape[axis]
    step = int(g.pick(1, 1, 2, -1)) if g.net.opset >= 10 else 1
    start, end = sorted(int(i) for i in g.rng.choice(n + 1, 2, replace=False))
    if step < 0:
        start, end = (n - 1, -(2**31)) if g.chance(0.5) else (end - 1, start - 1 if start else -(2**31))
    size = len(range(n)[slice(start, None if end == -(2**31) else end, step)])
    return g.made(g.net.slice(x, axis, start, end, step), [x], (*shape[:axis], size, *shape[axis + 1 :]))


def gather(g: Growing) -> str | bool:
    x = g.choose(lambda s: len(s) >= 2 and any(n > 0 for n in s))
    if x is None:
        return False
    shape = g.shapes[x]
    axis = 1 if shape[1] > 0 and g.chance(0.6) else g.axis(shape)
    if g.net.opset >= 11 and shape[axis] > 1 and g.chance(0.15):
        mask = g.rng.permutation(shape[axis]) <= g.whole(0, shape[axis] - 1)
        after = (*shape[:axis], int(mask.sum()), *shape[axis + 1 :])
        return g.made(g.net.op("Compress", x, g.net.constant(mask, "mask"), axis=g.named(axis, len(shape))), [x], after)
    indices = g.rng.integers(0, shape[axis], tuple(g.whole(1, 3) for _ in range(int(g.pick(0, 1, 1, 2)))))
    after = (*shape[:axis], *indices.shape, *shape[axis + 1 :])
    if g.chance(0.3) and indices.ndim == 1:
        indices, after = g.rng.permutation(shape[axis]), shape
    return _fits(after) and g.made(g.net.op("Gather", x, g.net.constant(np.asarray(indices, np.int64), "i"), axis=axis), [x], after)


def pad(g: Growing) -> str | bool:
    x = g.choose(lambda s: len(s) >= 2)
    if x is None:
        return False
    shape = g.shapes[x]
    mode = str(g.pick("constant", "constant", "reflect", "edge"))
    space = range(2, len(shape)) if len(shape) > 2 and g.chance(0.8) else range(len(shape))
    if g.net.opset >= 18 and g.chance(0.15) and (axes := [i for i in space if shape[i] > 0]):
        sizes = [max(1, shape[i] + g.whole(-1, 1)) for i in axes]
        around = tuple(sizes[axes.index(i)] if i in axes else n for i, n in enumerate(shape))
        return _fits(around) and g.made(g.net.op("CenterCropPad", x, g.net.ints(*sizes), axes=axes), [x], around)
    low, high = ([g.whole(0, 1) if i in space and n > 1 else 0 for i, n in enumerate(shape)] for _ in "lh")
    if mode == "constant" and g.chance(0.15):
        high = [-1 if i in space and n > 2 else 0 for i, n in enumerate(shape)]
    after = tuple(n + a + b if n > 0 else n for n, a, b in zip(shape, low, high, strict=True))
    value = float(g.pick(0.0, 0.0, 0.7)) if mode == "constant" else 0.0
    return _fits(after) and g.made(g.net.pad(x, *low, *high, mode=mode, value=value), [x], after)


def space_and_depth(g: Growing) -> str | bool:
    x = g.choose(lambda s: len(s) == 4 and all(n > 0 for n in s[1:]))
    if x is None:
        return False
    n, c, h, w = g.shapes[x]
    if c % 4 == 0:
        mode = {"mode": str(g.pick("DCR", "CRD"))} if g.net.opset >= 11 else {}
        return g.add("DepthToSpace", [x], (n, c // 4, 2 * h, 2 * w), blocksize=2, **mode)
    if h % 2 == 0 and w % 2 == 0:
        return g.add("SpaceToDepth", [x], (n, 4 * c, h // 2, w // 2), blocksize=2)
    return False


# --- blocks --------------------------------------------------------------------------------------------------------------------


def conv_bn_relu(g: Growing) -> str | bool:
    y = convolution(g)
    return bool(y) and elementwise(g, str(batchnorm(g, str(y))))


def residual(g: Growing) -> str | bool:
    """x + bn(conv(x)), where the shortcut may have a BatchNorm too."""
    x = g.choose(_image)
    y = x is not None and convolution(g, x, cout=g.shapes[x][1], keep=True)
    if not y or x is None or g.shapes[str(y)] != g.shapes[x]:
        return False
    short = str(batchnorm(g, x)) if g.chance(0.4) else x
    return g.add(str(g.pick("Add", "Add", "Sub")), [str(batchnorm(g, str(y))), short], g.shapes[x])


def parallel(g: Growing) -> str | bool:
    """Parallel linear branches that read one value and are added up: the training form of RepVGG."""
    x = g.choose(_image)
    if x is None:
        return False
    total = None
    cout = g.shapes[x][1]
    for _ in range(g.whole(2, 3)):
        y = convolution(g, x, cout=cout, keep=True, plain=g.chance(0.7)) if g.chance(0.75) else x
        if not y or g.shapes[str(y)] != g.shapes[x]:
            return False
        y = batchnorm(g, str(y)) if g.chance(0.8) else y
        total = str(y) if total is None else g.add(str(g.pick("Add", "Add", "Add", "Sub")), [total, str(y)], g.shapes[x])
    return True


def gate(g: Growing) -> str | bool:
    """Squeeze and excitation: channels scaled by what their means say."""
    x = g.choose(_image)
    if x is None:
        return False
    n, c, *space = g.shapes[x]
    mean = g.add("GlobalAveragePool", [x], (n, c, *(1 for _ in space)))
    w = g.weight(g.tensor(c, c, *(1 for _ in space), scale=c**-0.5), "filters")
    inner = g.made(g.net.op("Conv", mean, w), [mean], g.shapes[mean])
    if g.chance(0.5):
        inner = str(batchnorm(g, inner))
    return g.add("Mul", [x, g.add("Sigmoid", [inner], g.shapes[inner])], g.shapes[x])


def shuffle(g: Growing) -> str | bool:
    """ShuffleNet's channel shuffle."""
    x = g.choose(lambda s: _image(s) and len(s) == 4 and s[1] % 2 == 0)
    if x is None:
        return False
    n, c, h, w = g.shapes[x]
    y = _reshaped(g, x, (n, 2, c // 2, h, w))
    z = y and g.add("Transpose", [str(y)], (n, c // 2, 2, h, w), perm=[0, 2, 1, 3, 4])
    return bool(z) and _reshaped(g, str(z), (n, c, h, w))


def twice(g: Growing) -> str | bool:
    """Siamese branches: one convolution's weights, and perhaps one BatchNorm's, on two values."""
    x = g.choose(_image)
    if x is None:
        return False
    others = g.values(lambda s: s == g.shapes[x])
    y = others[g.rng.integers(len(others))]
    c, dims = g.shapes[x][1], len(g.shapes[x]) - 2
    w = g.weight(g.tensor(c, c, *(1,) * dims, scale=c**-0.5), "filters")
    bias = [g.weight(g.tensor(c), "bias")] if g.chance(0.5) else []
    for v in (x, y):
        batchnorm(g, g.made(g.net.op("Conv", v, w, *bias), [v], g.shapes[x]))
    return True


def rows(g: Growing) -> str | bool:
    """A product that sums over the batch, so that the channels of the BatchNorm before it become rows."""
    x = g.choose(lambda s: len(s) == 2 and s[0] > 0 and s[1] > 0)
    if x is None:
        return False
    n, c = g.shapes[x]
    out = g.whole(1, 5)
    bias = g.weight(g.tensor(out), "bias")
    y = g.made(g.net.op("Gemm", y := str(batchnorm(g, x)), g.weight(g.tensor(n, out, scale=n**-0.5)), bias, transA=1), [y], (c, out))
    z = _reshaped(g, y, (1, c * out)) if g.chance(0.5) else g.add("Transpose", [y], (out, c), perm=[1, 0])
    return bool(z) and gemm(g)
