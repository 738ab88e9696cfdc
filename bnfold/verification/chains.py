"""Affine operators in a row, held against others in a row that may be of other kinds: a BatchNorm against a Mul and an Add, say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Affine, Array
from bnfold.algebra.graph import Node, Value, Window

from .pairing import through


class Chain(NamedTuple):
    """What stands between two values. nodes: from the back; total: their map; summands: the magnitudes of what its shift is made of."""

    nodes: tuple[Node, ...]
    source: Value
    total: Affine
    summands: Array

    def resembles(self, other: Chain) -> bool:
        """Whether at least half of the scales are within 1 % of another's. Otherwise a scale went elsewhere, and the two are no pair."""
        mine, theirs = np.broadcast_arrays(self.total.scale, other.total.scale)
        return bool((np.abs(theirs - mine) <= 0.01 * np.abs(mine)).mean() >= 0.5)


def chain(value: Value, behind: Node | None = None) -> Chain | None:
    """The affine operators that make a value, as many as stand in a row, those behind a node if one is given; None where there is none."""
    value = through(value)
    nodes: list[Node] = []
    total = None
    summands: Array = np.zeros(())
    while (node := value.producer) is not None and node is not behind and len(node.inputs) == 1 and (own := _map(node)) is not None:
        scale = np.ones(()) if total is None else np.abs(total.scale)
        summands = summands + scale * (np.abs(own.shift) + 2 * np.abs(own.scale * np.asarray(node.attrs.get("mean", 0.0))))
        total = own if total is None else total.after(own)
        nodes.append(node)
        value = through(node.inputs[0])
    return None if total is None else Chain(tuple(nodes), value, total, summands)


def _map(node: Node) -> Affine | None:
    """The map of an affine operator, or of a convolution that has one tap for each channel and nothing else."""
    if node.output.rank is None or node.inputs[0].rank != node.output.rank:
        return None
    if node.op == "Affine":
        return coefficients(node)
    window = node.attrs.get("window")
    if node.op != "Conv" or not isinstance(window, Window) or any(window.before) or any(window.after) or {*window.stride} != {1}:
        return None
    weight = node.params["weight"]
    channels, *others = weight.shape
    if set(others) != {1} or node.attrs["groups"] != channels:
        return None
    ones = (1,) * len(window.stride)
    return Affine(weight.read().reshape(1, channels, *ones), node.params["bias"].read().reshape(1, channels, *ones))


def coefficients_of(one: Chain, other: Chain) -> Iterator[tuple[str, Array, Array, Array]]:
    """Scale and shift of both, each with the magnitude of what it is made of."""
    for role, a, b in (("scale", one.total.scale, other.total.scale), ("shift", one.total.shift, other.total.shift)):
        size = np.abs(a) if role == "scale" else np.maximum(one.summands, other.summands)
        want, have, magnitude = np.broadcast_arrays(a, b, size)
        yield role, want, have, magnitude
