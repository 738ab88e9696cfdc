"""Linear after linear: which two operators are one, and what its weight is. With strides s, dilations d and zeros p in front,

    z[i] = sum_k W1[k] x[s1*i + d1*k - p1]      y[n] = sum_j W2[j] z[s2*n + d2*j - p2]
    y[n] = sum_jk W2[j] W1[k] x[s1*s2*n + (s1*d2*j + d1*k) - (s1*p2 + p1)]

which is a convolution of stride s1*s2, whose taps lie at s1*d2*j + d1*k, and whose outputs are as many, since floors of quotients nest.
What the second one pads with zeros the first must make of its own zeros alone (and without a bias, see `absorbing.conv_down`). The groups
of both part the channels between; the parts that they have in common are gcd(G1, G2) blocks.

So is an average over windows behind a convolution, whose taps are all one over their number.

An operator that only mixes the channels at each place goes into any other one beside it, whatever that does with places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .affine import Array, Blocked
from .graph import Node, Param, Window
from .layouts import AS_STORED, Layout, Shape, swapped
from .products import Total, exact, totalled

Product = Callable[[Array, Array], Iterator[Array]]


@dataclass(frozen=True, eq=False)
class Composition:
    """Two linear operators as one. host: the one that stays, with a weight of this canonical shape, and as many groups, from now on.

    axis: of its output, along which the channels lie; window: its own from now on, where that changes. made: the weight, out of products of
    matrices.
    """

    first: Node
    second: Node
    host: Node
    shape: Shape
    groups: int
    window: Window | None
    axis: int
    made: Callable[[Product], Array]

    @property
    def read(self) -> int:
        """How many channels the first operator reads, where it only mixes them."""
        return _channels(self.first, self.first.params["weight"])[1]

    @property
    def channels(self) -> int:
        """How many the host gives."""
        return self.shape[0] if self.host.op == "Conv" else self.shape[self.host.attrs["w"].index(self.host.attrs["y"][self.axis])]

    def weight(self) -> Array:
        """In float64, of sums that are formed in nearly twice its precision."""
        with np.errstate(all="ignore"):  # what is no number is refused where it is written
            return self.made(exact)

    def magnitudes(self) -> Array:
        """For each number the sum of the magnitudes of its summands."""
        with np.errstate(all="ignore"):
            return self.made(lambda a, b: iter((np.abs(a) @ np.abs(b),)))

    def layout(self) -> Layout:
        """From the canonical layout, in which the weight is made, to that in which it is stored."""
        own = self.host.params["weight"].layout
        own = own.whole or own
        if self.host.attrs.get("transposed"):
            out, fan_in, *kernel = self.shape
            own = swapped((fan_in * self.groups, out // self.groups, *kernel), self.groups)[1]
        return Layout(f"{own.name}, of a product", lambda w: w, own.stored, own.linear, own.gain)


def composition(
    first: Node, second: Node, weights: Sequence[Param], *, onto_first: bool = False, carriers: Sequence[Node] = ()
) -> Composition:
    """What two linear operators are, of which the second reads the first alone. Raises `Blocked` where they aren't one.

    weights: theirs; an average over windows has none. onto_first: whether the first had better be the host, where either can. carriers:
    what stands between; each does the same to all channels, so that it may as well stand before an operator that only mixes them.
    """
    for node, param in zip((first, second), weights, strict=False):
        if param.tensor is None or param.tensor.quantised is not None or param.tensor.integers:
            raise Blocked(f"the weight of {node.name} is quantised")
    windows = first.attrs.get("window"), second.attrs.get("window")
    mixed, mixes = mixed_axis(first), None if carriers or second.op == "Average" else mixed_axis(second)
    for node in carriers:
        if mixed is None or (mixed := carried(node, mixed)) is None:
            raise Blocked(f"{node.label} {node.name} stands between")
    if second.op == "Average" and isinstance(windows[0], Window) and isinstance(windows[1], Window):
        found = _averaged(first, second, weights[0], windows[0], windows[1])
    elif not carriers and isinstance(windows[0], Window) and isinstance(windows[1], Window):
        found = _convolutions(first, second, weights, windows[0], windows[1])
    elif mixed is not None and _reads(second, mixed) and not (onto_first and mixes is not None and _makes(first, mixes)):
        found = _mixed_before(first, second, weights, mixed)
    elif mixes is not None and _makes(first, mixes):
        found = _mixed_behind(first, second, weights, mixes)
    else:
        raise Blocked("neither of them only mixes channels, and it isn't known for all sizes what both see")
    host, own = found.host, found.host.params["weight"]
    plain = host.op == "Contraction" or host.attrs["transposed"] or own.remade or own.layout is AS_STORED
    if own.tensor is None or len(own.tensor.shape) != len(own.shape) or not plain:
        raise Blocked(f"the weight of {host.name} is laid out in another way")
    return found


def _groups(node: Node) -> int:
    return int(node.attrs.get("groups", 1))


def mixed_axis(node: Node) -> int | None:
    """The axis along which an operator mixes what stands at each place, if that is all that it does."""
    if node.op == "Contraction":
        x, w, y = (node.attrs[key] for key in "xwy")
        apart = [axis for axis, names in enumerate(zip(x, y, strict=False)) if names[0] != names[1]]
        alone = len(x) == len(y) and len(apart) == 1 and {x[apart[0]], y[apart[0]]} == set(w)
        return apart[0] if alone else None
    window, ones = node.attrs.get("window"), {*node.params["weight"].shape[2:]} == {1}
    still = isinstance(window, Window) and {*window.stride} == {1} and not any((*window.before, *window.after))
    return 1 if ones and len(node.inputs) == 1 and (still or (node.attrs["transposed"] and node.attrs["uniform"])) else None


def carried(node: Node, axis: int) -> int | None:
    """Where an axis lies behind an operator that does the same at all places along it; None where it does something else."""
    if node.op == "Average":
        mixes = node.attrs["mixes"]
        return None if axis in mixes else axis - (sum(i < axis for i in mixes) if node.attrs.get("drops") else 0)
    if node.op == "Move":
        found: int | None = node.attrs["kept"].get(axis)
        return found
    return axis


def _reads(node: Node, axis: int) -> bool:
    """Whether an operator sums over an axis of its input."""
    x = node.attrs.get("x", "")
    return axis == 1 if node.op == "Conv" else axis < len(x) and x[axis] in node.attrs["w"] and x[axis] not in node.attrs["y"]


def _makes(node: Node, axis: int) -> bool:
    """Whether an axis of its output comes from an operator's weight alone."""
    y = node.attrs.get("y", "")
    return axis == 1 if node.op == "Conv" else axis < len(y) and y[axis] in node.attrs["w"] and y[axis] not in node.attrs["x"]


