"""Affine operators in a row, held against others in a row that may be of other kinds: a BatchNorm against a Mul and an Add, say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Affine, Array
from bnfold.algebra.graph import Node, Value, Window

from .pairing import through


class AffineChain(NamedTuple):
    """What stands between two values. nodes: from the back. Their map is read when it is asked for, since their parameters may change."""

    nodes: tuple[Node, ...]
    source: Value

    def read(self) -> tuple[Affine, Array]:
        """Their map, and the magnitudes of what its shift is made of."""
        total, summands = Affine(np.ones(()), np.zeros(())), np.zeros(())
        for node in self.nodes:
            own = _map(node)
            assert own is not None
            centred = np.abs(own.scale * np.asarray(node.attrs.get("mean", 0.0)))
            summands = summands + np.abs(total.scale) * (np.abs(own.shift) + 2 * centred)
            total = own if node is self.nodes[0] else total.after(own)
        return total, summands

    def resembles(self, other: AffineChain) -> bool:
        """Whether at least half of the scales are within 1 % of another's. Otherwise a scale went elsewhere, and the two are no pair."""
        mine, theirs = np.broadcast_arrays(*(each.read()[0].scale for each in (self, other)))
        return bool((np.abs(theirs - mine) <= 0.01 * np.abs(mine)).mean() >= 0.5)


def chain(value: Value, behind: Node | None = None) -> AffineChain | None:
    """The affine operators that make a value, as many as stand in a row, those behind a node if one is given; None where there is none."""
    value = through(value)
    nodes: list[Node] = []
    while (node := value.producer) is not None and node is not behind and len(node.inputs) == 1 and _map(node) is not None:
        nodes.append(node)
        value = through(node.inputs[0])
    return AffineChain(tuple(nodes), value) if nodes else None


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


def coefficients_of(one: AffineChain, other: AffineChain) -> Iterator[tuple[str, Array, Array, Array]]:
    """Scale and shift of both, each with the magnitude of what it is made of."""
    (mine, summands), (its, its_summands) = one.read(), other.read()
    for role, a, b in (("scale", mine.scale, its.scale), ("shift", mine.shift, its.shift)):
        size = np.abs(a) if role == "scale" else np.maximum(summands, its_summands)
        want, have, magnitude = np.broadcast_arrays(a, b, size)
        yield role, want, have, magnitude
