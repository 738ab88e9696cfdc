"""BatchNorms that stay, as operators that every target has: a multiplication and an addition, or a convolution of one tap a channel.

s*x + t = Add(Mul(x, s), t) = Conv(x; W[c, 0, ...] = s[c], t[c]) with as many groups as channels

And what a ReLU, a ReLU6 or another clip becomes where a map passes it: a maximum and a minimum with bounds for each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Affine, Array
from bnfold.algebra.graph import Graph, Node, Param, Site

from .duplicate import multiply_adds
from .options import Lowering
from .search import Outcome

SPATIAL = range(1, 4)  # axes that a convolution may have


@dataclass(frozen=True, eq=False)
class Written:
    """Operators with constants in the place of one, in their order. constants: by the operator's name ("Mul", "Add", "Max", "Min"), with
    the tensor's rank or less; "Conv" has its weight, [C, 1, ...], and its bias, [C], under "weight" and "bias" instead.
    flush: whether what is subnormal in their type is stored as 0."""

    node: Node
    constants: Mapping[str, Array]
    flush: bool = False

    @property
    def said(self) -> str:
        """What it is written as."""
        names = "a depthwise convolution" if "weight" in self.constants else " and ".join(self.constants)
        return f"written as {names or 'nothing'}"


def lower(graph: Graph, outcomes: Iterable[Outcome], how: Lowering, may: Callable[[Site], bool]) -> tuple[list[Outcome], list[Written]]:
    """The outcomes, of which those that stay are lowered where that can be; and the operators. may: whether a site can be replaced."""
    found, written = [], []
    left = set(graph.nodes)
    for outcome in outcomes:
        site = outcome.site
        fixed = not outcome.folded and site.is_batchnorm and all(n.op == "Affine" and n in left for n in site.nodes)
        if fixed and may(site):
            made = [_written(node, how) for node in site.nodes]
            over = next((reason for each in made if (reason := _overflow(each))), "")
            if not over:
                written += made
                said = made[0].said + ("" if how == "mul-add" or "weight" in made[0].constants else NO_CHANNELS)
                found.append(replace(outcome, lowered=said))
                continue
            outcome = replace(outcome, reason=f"{outcome.reason}; lowered, {over}")
        found.append(outcome)
    return found, written


NO_CHANNELS = (
    ", since a convolution takes one to three axes behind the channels, a number for each, and data of its own type, which runtimes rarely"
    " have for float64"
)
SINGLE = float(np.finfo(np.float32).max)


def _written(node: Node, how: Lowering) -> Written:
    a = coefficients(node)
    size = None if node.output.sizes is None or a.rank < 2 else node.output.sizes[1]
    own = not node.attrs.get("mixed") and node.attrs["limit"] <= SINGLE
    if how == "depthwise" and own and a.rank - 2 in SPATIAL and set(a.varying) <= {1} and size is not None:
        s, t = a.along(1, size)
        return Written(node, {"weight": s.reshape(size, *(1,) * (a.rank - 1)), "bias": t})
    constants = {} if (a.scale == 1).all() else {"Mul": a.scale}
    return Written(node, constants if constants and not a.shift.any() else {**constants, "Add": a.shift})  # of the identity the Add is left


def _overflow(written: Written) -> str:
    limit = written.node.attrs["limit"]
    largest = max(float(np.abs(array).max(initial=0.0)) for array in written.constants.values())
    return f"it would hold {largest:.3g}, beyond the largest {limit:.3g} of its type" if not largest <= limit else ""


def work(graph: Graph, written: Iterable[Written] = ()) -> int | None:
    """Multiplications of all operators with weights for one sample, those included that are written in the place of others."""
    counts = [multiply_adds(node) for node in graph.nodes]
    for each in written:
        sizes = None if each.node.output.probes is None else each.node.output.probes[0]
        if "weight" in each.constants:
            counts.append(None if sizes is None or None in sizes else int(np.prod([n or 1 for n in sizes[1:]])))
    return None if None in counts else sum(n for n in counts if n is not None)


# --- clamps with bounds for each channel ---------------------------------------------------------------------------------------------
# A front-end states the bounds of what clips (`attrs["bounds"]`), and why it can't be another operator, if so (`attrs["clips"]`).


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
