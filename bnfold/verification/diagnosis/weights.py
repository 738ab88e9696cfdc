"""The weight and the bias of an operator, in normal form or before anything was folded in, and how two models' differ."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

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
            shown = ", ".join(map(str, channels[:SHOWN])) + (" and others" if len(channels) > SHOWN else "")
            parts.append(f"its {what} is off in channel{'s' * (len(channels) > 1)} {shown} ({len(channels)} of {np.size(off)})")
    return ", ".join(parts) or "its coefficients are right"


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
