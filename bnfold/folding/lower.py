"""BatchNorms that stay, as operators that every target has: a multiplication and an addition, or a convolution of one tap a channel.

s*x + t = Add(Mul(x, s), t) = Conv(x; W[c, 0, ...] = s[c], t[c]) with as many groups as channels
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Graph, Node, Site

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
