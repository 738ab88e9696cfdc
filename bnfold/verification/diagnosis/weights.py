"""The weight and the bias of an operator, in normal form or before anything was folded in, and how two models' differ.

They may be the right coefficients in another order: channels, groups or axes exchanged, before the fold or after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Node, Norm

from ..roundoff import DOUBLE, LIMIT, in_units, precision, weight_axis
from ..structure import has

SLACK = 2 * LIMIT  # units of roundoff within which a hypothesis explains what is stored
SHOWN = 4  # channels, in a sentence


@dataclass(frozen=True)
class Weights:
    """axis: along which the weight's output channels lie; bias: one for each of them, or none; unit: roundoff of the stored type."""

    weight: Array
    bias: Array
    axis: int
    unit: float = DOUBLE

    @property
    def channels(self) -> int:
        return int(self.weight.shape[self.axis])

    def scaled(self, ratio: Array) -> Array:
        """The weight with each output channel times a factor."""
        return self.weight * along(ratio, self.axis, self.weight.ndim)

    def misfit(self, weight: Array, bias: Array, summands: Array) -> tuple[float, float]:
        """How far others are from these in units of roundoff, at most and in root mean square. summands: what the bias's amount to."""
        if weight.shape != self.weight.shape or bias.shape != self.bias.shape:
            return np.inf, np.inf
        tiny = float(np.finfo(np.float32).tiny)
        sizes = np.maximum(np.abs(weight), np.abs(self.weight)), np.abs(bias) + summands
        off = [
            in_units(mine, theirs, np.maximum(size, tiny), self.unit, tiny * self.unit)
            for mine, theirs, size in zip((weight, bias), (self.weight, self.bias), sizes, strict=True)
        ]
        return max(float(each.max(initial=0.0)) for each in off), max(
            (float(np.sqrt(np.square(each).mean())) for each in off if each.size), default=0.0
        )

    def is_explained(self, weight: Array, bias: Array, summands: Array) -> bool:
        """Whether others are the same to rounding."""
        return self.misfit(weight, bias, summands)[0] <= SLACK


def planned(node: Node) -> Weights | None:
    """An operator's in normal form; None where it has none that a BatchNorm could go into."""
    if "norm" in node.attrs or (node.op == "Affine" and node.params):
        own = coefficients(node)
        scale, shift = np.broadcast_arrays(own.scale, own.shift)
        return Weights(scale.ravel(), shift.ravel(), 0)
    if "weight" not in node.params or node.op not in ("Conv", "Contraction"):
        return None
    add = node.output.users[0][0] if len(node.output.users) == 1 else None
    bias = np.zeros(1)
    if has(node, "bias"):
        bias = node.params["bias"].read()
    elif add is not None and add.op == "Affine" and add.params.keys() == {"beta"}:
        bias = coefficients(add).shift
    return _weights(node, node.params["weight"].read(), bias)


def unfolded(node: Node) -> Weights | None:
    """The same before anything was folded in."""
    weight, bias = node.params.get("weight"), node.params.get("bias")
    if weight is None or weight.tensor is None or node.op not in ("Conv", "Contraction"):
        return None
    return _weights(node, weight.original(), np.zeros(1) if bias is None or bias.tensor is None else bias.original())


def _weights(node: Node, weight: Array, bias: Array) -> Weights:
    axis = weight_axis(node)
    size = weight.shape[axis]
    return Weights(weight, np.broadcast_to(bias.ravel(), size) if bias.size in (1, size) else np.zeros(size), axis)


Both = tuple[Weights, Weights]  # the reference's and the candidate's


def both_planned(reference: Node, candidate: Node) -> Both | None:
    """Those of two operators, the candidate's with their roundoff; None where their shapes differ, or one has none."""
    want, have = planned(reference), planned(candidate)
    if want is None or have is None or want.weight.shape != have.weight.shape:
        return None
    return want, replace(have, unit=unit_of(reference, candidate))


def unit_of(*nodes: Node) -> float:
    """Unit roundoff of the coarsest type in which their coefficients are stored."""
    limits = [param.tensor.limit for node in nodes for param in node.params.values() if param.tensor is not None]
    return max((precision(limit)[0] for limit in limits), default=2.0**-24)


# --- how they differ ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coefficient:
    """One number of two models. what: its role; position: in the array of all of that role."""

    what: str = ""
    channel: int | None = None
    position: tuple[int, ...] = ()
    expected: float | None = None
    found: float | None = None


