"""What data don't reach: layers, channels that never open, rows that are never read, branches that are never taken. What lies there, before
them or behind, could be anything, and no output would show it; where its coefficients aren't known to be right, nothing is known of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bnfold.algebra.graph import Graph, Node, Value
from bnfold.algebra.settings import settings
from bnfold.errors import BnfoldError
from bnfold.model import Model

from .inner_values import chunks, only
from .inputs import another
from .yardstick import Truth, plain, varies

if TYPE_CHECKING:
    from bnfold.data import Batch

# Operators that let nothing through where their input lies beyond a bound.
GATES = {"Relu", "relu", "Clip", "clamp", "clamp_min", "hardtanh", "relu6", "ThresholdedRelu", "threshold", "HardSigmoid", "hardsigmoid"}
GATES |= {"HardSwish", "hardswish"}
BRANCHES = {"If", "cond"}
CHOICES = {"Where", "where"}
MOST = 512  # values that are looked at
SHOWN = 4  # channels or rows, in a sentence


def dead_layer(reference: Model, truth: Truth) -> str:
    """The first layer whose output is the same on different data though data reach it; "" where there is none."""
    try:
        graph, layers = reference.plan().graph, reference.layers()
        alive = {id(v) for v in _fed(graph)}
        names = [v.name for node in graph.nodes for v in node.outputs if id(v) in alive and v.name in layers and node.op != "Barrier"]
        one = truth.feeds[0]
        other = another(reference, one)
        for chunk in chunks(names):
            run = only(reference, chunk)
            first, second = plain(run(one)), plain(run(other))
            for name, array in first.items():
                if array.dtype.kind == "f" and array.size and not varies([array, second[name]]):
                    return layers[name]
    except BnfoldError:
        return ""
    return ""


def _fed(graph: Graph) -> Iterator[Value]:
    """The values that data reach. Where an operator isn't known, what it gives may be a size, so nothing is said of what follows."""
    reached = {v for node in graph.nodes for v in node.inputs if v.producer is None}
    for node in graph.nodes:
        if node.op != "Barrier" and any(v in reached for v in node.inputs):
            reached.update(node.outputs)
            yield from node.outputs


@dataclass
class _Seen:
    """What came by of one value. axis: its channels'; rows: of the table that it indexes; low, high: by channel."""

    node: Node
    axis: int | None = None
    rows: int | None = None
    low: Any = None
    high: Any = None

    def add(self, array: Any) -> None:
        if self.rows is not None:
            read = np.zeros(self.rows, bool)
            read[array.astype(np.int64).ravel() % self.rows] = True
            self.high = read if self.high is None else self.high | read
            return
        if self.axis is None or array.ndim <= self.axis:
            others, self.axis = None, None
        else:
            others = tuple(i for i in range(array.ndim) if i != self.axis)
        if not array.size:
            return
        low, high = array.min(axis=others), array.max(axis=others)
        if self.low is not None and np.shape(low) != np.shape(self.low):
            return
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)

    def missed(self) -> str:
        """What none of it reached, "" where it reached all."""
        name = f"{self.node.label} {self.node.name}"
        if self.high is None:
            return ""
        if self.rows is not None:
            return f"nothing read {_which('row', np.flatnonzero(~self.high))} of the table of {name}" if not self.high.all() else ""
        if self.node.label in BRANCHES | CHOICES:
            constant = bool(np.all(self.low == self.high))
            return f"the condition of {name} was always {bool(np.all(self.low))}" if constant else ""
        still = np.atleast_1d(self.low == self.high)
        return f"{_which('channel', np.flatnonzero(still))} of {name} never opened" if still.any() else ""


def _which(what: str, found: Any) -> str:
    more = f" and {len(found) - SHOWN} others" if len(found) > SHOWN else ""
    return f"{what}{'s' * (len(found) > 1)} {', '.join(map(str, found[:SHOWN]))}{more}"


def unreached(subject: Model, graph: Graph, left: Collection[Node], feeds: Sequence[Batch]) -> str:
    """What the data didn't reach of the operators that level 1 left open, "" where there is none."""
    watched = _watched(graph, left)
    try:
        layers = subject.layers()
        for value, seen in watched.items():
            if value.producer is None:
                for batch in feeds:
                    if value.name in batch:
                        seen.add(batch[value.name])
        inner = {value.name: seen for value, seen in watched.items() if value.producer is not None and value.name in layers}
        for chunk in chunks(list(inner)[:MOST]):
            run = only(subject.renamed({}, {}), chunk)
            for batch in feeds:
                for name, array in run(subject.own(batch)).items():
                    inner[name].add(array)
    except BnfoldError:
        return ""
    return next((missed for seen in watched.values() if (missed := seen.missed())), "")


def _watched(graph: Graph, left: Collection[Node]) -> dict[Value, _Seen]:
    found: dict[Value, _Seen] = {}
    inside = _inside(graph)
    for node in graph.nodes:
        if node in inside or not node.inputs:
            continue
        around = _around(node)
        if node.op == "Table" and node in left:
            rows = node.params["table"].shape[node.attrs["axes"].index(None)]
            found[node.inputs[0]] = _Seen(node, rows=rows)
        elif node.label in BRANCHES | CHOICES:
            if node in left or any(each in left for each in (_held(node) if node.label in BRANCHES else around)):
                found[node.inputs[0]] = _Seen(node)
        elif node.label in GATES and any(each in left for each in around):
            above = next((each for each in around if each.index < node.index), None)
            found[node.output] = _Seen(node, axis=_channels(above, node.output.rank or 0))
    return found


def _channels(above: Node | None, rank: int) -> int | None:
    if not rank:
        return None
    last = above is not None and above.op == "Contraction" and above.attrs["y"][-1:] in above.attrs["w"]
    return rank - 1 if rank < 2 or last else 1


def _around(node: Node) -> list[Node]:
    """The nearest operators with coefficients, on either side."""
    found: dict[Node, None] = {}
    for up in (True, False):
        stack, seen = [node], {node}
        while stack:
            each = stack.pop()
            ways = [v.producer for v in each.inputs] if up else [user for v in each.outputs for user, _ in v.users]
            for other in ways:
                if other is None or other in seen:
                    continue
                seen.add(other)
                if other.params:
                    found[other] = None
                else:
                    stack.append(other)
    return list(found)


def _held(node: Node) -> set[Node]:
    """What the graphs compute that an operator holds."""
    found: set[Node] = set()
    stack = [v for body in settings(node).bodies for v in body.outputs if isinstance(v, Value)]
    while stack:
        each = stack.pop().producer
        if each is not None and each not in found and each.index < node.index:
            found.add(each)
            stack += each.inputs
    return found


def _inside(graph: Graph) -> set[Node]:
    """Operators of graphs that others hold: their values can't be seen, and they count only where something outside reads them."""
    held = {each for node in graph.nodes if node.label in BRANCHES | {"Loop", "Scan"} for each in _held(node)}
    used: set[Node] = set()
    stack = [v for node in graph.nodes if node not in held for v in node.inputs]
    while stack:
        each = stack.pop().producer
        if each is not None and each not in used:
            used.add(each)
            stack += each.inputs
    return held - used
