"""The inner values of a model: which of them stand for a value of its normal form, and how they come out of it one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from bnfold.algebra.graph import Node, Value
from bnfold.data import Batch
from bnfold.folding.plan import normal_form
from bnfold.folding.search import Outcome
from bnfold.model import Model
from bnfold.running import Stream


class Normal:
    """A model's normal form. steps: its operators as they stood before. stands: for a value of it, the name of the model's own value
    that equals it; none where a map that moved has left no such value.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.fed = model.own_inputs
        inputs, outputs = ({own: name for name, own in names.items()} for names in (model.own_inputs, model.own_outputs))
        graph, named = model.lowered()
        self._sites = list(graph.sites)
        self.batchnorms = [site for site in self._sites if site.is_batchnorm]
        self.steps = steps = [Step(node, tuple(node.inputs), tuple(node.outputs)) for node in graph.nodes]
        given = {v: v.name for step in steps for v in step.inputs if v.producer is None}
        self.inputs = [inputs.get(name, name) for name in given.values()]
        self.plan = plan = normal_form(graph, named).renamed(inputs, outputs)
        self.sites: dict[Node, list[Node]] = {}  # for each operator, the BatchNorms whose maps it took up, in their order
        for outcome in plan.outcomes:
            for node in outcome.into if outcome.folded else ():
                self.sites.setdefault(node, []).extend(outcome.site.nodes)
        left = set(graph.nodes)
        mapped = _mapped(steps, plan.outcomes)
        self.stands: dict[Value, str] = dict(given)
        for step in steps:
            for v in step.outputs:
                if v not in mapped and (end := _end(v, left)) is not None:
                    self.stands[end] = v.name

    def name_of(self, node: Node) -> str:
        """The name of a BatchNorm's layer, or of the node."""
        return next((site.name for site in self._sites if node in site.nodes), node.name)

    def in_front_of(self, node: Node) -> Node | None:
        """The operator whose output another read before anything was planned."""
        read = next((step.inputs[0] for step in self.steps if step.node is node and step.inputs), None)
        return next((step.node for step in self.steps if read in step.outputs), None)

    def stream(self, feeds: Batch, wanted: Iterable[str], *, jitter: int | None = None, exact: bool = True) -> Stream:
        """As `Model.stream`, of feeds by the names that callers use."""
        return self.model.stream(self.model.own(feeds), wanted, jitter=jitter, exact=exact)


class Step(NamedTuple):
    """An operator as it stood before anything was planned."""

    node: Node
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


def _mapped(steps: list[Step], outcomes: Iterable[Outcome]) -> set[Value]:
    """The values that planned maps change: between the operator that takes a map up and the one that it comes from, either way."""
    found: set[Value] = set()
    place = {step.node: i for i, step in enumerate(steps)}
    for outcome in outcomes:
        if not outcome.folded:
            continue
        into = {node for node in outcome.into if node in place}
        for node in outcome.site.nodes:
            if node not in place:
                continue
            whole = {n for n in into if n.op != "Move"} or into  # a Pad takes up its part and hands on the rest
            up = _between(steps, place, whole, {node})
            down = _between(steps, place, {node}, into)
            found |= up | down or set(node.outputs)  # a branch that became part of another operator stands nowhere
    return found


def _between(steps: list[Step], place: Mapping[Node, int], first: set[Node], last: set[Node]) -> set[Value]:
    """The values on the ways from the outputs of some operators to the inputs of others."""
    if not first or not last:
        return set()
    start, stop = min(place[n] for n in first), max(place[n] for n in last)
    ahead: set[Value] = set()
    for step in steps[start : stop + 1]:
        if step.node in first or (step.node not in last and any(v in ahead for v in step.inputs)):
            ahead |= set(step.outputs)
    behind: set[Value] = set()
    for step in reversed(steps[start : stop + 1]):
        if step.node in last or (step.node not in first and any(v in behind for v in step.outputs)):
            behind |= set(step.inputs)
    return ahead & behind


def _end(value: Value, left: set[Node]) -> Value | None:
    """The value that stands in the place of one whose operator is gone; none for what is inside of operators that became one."""
    while value.producer is not None and value.producer not in left and value.producer.inputs:
        if value.producer.op not in ("Affine", "Identity", "Add"):
            return None
        value = value.producer.inputs[0]
    return value