def worst_coefficient(want: Weights, have: Weights, roles: tuple[str, str]) -> Coefficient:
    """The one that is off by most, relatively. roles: what the weight and the bias are called."""
    most, worst = -1.0, Coefficient()
    for role, mine, theirs, axis in zip(roles, (want.weight, want.bias), (have.weight, have.bias), (want.axis, 0), strict=True):
        off = in_units(mine, theirs, np.maximum(np.abs(mine), np.abs(mine).mean() if mine.size else 1.0), 1.0, 0.0)
        if off.size and off.max() > most:
            at = tuple(int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
            most, worst = float(off.max()), Coefficient(role, at[axis], at, float(mine[at]), float(theirs[at]))
    return worst


def channels_off(want: Weights, have: Weights) -> str:
    """Those that differ, in words."""
    others = tuple(i for i in range(want.weight.ndim) if i != want.axis)
    weight = in_units(want.weight, have.weight, np.abs(want.weight), have.unit, 0.0).max(axis=others, initial=0.0)
    bias = in_units(want.bias, have.bias, np.maximum(np.abs(want.bias), np.abs(want.bias).mean()), have.unit, 0.0)
    parts = []
    for what, off in (("weight", weight), ("bias", bias)):
        channels = np.flatnonzero(off > SLACK)
        if len(channels):
            parts.append(f"its {what} is off in {in_channels(channels, np.size(off))}")
    return ", ".join(parts) or "its coefficients are right"


def in_channels(off: npt.NDArray[np.intp], of: int) -> str:
    """Which channels, of how many."""
    shown = ", ".join(map(str, off[:SHOWN])) + (" and others" if len(off) > SHOWN else "")
    return f"channel{'s' * (len(off) > 1)} {shown} ({len(off)} of {of})"


# --- the arithmetic of a fold, channel by channel ---------------------------------------------------------------------------------------


def inner_axis(of: Weights, size: int) -> int | None:
    """The axis of a weight along which so many input channels lie; None where there is none."""
    return next((i for i in range(min(of.weight.ndim, 2)) if i != of.axis and of.weight.shape[i] == size), None)


def along(vector: Array, axis: int, rank: int) -> Array:
    """A vector laid along one axis."""
    return np.reshape(vector, [-1 if i == axis else 1 for i in range(rank)])


def scale_and_shift(norm: Norm, gain: Array | None = None) -> tuple[Array, Array]:
    """What a BatchNorm multiplies by and adds. gain: in the place of 1/sqrt(var + epsilon)."""
    with np.errstate(all="ignore"):
        scale = norm.gamma * (1 / np.sqrt(norm.var + norm.epsilon) if gain is None else gain)
        return scale, norm.beta - norm.mean * scale


def factors(want: Array, have: Array, axis: int) -> tuple[Array, Array]:
    """By what each channel of a weight was multiplied, as least squares say, and which channels tell: those that aren't all zeros."""
    others = tuple(i for i in range(want.ndim) if i != axis)
    power = np.square(want).sum(axis=others)
    with np.errstate(all="ignore"):
        return (want * have).sum(axis=others) / power, power > 0


MOST = 4096  # channels among which another order is looked for

Order = npt.NDArray[Any]  # for each place, whose coefficients lie there


def orders(want: Weights, have: Weights, groups: int, sites: list[Node]) -> Iterator[str]:
    """Those that give what the candidate holds. sites: the BatchNorms that were folded in."""
    still = np.abs(want.bias) + max((float(np.abs(n.attrs["norm"].mean).max(initial=0.0)) for n in sites), default=0.0)
    scales = [(np.ones(want.channels), ""), *_scale_behind(want, sites)]
    yield from _outputs(want, have, groups, scales, still)
    order = _permutation(want.bias.reshape(-1, 1), have.bias.reshape(-1, 1))
    if order is not None and have.is_explained(want.weight, want.bias[order], still):
        yield f"channel order: output channels of the bias alone are swapped, {exchanged(order)}"
    if want.weight.ndim >= 2:
        inner = 1 - want.axis if want.axis < 2 else 0
        order = _permutation(*(_rows(side.weight, inner) for side in (want, have)))
        if order is not None and have.is_explained(np.take(want.weight, order, inner), want.bias, still):
            yield f"channel order: input channels of the weight are swapped, {exchanged(order)}"
    for text, turn in _turns(want.weight.shape):
        for scale, _ in scales:
            with np.errstate(all="ignore"):
                factor = along(scale, want.axis, want.weight.ndim)
                weight = turn(want.weight / factor) * factor
            if np.isfinite(weight).all() and have.is_explained(weight, want.bias, still):
                yield text


def _outputs(want: Weights, have: Weights, groups: int, scales: list[tuple[Array, str]], still: Array) -> Iterator[str]:
    for scale, when in scales:
        mine, theirs = (side.scaled(1 / scale) for side in (want, have))
        order = _permutation(_rows(mine, want.axis), _rows(theirs, have.axis))
        if order is None:
            continue
        weight = Weights(np.take(mine, order, want.axis), want.bias, want.axis).scaled(scale)
        for bias, what in ((want.bias[order], ""), (want.bias, " of the weight alone")):
            if have.is_explained(weight, bias, still):
                if groups > 1 and (named := _group_order(order, groups)):
                    yield f"group order: {named}{what}{when}"
                yield f"channel order: output channels{what} are swapped{when}, {exchanged(order)}"


def _scale_behind(want: Weights, sites: list[Node]) -> Iterator[tuple[Array, str]]:
    """The scale that a BatchNorm gave to the output channels, if it is one alone."""
    if len(sites) == 1 and sites[0].attrs["norm"].gamma.size == want.channels:
        scale, _ = scale_and_shift(sites[0].attrs["norm"])
        if np.isfinite(scale).all() and (scale != 0).all():
            yield scale, " before the fold"


def order_of_scales(scale: Array, want: Weights, have: Weights) -> Order | None:
    """The order of a BatchNorm's channels that gives the candidate's scales."""
    with np.errstate(all="ignore"):
        theirs = scale * factors(want.weight, have.weight, want.axis)[0]
    if not np.isfinite(theirs).all() or scale.size > MOST:
        return None
    order = np.empty(scale.size, np.intp)
    order[np.argsort(theirs, kind="stable")] = np.argsort(scale, kind="stable")
    return None if _in_place(order) else order


def exchanged(order: Order) -> str:
    """Which places hold others' coefficients."""
    moved = np.flatnonzero(order != np.arange(len(order)))
    if len(moved) == 2:
        return f"{moved[0]} and {moved[1]}"
    shown = ", ".join(f"{i} holds {order[i]}" for i in moved[:4])
    return f"{shown}{' and so on' if len(moved) > 4 else ''} ({len(moved)} of {len(order)})"


def _turns(shape: tuple[int, ...]) -> Iterator[tuple[str, Callable[[Array], Array]]]:
    """A weight's axes exchanged or reversed, as far as its shape leaves it the same."""
    if len(shape) >= 2 and shape[0] == shape[1]:
        yield "transposed weight: input and output channels are exchanged", lambda w: w.swapaxes(0, 1)
    if len(shape) >= 4 and shape[2] == shape[3] and shape[2] > 1:
        yield "transposed weight: the kernel's height and width are exchanged", lambda w: w.swapaxes(2, 3)
    if len(shape) >= 3 and max(shape[2:]) > 1:
        yield "the kernel is flipped", lambda w: np.flip(w, tuple(range(2, w.ndim)))


def _rows(weight: Array, axis: int) -> Array:
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def _permutation(want: Array, have: Array) -> Order | None:
    """For each row of `have` the row of `want` that it equals, as nearly as the numbers tell; None where all stay, or two are the same."""
    count = len(want)
    if want.shape != have.shape or not 1 < count <= MOST or not (np.isfinite(want).all() and np.isfinite(have).all()):
        return None
    # By a few random projections, so that large weights take no time.
    axes = np.random.default_rng(0).normal(size=(want.shape[1], min(want.shape[1], 8)))
    one, other = want @ axes, have @ axes
    distance = (np.square(other)[:, None].sum(-1) + np.square(one).sum(-1)[None]) - 2 * other @ one.T
    if want.shape[1] == 1:
        distance = np.square(other - one.T)
    order = distance.argmin(axis=1)
    stays = distance[np.arange(count), np.arange(count)] <= distance.min(axis=1) * (1 + 1e-9) + 1e-24
    order = np.where(stays, np.arange(count), order)
    return None if _in_place(order) or len(set(order.tolist())) < count else order


def _in_place(order: Order) -> bool:
    return bool((order == np.arange(len(order))).all())


def _group_order(order: Order, groups: int) -> str:
    size, rest = divmod(len(order), groups)
    if rest or size == 0:
        return ""
    for g, o in ((groups, size), (size, groups)):
        if size > 1 and (order == np.arange(len(order)).reshape(g, o).T.ravel()).all():
            return f"the output channels are laid out as {o} x {g} for {g} x {o}"
    blocks = order.reshape(groups, size)
    if (blocks == blocks[:, :1] + np.arange(size)).all() and (blocks[:, 0] % size == 0).all():
        return f"the groups come in the order {', '.join(str(int(b) // size) for b in blocks[:, 0][:16])}"
    return ""
