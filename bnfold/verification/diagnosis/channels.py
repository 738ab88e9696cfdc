"""The arithmetic of a fold, channel by channel."""

from __future__ import annotations

import numpy as np

from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Norm


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
