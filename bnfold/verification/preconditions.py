"""What must hold before outputs that agree say anything: the reference is a function of its inputs, and the data reach all that it does.

Data may not reach layers, channels that never open, rows that are never read, branches that are never taken. What lies there, before them
or behind, could be anything, and no output would show it; where its coefficients aren't known to be right, nothing is known of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnfold.algebra.graph import Graph, Node, Value, reachable
from bnfold.algebra.settings import settings
from bnfold.data import Batch
from bnfold.errors import BnfoldError, UnsupportedError
from bnfold.model import Model

from .inputs import EXACT, another
from .noise import FLOOR, plain, variation
from .roundoff import output_axis
from .yardstick import Run, Truth

CHUNK = 64  # inner values looked at in one run, so that they needn't all be kept

# Operators that let nothing through where their input lies beyond a bound.
GATES = {"Relu", "relu", "Clip", "clamp", "clamp_min", "hardtanh", "relu6", "ThresholdedRelu", "threshold", "HardSigmoid", "hardsigmoid"}
GATES |= {"HardSwish", "hardswish"}
BRANCHES = {"If", "cond"}
CHOICES = {"Where", "where"}
MOST = 512  # values that are looked at
SHOWN = 4  # channels or rows, in a sentence


def chunks(names: list[str]) -> Iterator[list[str]]:
    """A few inner values at a time."""
    for start in range(0, len(names), CHUNK):
        yield names[start : start + CHUNK]


def only(subject: Model, names: list[str], jitter: int | None = None) -> Run:
    """A run in float64 that gives some inner values and no others. jitter: as for `Model.exact`."""
    run = subject.exact(jitter=jitter, outputs=names).run
    return lambda feeds: {name: value for name, value in run(feeds).items() if name in names}


def unsteady(first: Run, second: Run, truth: Truth, slack: float) -> str:
    """How two runs of the reference differ, as with a random operator or dropout in training mode; "" where they don't.

    slack: what may differ, relatively to the largest number.
    """
    for name, errors in Truth(first, truth.feeds[:1]).compare(second).items():
        if errors.problem or errors.peak > slack * (truth.scale(name, 0.0).largest or 1.0):
            return f"the reference differs from itself between two runs, in output {name}"
    return ""


def unsteady_oracle(reference: Model, truth: Truth) -> str:
    """The same of the reference in float64, made anew for each run."""
    try:
        return unsteady(reference.exact().run, reference.exact().run, truth, EXACT)
    except UnsupportedError:
        return ""


def constant(reference: Model, truth: Truth, unit: float, *, certain: bool) -> str:
    """How the reference answers one thing to everything. certain: whether the coefficients are known to be right.

    Then it is enough that the data reach the outputs at all, however little they do there. unit: roundoff of the stored type.
    """
    moves = truth.variation(lambda batch: another(reference, batch))
    if moves <= (FLOOR if certain else EXACT):
        return "the reference answers the same whatever it is fed"
    if not certain and moves <= unit:
        return "the reference's answers differ by less than its stored type tells (saturated?)"
    return ""


def dead_layer(reference: Model, truth: Truth) -> str:
    """The first layer whose output is the same on different data though data reach it; "" where there is none."""
    one = truth.feeds[0]
    try:
        layers, other = reference.layers(), another(reference, one)
        for chunk in chunks([name for name in _fed(reference.plan().graph) if name in layers]):
            run = only(reference, chunk)
            first, second = plain(run(one)), plain(run(other))
            for name, array in first.items():
                if array.dtype.kind == "f" and array.size and variation(array, second[name]) <= EXACT:
                    return layers[name]
    except BnfoldError:
        pass
    return ""


def _fed(graph: Graph) -> list[str]:
    """The values that data reach. Where an operator isn't known, what it gives may be a size, so nothing is said of what follows."""
    reached = {v: "" for node in graph.nodes for v in node.inputs if v.producer is None}
    for node in graph.nodes:
        if node.op != "Barrier" and any(v in reached for v in node.inputs):
            reached |= {v: v.name for v in node.outputs}
    return [name for name in reached.values() if name]


