"""Clamps with bounds for each channel: what a ReLU, a ReLU6 or another clip becomes where a map passes it.

A front-end states the bounds of what clips (`attrs["bounds"]`), and why it can't be another operator, if so (`attrs["clips"]`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bnfold.algebra.affine import Affine
from bnfold.algebra.graph import Graph, Node, Param

from .lower import Written


def free(graph: Graph) -> None:
    """Let maps pass what clips by numbers of its own."""
    for node in graph.nodes:
        if len(node.inputs) == 1 and "bounds" in node.attrs:
            _as_clamp(node, node.attrs["bounds"])


def _as_clamp(node: Node, bounds: tuple[Any, Any], which: int = 0) -> bool:
    """Whether it could become one. The largest number of a type stands for no bound at all. which: the input that is clipped."""
    rank, limit = node.output.rank, node.attrs["limit"]
    low, high = (np.clip(bound, -limit, limit) for bound in bounds)
    if rank is None or node.inputs[which].rank != rank or (low > high).any():
        return False
    node.op, node.params = "Clamp", {}
    for role, bound in (("low", low), ("high", high)):
        node.params[role] = Param(None, (1,) * rank, default=float(bound.ravel()[0]))
        if bound.size > 1:
            node.params[role].update = Affine(np.zeros(()), bound)
    return True


def clamped(graph: Graph) -> Iterator[Written]:
    """Those whose bounds moved, as other operators."""
    for node in graph.nodes:
        if node.op == "Clamp" and any(param.update is not None for param in node.params.values()):
            limit = node.attrs["limit"]
            low, high = (node.params[role].read() for role in ("low", "high"))
            found = {"Max": np.where(low > -limit, low, -np.inf)} if (low > -limit).any() else {}
            found |= {"Min": np.where(high < limit, high, np.inf)} if (high < limit).any() else {}
            yield Written(node, found)


def _constant(node: Node) -> int | None:
    """Which operand of a maximum or minimum is a constant; None where none is, or it is no such operator."""
    if "bounds" not in node.attrs or len(node.inputs) != 2:
        return None
    return next((i for i, v in enumerate(node.inputs) if v.fixed or (v.producer is not None and v.producer.op == "Constant")), None)


def clips_by_channel(graph: Graph) -> bool:
    """Whether a network clips by an array of bounds, as one does that was folded with clamps."""
    clips = (node for node in graph.nodes if _constant(node) is not None)
    return any(np.size(bound) > 1 for node in clips for bound in node.attrs["bounds"])


def joined(graph: Graph) -> None:
    """Take maxima and minima by a constant operand for clamps too, and let clamps in a row be one, to compare two models.

    clamp(clamp(x; l, h); m, n) = clamp(x; clamp(l; m, n), clamp(h; m, n))
    """
    for node in list(graph.nodes):
        which = _constant(node)
        if which is None or (rank := node.output.rank) is None:
            continue
        constant, bounds = node.inputs[which], node.attrs["bounds"]
        if constant.producer is not None:
            moved = constant.producer.params["value"].read()
            moved = moved.reshape((1,) * (rank - moved.ndim) + moved.shape)
            bounds = tuple(bound if np.isscalar(bound) else moved for bound in bounds)
        if _as_clamp(node, bounds, 1 - which):
            del node.inputs[which]
            constant.users.remove((node, which))
            node.inputs[0].users = [(user, 0 if user is node else i) for user, i in node.inputs[0].users]
    graph.nodes[:] = [node for node in graph.nodes if node.op != "Constant" or node.output.users]
    for node in list(graph.nodes):
        before = node.inputs[0].producer if node.op == "Clamp" else None
        if before is None or before.op != "Clamp" or len(before.output.users) > 1 or before.output.is_output:
            continue
        m, n = (node.params[role].read() for role in ("low", "high"))
        for role, param in node.params.items():
            param.update = Affine(np.zeros(()), np.clip(before.params[role].read(), m, n))
        graph.bypass(before)
    graph.number()