# --- shapes -----------------------------------------------------------------------------------------------------------------------------


def _averaged(first: Node, second: Node, weight: Param, one: Window, other: Window) -> Composition:
    """A convolution, and an average over windows behind it, which does the same to each channel."""
    kernel = second.attrs["kernel"]
    window, taps, seen = _row(first, second, (weight.shape[2:], kernel), one, other)
    shape = (*weight.shape[:2], *taps)

    def made(product: Product) -> Array:
        own, total = weight.read(), Total(shape)
        for each in product(np.full((1, 1), 1 / math.prod(kernel)), own.reshape(1, -1)):
            for tap in np.ndindex(kernel):
                total.add(each.reshape(own.shape), (slice(None), slice(None), *seen(tap)))
        return total.sum()

    return Composition(first, second, first, shape, _groups(first), window, 1, made)


def _row(
    first: Node, second: Node, kernels: tuple[Shape, Shape], one: Window, other: Window
) -> tuple[Window, Shape, Callable[[tuple[int, ...]], tuple[slice, ...]]]:
    """How two windows in a row slide as one, over how many taps, and which of these the first's are, for a tap of the second."""
    steps, taps = [], []
    for i, (k, j) in enumerate(zip(*kernels, strict=True)):
        reach = one.dilation[i] * (k - 1)
        if (other.before[i] > 0 and one.stride[i] + one.before[i] <= reach) or (other.after[i] > 0 and one.after[i] < reach):
            raise Blocked(f"{second.name} pads with zeros where {first.name} would still see data")
        apart = one.stride[i] * other.dilation[i]
        steps.append(math.gcd(apart * (j > 1), one.dilation[i] * (k > 1)) or 1)
        taps.append((apart * (j - 1) + reach) // steps[i] + 1)
    before, after = (
        tuple(s * outer + inner for s, outer, inner in zip(one.stride, getattr(other, side), getattr(one, side), strict=True))
        for side in ("before", "after")
    )
    stride = tuple(s * t for s, t in zip(one.stride, other.stride, strict=True))
    far = [one.stride[i] * other.dilation[i] // steps[i] * (n > 1) for i, n in enumerate(kernels[1])]
    near = [one.dilation[i] // steps[i] if n > 1 else 1 for i, n in enumerate(kernels[0])]

    def seen(tap: tuple[int, ...]) -> tuple[slice, ...]:
        starts = [j * step for j, step in zip(tap, far, strict=True)]
        return tuple(slice(s, s + (k - 1) * n + 1, n) for s, k, n in zip(starts, kernels[0], near, strict=True))

    return Window(stride, tuple(steps), before, after), tuple(taps), seen


def _convolutions(first: Node, second: Node, weights: Sequence[Param], one: Window, other: Window) -> Composition:
    window, taps, seen = _row(first, second, (weights[0].shape[2:], weights[1].shape[2:]), one, other)
    if second.attrs.get("even") and window.before != window.after:
        raise Blocked("it would have to pad unevenly")
    return _by_channels(first, second, second, weights, window, taps, seen)


def _mixed_before(first: Node, second: Node, weights: Sequence[Param], axis: int) -> Composition:
    if second.op == "Conv":
        return _by_channels(first, second, second, weights, None, weights[1].shape[2:], lambda tap: tuple(slice(j, j + 1) for j in tap))
    letter = second.attrs["w"].index(second.attrs["x"][axis])
    size = _channels(first, weights[0])[1]
    shape = tuple(size if i == letter else n for i, n in enumerate(weights[1].shape))

    def made(product: Product) -> Array:
        rows = np.moveaxis(weights[1].read(), letter, -1)
        return np.moveaxis(totalled(product(rows, _matrix(first, weights[0])), (*rows.shape[:-1], size)), -1, letter)

    return Composition(first, second, second, shape, 1, None, axis, made)


def _mixed_behind(first: Node, second: Node, weights: Sequence[Param], axis: int) -> Composition:
    if first.op == "Conv":
        kernel = weights[0].shape[2:]
        return _by_channels(first, second, first, weights, None, kernel, lambda tap: (slice(None),) * len(kernel))
    letter = first.attrs["w"].index(first.attrs["y"][axis])
    size = _channels(second, weights[1])[0]
    shape = tuple(size if i == letter else n for i, n in enumerate(weights[0].shape))

    def made(product: Product) -> Array:
        rows = np.moveaxis(weights[0].read(), letter, -1)
        return np.moveaxis(totalled(product(rows, _matrix(second, weights[1]).T), (*rows.shape[:-1], size)), -1, letter)

    return Composition(first, second, first, shape, 1, None, axis, made)


def _channels(node: Node, weight: Param) -> tuple[int, int]:
    """How many channels an operator that mixes them makes, and of how many."""
    if node.op == "Conv":
        return weight.shape[0], weight.shape[1] * _groups(node)
    made, read = (next(name for name in node.attrs["w"] if name in node.attrs[side]) for side in "yx")
    return weight.shape[node.attrs["w"].index(made)], weight.shape[node.attrs["w"].index(read)]


# --- numbers ----------------------------------------------------------------------------------------------------------------------------


def _matrix(node: Node, weight: Param) -> Array:
    """[made, read], of an operator that mixes channels."""
    if node.op == "Conv":
        return _blocks(weight.read(), _groups(node), 1).reshape(_channels(node, weight))
    return weight.read() if node.attrs["w"][0] in node.attrs["y"] else weight.read().T


def _by_channels(
    first: Node,
    second: Node,
    host: Node,
    weights: Sequence[Param],
    window: Window | None,
    kernel: Shape,
    seen: Callable[[tuple[int, ...]], tuple[slice, ...]],
) -> Composition:
    """Both as operators on channels in groups. kernel: of both; seen: which of its taps the first one's are, for a tap of the second."""
    one, other = _groups(first), _groups(second)
    groups = math.gcd(one, other)
    (between, fan_in), (out, read) = (_channels(node, weight) for node, weight in zip((first, second), weights, strict=True))
    if between != read:
        raise Blocked("their channels differ in number")
    shape = (out, fan_in // groups, *kernel)

    def view(node: Node, weight: Param, own: int) -> Array:
        """[groups, made, read, *kernel]. own: its groups, which may be others when somebody asks."""
        if node.op == "Conv":
            return _blocks(weight.read(), own, groups)
        return _matrix(node, weight).reshape(1, *_channels(node, weight), *(1,) * len(kernel))

    def made(product: Product) -> Array:
        inner, outer = view(first, weights[0], one), view(second, weights[1], other)
        total, columns = Total((groups, out // groups, *shape[1:])), inner.reshape(*inner.shape[:2], -1)
        for tap in np.ndindex(outer.shape[3:]):
            for each in product(outer[(slice(None),) * 3 + tap], columns):
                total.add(each.reshape(*each.shape[:2], *inner.shape[2:]), (slice(None),) * 3 + seen(tap))
        return total.sum().reshape(shape)

    return Composition(first, second, host, shape, groups, window, 1, made)


def _blocks(weight: Array, groups: int, fewer: int) -> Array:
    """[out, in/groups, *kernel] as [fewer, out/fewer, in/fewer, *kernel], with zeros between groups that are one of the fewer."""
    each, (out, fan_in, *kernel) = groups // fewer, weight.shape
    found = np.zeros((fewer, each, out // groups, each, fan_in, *kernel))
    for i in range(each):
        found[:, i, :, i] = weight.reshape(fewer, each, out // groups, fan_in, *kernel)[:, i]
    return found.reshape(fewer, out // fewer, each * fan_in, *kernel)