@dataclass
class _Seen:
    """What came by of one value. axis: its channels'; rows: of the table that it indexes; low, high: by channel, or by row."""

    node: Node
    axis: int | None = None
    rows: int | None = None
    low: Any = None
    high: Any = None

    def add(self, array: Any) -> None:
        if not array.size:
            return
        if self.rows is not None:
            low, high = np.zeros(self.rows, bool), np.zeros(self.rows, bool)
            high[array.astype(np.int64).ravel() % self.rows] = True
        else:
            by_channel = self.axis is not None and array.ndim > self.axis
            others = tuple(i for i in range(array.ndim) if i != self.axis) if by_channel else None
            low, high = array.min(axis=others), array.max(axis=others)
        if self.low is None:
            self.low, self.high = low, high
        elif np.shape(low) == np.shape(self.low):
            self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)

    def missed(self) -> str:
        """What none of it reached, "" where it reached all."""
        name, still = f"{self.node.label} {self.node.name}", np.flatnonzero(self.low == self.high)
        if self.low is None or not still.size:
            return ""
        more = f" and {len(still) - SHOWN} others" if len(still) > SHOWN else ""
        which = f"{'s' * (len(still) > 1)} {', '.join(map(str, still[:SHOWN]))}{more}"
        if self.rows is not None:
            return f"nothing read row{which} of the table of {name}"
        if self.node.label in BRANCHES | CHOICES:
            return f"the condition of {name} was always {bool(self.low)}"
        return f"channel{which} of {name} never opened"


def unreached(subject: Model, graph: Graph, left: frozenset[Node], feeds: Sequence[Batch]) -> str:
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


def _watched(graph: Graph, left: frozenset[Node]) -> dict[Value, _Seen]:
    found: dict[Value, _Seen] = {}
    inside = _inside(graph)
    for node in graph.nodes:
        if node in inside or not node.inputs:
            continue
        around = _around(node) if node.label in GATES | CHOICES else list(_bodies(node)) if node.label in BRANCHES else []
        if node.op == "Table" and node in left:
            found[node.inputs[0]] = _Seen(node, rows=node.params["table"].shape[node.attrs["axes"].index(None)])
        elif node.label in BRANCHES | CHOICES and not left.isdisjoint((node, *around)):
            found[node.inputs[0]] = _Seen(node)
        elif node.label in GATES and not left.isdisjoint(around):
            above, rank = next((each for each in around if each.index < node.index), None), node.output.rank
            found[node.output] = _Seen(node, axis=output_axis(above, rank) if rank else None)
    return found


def _sources(node: Node) -> list[Node]:
    return [v.producer for v in node.inputs if v.producer is not None]


def _users(node: Node) -> list[Node]:
    return [user for v in node.outputs for user, _ in v.users]


def _around(node: Node) -> list[Node]:
    """The nearest operators with coefficients, on either side."""

    def nearest(way: Callable[[Node], list[Node]]) -> list[Node]:
        return [each for each in reachable(way(node), lambda each: [] if each.params else way(each)) if each.params]

    return nearest(_sources) + nearest(_users)


def _bodies(node: Node) -> dict[Node, None]:
    """What the graphs compute that an operator holds."""
    ends = [v.producer for body in settings(node).bodies for v in body.outputs if isinstance(v, Value) and v.producer is not None]
    inner = [each for each in ends if each.index < node.index]
    return reachable(inner, lambda each: (above for above in _sources(each) if above.index < node.index))


def _inside(graph: Graph) -> set[Node]:
    """Operators of graphs that others hold: their values can't be seen, and they count only where something outside reads them."""
    inner = {each for node in graph.nodes if node.label in BRANCHES | {"Loop", "Scan"} for each in _bodies(node)}
    return inner - reachable((above for node in graph.nodes if node not in inner for above in _sources(node)), _sources).keys()
