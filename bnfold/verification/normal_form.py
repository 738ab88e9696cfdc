"""The inner values of a model: which of them stand for a value of its normal form, and how they come out of it one by one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from bnfold.algebra.graph import Graph, Node, Value
from bnfold.folding.plan import normal_form
from bnfold.folding.search import Outcome
from bnfold.model import Subject

from .interface import Renamed

if TYPE_CHECKING:
    from bnfold.data import Batch

Stream = Iterator[tuple[str, npt.NDArray[Any]]]


@dataclass(frozen=True)
class Part:
    """A piece of a model that runs by itself. suffix: of the file that holds it; data: the file's content."""

    suffix: str
    data: bytes


class Network(Protocol):
    """A model whose inner values can be seen, in the names of its own graph."""

    kind: str  # "onnx" or "torch"

    def lowered(self) -> tuple[Graph, Mapping[str, Value]]:
        """The neutral graph, and the outputs by name."""

    def stream(self, feeds: Batch, wanted: Iterable[str], *, jitter: int | None = None, exact: bool = True) -> Stream:
        """The wanted values in the order in which they are computed, none held longer than the network needs it.

        exact: in float64; else in the stored types. jitter: as for `Subject.oracle`. Raises UnsupportedError.
        """

    def part(self, inputs: Mapping[str, npt.NDArray[Any]], output: str, also: Iterable[str] = ()) -> Part:
        """What computes one value from others, with its weights. inputs: these, in their stored types; also: other values to give out."""

    def edge(self, output: str, stops: Collection[str]) -> list[str]:
        """Which of some values, or of the model's inputs, another is computed from."""

    def types(self, names: Iterable[str]) -> dict[str, Any]:
        """The numpy types in which values are stored, as far as they are known."""


class Normal:
    """A network's normal form. stands: for a value of it, the name of the network's own value that equals it; none where a map that
    moved has left no such value.
    """

    def __init__(self, network: Network, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        """inputs, outputs: the names by which others know them, by the network's own."""
        self.network = network
        self.fed = {name: own for own, name in inputs.items()}  # its inputs by the names that others know, where these are others
        graph, named = network.lowered()
        self._sites = list(graph.sites)
        steps = [_Step(node, tuple(node.inputs), tuple(node.outputs)) for node in graph.nodes]
        given = list(dict.fromkeys(v for step in steps for v in step.inputs if v.producer is None))
        own_names = {v: v.name for v in given}
        for v in given:
            v.name = inputs.get(v.name, v.name)
        self.inputs = [v.name for v in given]
        self.limits = [float(step.node.attrs["limit"]) for step in steps if "limit" in step.node.attrs and step.inputs]
        plan = normal_form(graph, named)
        self.graph, self.outcomes = plan.graph, plan.outcomes
        self.outputs = {outputs.get(name, name): v for name, v in plan.outputs.items()}
        self.sites: dict[Node, list[Node]] = {}  # for each operator, the BatchNorms whose maps it took up, in their order
        for outcome in plan.outcomes:
            if outcome.folded:
                for node in outcome.into:
                    self.sites.setdefault(node, []).extend(outcome.site.nodes)
        left = set(graph.nodes)
        mapped = _mapped(steps, plan.outcomes)
        self.stands: dict[Value, str] = {v: own_names[v] for v in given}
        for step in steps:
            for v in step.outputs:
                if v not in mapped and (end := _end(v, left)) is not None:
                    self.stands[end] = v.name

    def name_of(self, node: Node) -> str:
        """The name of a BatchNorm's layer, or of the node."""
        return next((site.name for site in self._sites if node in site.nodes), node.name)

    def stream(self, feeds: Batch, wanted: Iterable[str], *, jitter: int | None = None, exact: bool = True) -> Stream:
        """As `Network.stream`, of feeds by the names that others know."""
        return self.network.stream(self.own(feeds), wanted, jitter=jitter, exact=exact)

    def own(self, feeds: Batch) -> Batch:
        """Feeds by the network's own names."""
        return {self.fed.get(name, name): array for name, array in feeds.items()}


@dataclass(frozen=True)
class _Step:
    """An operator as it stood before anything was planned."""

    node: Node
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


def _mapped(steps: list[_Step], outcomes: Iterable[Outcome]) -> set[Value]:
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
            up = _between(
                steps, place, {n for n in into if n.op != "Move"} or into, {node}
            )  # a Pad takes up its part and hands on the rest
            down = _between(steps, place, {node}, into)
            found |= up | down or set(node.outputs)  # a branch that became part of another operator stands nowhere
    return found


def _takes_all(node: Node) -> bool:
    """Whether a map ends in an operator: a Pad takes up its part, or an Add the shift alone, and hands on the rest."""
    if node.op in ("Affine", "Normalisation"):
        return {"gamma", "beta"} <= node.params.keys()
    return node.op in ("Conv", "Table", "Constant", "Recurrent") or (node.op == "Contraction" and "bias" in node.params)


def _between(steps: list[_Step], place: Mapping[Node, int], first: set[Node], last: set[Node]) -> set[Value]:
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


def network_of(subject: Subject) -> tuple[Network | None, dict[str, str], dict[str, str]]:
    """The network of a subject, or None where its kind has none, and its inputs and outputs by the names that others know."""
    inputs: dict[str, str] = {}
    outputs: dict[str, str] = {}
    if isinstance(subject, Renamed):
        inputs, outputs, subject = dict(subject.own_inputs), dict(subject.own_outputs), subject.subject
    make = getattr(subject, "network", None)
    network: Network | None = None if make is None else make()
    return network, inputs, outputs
