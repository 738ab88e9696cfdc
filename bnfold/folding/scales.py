"""Which values of a network can be scaled together, by the rules that also say where a BatchNorm may go.

A value v scaled by D > 0 is D*v. Each operator that makes or reads it must answer: y = f(x) becomes D_y*f(x) = f'(D_x*x), of which the
rules' two directions are the halves,

    up     D_y*f(x) = f1(B*x)              what must stand before f where its output is scaled
    down   f1(B/D_x * (D_x*x)) = f2(D_x*x)   what is left of that once its inputs are scaled, and must end in f

so the scaled values are found by asking around, from one value on, until all that is touched is answered. Every scale is positive,
nothing is shifted, and so ReLU and its kin, maxima, averages and padding with zeros let them pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from bnfold.algebra.affine import Affine, Array, Blocked
from bnfold.algebra.graph import Graph, Node, Value
from bnfold.algebra.rule import Step, identity
from bnfold.algebra.rules import rule_of

from .feasible import Draft
from .ways import State, named, search

SAME = 1e-9  # relative: what divisions leave of equality


@dataclass(frozen=True)
class ScaleGroup:
    """Values that are scaled together, from the output of a linear layer on, whose channels lie along an axis.

    draft: what becomes of parameters where channel i, from 0 on, is multiplied by 1 + (i + 1) / size. barred, live: see `scaled_together`.
    """

    start: Value
    axis: int
    size: int
    draft: Draft = field(default_factory=dict)
    barred: Mapping[Node, str] = field(default_factory=dict)
    live: Collection[Node] = ()

    def scaled(self, by: Array) -> State:
        """See `scaled_together`. by: for each channel."""
        shape = [self.size if i == self.axis else 1 for i in range(self.start.rank or 0)]
        return scaled_together(self.start, by.reshape(shape), self.barred, self.live)


def groups(graph: Graph, barred: Mapping[Node, str] = MappingProxyType({})) -> Iterator[tuple[Node, ScaleGroup | str]]:
    """The groups of a network, each with the first layer that makes its channels; or why those of a layer can't be scaled.

    barred: see `scaled_together`.
    """
    covered: set[Value] = set()
    live = graph.live()
    for node in graph.nodes:
        if (group := _made_by(node)) is None or node.output in covered:
            continue
        if node not in live:
            yield node, "it reaches no output of the model"
            continue
        group = dataclasses.replace(group, barred=barred, live=live)
        try:
            state = group.scaled(1 + np.arange(1, group.size + 1) / group.size)
        except Blocked as blocked:
            yield node, str(blocked)
        else:
            covered |= state.maps.keys()
            yield node, dataclasses.replace(group, draft=state.draft)


def _made_by(node: Node) -> ScaleGroup | None:
    """The channels that a linear layer makes."""
    if node.op not in ("Conv", "Contraction") or "weight" not in node.params or not node.output.rank:
        return None
    shape = node.params["weight"].shape
    if node.op == "Conv":
        return ScaleGroup(node.output, 1, shape[0])
    x, w, y = (node.attrs[key] for key in "xwy")
    own = [letter for letter in w if letter in y and letter not in x]
    return ScaleGroup(node.output, y.index(own[-1]), shape[w.index(own[-1])]) if own else None


def scaled_together(value: Value, scale: Array, barred: Mapping[Node, str], live: Collection[Node]) -> State:
    """What is scaled (`maps`), and what becomes of parameters (`draft`), if a value is; Blocked where it can't be.

    scale: of the value's rank. barred: operators that may take no part, each with the reason. live: those that reach an output; of the
    others nobody sees what they make of scaled values, and they stay as they are.
    """
    start = State()
    _assign(start, value, Affine.scaling(scale))

    def advance(state: State) -> list[State]:
        node = state.next()
        if node not in live:
            return [state]
        try:
            if node in barred:
                raise Blocked(barred[node])
            return _answers(state, node)
        except Blocked as blocked:
            raise named(node, blocked) from None

    return search(start, advance, lambda state: state)


def _assign(state: State, value: Value, a: Affine, by: Node | None = None) -> None:
    """Let a value be scaled, and ask those who make and read it, but for the one who says so."""
    if value.is_output or value.producer is None:
        state.fail = state.fail or Blocked(f"{value.name} is an {'output' if value.is_output else 'input'} of the model")
        return
    state.maps[value] = a.require(unshifted=True)
    for node in (value.producer, *(user for user, _ in value.users)):
        if node is not by:
            state.visit(node, 1)


def _answers(state: State, node: Node) -> list[State]:
    """The states in which a node has answered to what is scaled of its inputs and its output."""
    given, out = [state.maps.get(v) for v in node.inputs], state.maps.get(node.output)
    if any(v in state.maps for v in node.outputs[1:]):
        raise Blocked("only its first output may be scaled")
    if out is None:
        undone = [identity(v) if a is None else _inverse(a) for v, a in zip(node.inputs, given, strict=True)]
        try:
            return [_answer(state, node, step, {node.output: _inverse(step.maps[0])}) for step in rule_of(node).down(node, undone)]
        except Blocked:
            if len(given) == 1:
                raise
        out = _of_rank(max((a for a in given if a is not None), key=lambda a: a.scale.size), node.output)  # all alike, then
    answers, reason = [], None
    for step in rule_of(node).up(node, out):
        try:
            answers.append(_settled(state, node, given, out, step))
        except Blocked as blocked:
            reason = reason or blocked
    if reason is not None and not answers:
        raise reason
    return answers


def _settled(state: State, node: Node, given: list[Affine | None], out: Affine, step: Step) -> State:
    """What stands before a node's inputs is taken from those that aren't scaled yet; of the others, what is left must end in it."""
    wanted = [a.settled() for a in step.maps]
    left = [identity(v) if a is None else b.after(_inverse(a)) for v, a, b in zip(node.inputs, given, wanted, strict=True)]
    updates = dict(step.updates)
    if not all(map(_is_nothing, left)):
        ends = [each for each in rule_of(node).down(node, left) if _is_nothing(each.maps[0])]
        if not ends:
            raise Blocked("it would need other scales for what it reads")
        for role, update in ends[0].updates.items():
            updates[role] = updates[role].after(update) if role in updates else update
    new = {v: b for v, a, b in zip(node.inputs, given, wanted, strict=True) if a is None}
    return _answer(state, node, Step([], updates), {**new, node.output: out})


def _answer(state: State, node: Node, step: Step, scales: dict[Value, Affine]) -> State:
    answer = state.copy().take(node, step)
    for value, a in scales.items():
        if value not in answer.maps and not _is_nothing(a):
            if value is node.output and len(node.outputs) > 1:
                raise Blocked("it has several outputs")
            _assign(answer, value, a, by=node)
    return answer


def _inverse(a: Affine) -> Affine:
    return Affine.scaling(1 / a.require(unshifted=True).scale)


def _is_nothing(a: Affine) -> bool:
    return not a.shift.any() and bool((np.abs(a.scale - 1) <= SAME).all())


def _of_rank(a: Affine, value: Value) -> Affine:
    return a.map(lambda c: c.reshape((1,) * ((value.rank or 0) - c.ndim) + c.shape))
