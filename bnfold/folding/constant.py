"""Channels that hold the same number whatever goes in: those of weights that are all 0, and what the operators behind make of it.

A value v of which that is known is v = a(v) with the projection a, whose scale is 0 where v is constant and 1 elsewhere, and whose shift is
the constant. Where f lets maps cross, f(v) = f(a(v)) = b(f(v)); what works element by element is tried on the constants; and a linear
operator gives constants where its weight, without what reads constants, has nothing left.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Affine, Array, Blocked
from bnfold.algebra.graph import Graph, Node, Value
from bnfold.algebra.rule import identity
from bnfold.algebra.rules import rule_of

CROSSED = {"Average", "Crop", "Lookup", "Max", "Move", "Pad", "Resize", "Sum"}  # operators of which a rule tells what becomes of constants
LINEAR = {"Conv", "Contraction"}
BOUNDED = {"Sigmoid", "HardSigmoid", "Tanh", "Softmax", "sigmoid", "hardsigmoid", "tanh", "softmax"}


def constants(graph: Graph) -> dict[Value, Affine]:
    """The projections of all values with constant channels, along one axis each."""
    found: dict[Value, Affine] = {}
    for node in graph.nodes:
        if len(node.outputs) != 1 or not node.output.rank:
            continue
        given = [found.get(value, identity(value)) for value in node.inputs]
        try:
            a = _behind(graph, node, given)
        except Blocked:
            continue
        if a is not None and (a := _along_one_axis(a, node.output.rank)) is not None:
            found[node.output] = a
    return found


def _behind(graph: Graph, node: Node, given: list[Affine]) -> Affine | None:
    """What is known of an operator's output."""
    if node.op in LINEAR:
        return _linear(node, given)
    if node.op == "Affine":
        a = coefficients(node).after(given[0])
        return projection(a.scale != 0, a.shift)
    if node.op == "Clamp":
        low, high = node.params["low"].read(), node.params["high"].read()
        return projection((given[0].scale != 0) & (low != high), np.clip(given[0].shift, low, high))
    if all(a.is_identity for a in given):
        return None
    if node.op == "Identity":
        return given[0]
    if (function := graph.elementwise(node)) is not None:
        alive = np.zeros((1,) * (node.output.rank or 0), bool)
        for a in given:
            alive = alive | (a.scale != 0)
        if node.op == "Mul":  # 0 times whatever is finite
            for i, a in enumerate(given[: node.attrs.get("factors", len(given))]):
                makers = [value.producer for k, value in enumerate(node.inputs) if k != i]
                if all(maker is not None and maker.label in BOUNDED for maker in makers):
                    alive = alive & ((a.scale != 0) | (a.shift != 0))
        return projection(alive, function([a.shift for a in given]))
    if node.op in CROSSED:
        step = rule_of(node).down(node, given)[0]
        return step.maps[0] if not step.updates else None
    return None


def projection(alive: npt.NDArray[np.bool_], constant: Array) -> Affine:
    """Of what is known to be a number where it isn't alive."""
    alive = alive | ~np.isfinite(constant)
    return Affine(alive.astype(np.float64), np.where(alive, 0.0, constant))


def _linear(node: Node, given: list[Affine]) -> Affine | None:
    """Where the weight has nothing left but what reads constants, the output is what that comes to."""
    weight = node.params["weight"].read()
    bias = node.params["bias"].read() if "bias" in node.params else np.zeros(())
    behind: Array = np.zeros(())  # what comes out for want of a bias
    rest = [identity(value) for value in node.inputs[1:]]
    zeros = projection((given[0].scale != 0) | (given[0].shift != 0), given[0].shift)
    for a in (each for each in (given[0], zeros) if not each.is_identity):
        try:
            step = rule_of(node).down(node, [a, *rest])[0]
        except Blocked:  # it may be for the sake of what isn't 0
            continue
        if (step.maps[0].scale == 1).all():
            weight = step.updates["weight"](weight)
            bias = step.updates["bias"](bias) if "bias" in step.updates else bias
            behind = step.maps[0].shift
            break
    if node.op == "Conv":
        shape = (1, -1, *(1,) * (weight.ndim - 2))
        return projection(np.asarray(weight.any(axis=tuple(range(1, weight.ndim)))).reshape(shape), bias.reshape(shape) + behind)
    w, y = node.attrs["w"], node.attrs["y"]
    left = np.asarray(weight.any(axis=tuple(i for i, letter in enumerate(w) if letter not in y)))
    letters = [letter for letter in w if letter in y]
    left = left.transpose([letters.index(letter) for letter in y if letter in letters])
    return projection(left.reshape([weight.shape[w.index(letter)] if letter in w else 1 for letter in y]), bias + behind)


def channel_axes(node: Node) -> tuple[int, int] | None:
    """Along which axis of its output, and of its input, a linear operator has its channels; None where along several, or none."""
    if node.op == "Conv":
        return 1, 1
    x, w, y = (node.attrs[key] for key in "xwy")
    made = [i for i, letter in enumerate(y) if letter in w and letter not in x]
    read = [i for i, letter in enumerate(x) if letter in w and letter not in y]
    return (made[0], read[0]) if len(made) == len(read) == 1 else None


def _along_one_axis(a: Affine, rank: int) -> Affine | None:
    """A projection that varies along one axis at most; None where nothing is constant, or not along one."""
    if a.rank != rank or (a.scale != 0).all():
        return None
    alive, number = a.scale != 0, a.shift
    axes = [axis for axis in range(rank) if (alive != alive.take([0], axis)).any()]
    if len(axes) > 1:
        return None
    axes = axes or [axis for axis in range(rank) if (number != number.take([0], axis)).any()][:1]
    others = tuple(axis for axis in range(rank) if axis not in axes)
    low, high = number.min(axis=others, keepdims=True), number.max(axis=others, keepdims=True)
    found = projection(alive.any(axis=others, keepdims=True) | (low != high), low)
    return None if (found.scale != 0).all() else found
