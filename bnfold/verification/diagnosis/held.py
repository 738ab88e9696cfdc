"""The coefficients that an operator holds, and whether others are the same to rounding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Node, Param

from ..coefficients import DOUBLE, LIMIT, precision
from .channels import along

SLACK = 2 * LIMIT  # units of roundoff within which a hypothesis explains what is stored


@dataclass(frozen=True)
class Held:
    """The coefficients of one operator. axis: along which the weight's output channels lie; bias: one for each of them, or none."""

    weight: Array
    bias: Array
    axis: int

    @property
    def channels(self) -> int:
        return int(self.weight.shape[self.axis])

    def scaled(self, ratio: Array) -> Array:
        """The weight with each output channel times a factor."""
        return self.weight * along(ratio, self.axis, self.weight.ndim)


@dataclass(frozen=True)
class Found(Held):
    """What the candidate holds. unit: roundoff of the type in which it is stored."""

    unit: float

    def misfit(self, weight: Array, bias: Array, summands: Array) -> tuple[float, float]:
        """How far these are from it in units of roundoff, at most and in root mean square. summands: what the bias's amount to."""
        if weight.shape != self.weight.shape or bias.shape != self.bias.shape:
            return np.inf, np.inf
        unit, tiny = max(self.unit, DOUBLE), float(np.finfo(np.float32).tiny) * max(self.unit, DOUBLE)
        with np.errstate(all="ignore"):
            off = [
                np.maximum(np.abs(found - made) - tiny, 0) / (unit * np.maximum(size, tiny))
                for made, found, size in (
                    (weight, self.weight, np.maximum(np.abs(weight), np.abs(self.weight))),
                    (bias, self.bias, np.abs(bias) + summands),
                )
            ]
        most = max(float(np.where(np.isnan(each), np.inf, each).max(initial=0.0)) for each in off)
        return most, max(float(np.sqrt(np.square(each).mean())) if each.size else 0.0 for each in off)

    def is_explained(self, weight: Array, bias: Array, summands: Array) -> bool:
        """Whether these are the same to rounding."""
        return self.misfit(weight, bias, summands)[0] <= SLACK


def held(node: Node) -> Held | None:
    """An operator's coefficients in normal form; None where it has none that a BatchNorm could go into."""
    if "norm" in node.attrs or (node.op == "Affine" and node.params):
        own = coefficients(node)
        scale, shift = np.broadcast_arrays(own.scale, own.shift)
        return Held(scale.ravel(), shift.ravel(), 0)
    weight = node.params.get("weight")
    if weight is None or node.op not in ("Conv", "Contraction"):
        return None
    array, axis = weight.read(), _out_axis(node)
    bias = node.params.get("bias")
    add = node.output.users[0][0] if len(node.output.users) == 1 else None
    if bias is not None and (bias.tensor is not None or bias.update is not None):
        vector = bias.read().ravel()
    elif add is not None and add.op == "Affine" and add.params.keys() == {"beta"}:
        vector = coefficients(add).shift.ravel()
    else:
        vector = np.zeros(1)
    size = array.shape[axis]
    return Held(array, np.broadcast_to(vector, size) if vector.size in (1, size) else np.zeros(size), axis)


def unfolded(node: Node) -> Held | None:
    """The same before anything was folded in."""
    weight, bias = node.params.get("weight"), node.params.get("bias")
    if weight is None or weight.tensor is None or node.op not in ("Conv", "Contraction"):
        return None
    array, axis = _stored(weight), _out_axis(node)
    vector = np.zeros(1) if bias is None or bias.tensor is None else _stored(bias).ravel()
    size = array.shape[axis]
    return Held(array, np.broadcast_to(vector, size) if vector.size in (1, size) else np.zeros(1), axis)


def both_held(reference: Node, candidate: Node) -> tuple[Held, Found] | None:
    """The coefficients of two operators; None where their shapes differ, or one has none."""
    want, have = held(reference), held(candidate)
    if want is None or have is None or want.weight.shape != have.weight.shape:
        return None
    return want, Found(have.weight, have.bias, have.axis, unit_of(reference, candidate))


def unit_of(*nodes: Node) -> float:
    """Unit roundoff of the coarsest type in which their coefficients are stored."""
    limits = [param.tensor.limit for node in nodes for param in node.params.values() if param.tensor is not None]
    return max((precision(limit)[0] for limit in limits), default=2.0**-24)


def _out_axis(node: Node) -> int:
    if node.op == "Conv":
        return 0
    w, y = node.attrs["w"], node.attrs["y"]
    return next((i for i in reversed(range(len(w))) if w[i] in y), 0)


def _stored(param: Param) -> Array:
    assert param.tensor is not None
    return param.layout.canonical(param.tensor.read())
