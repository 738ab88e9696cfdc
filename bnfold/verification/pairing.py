"""Which operators of two networks stand at the same place: one walk through both at once, backwards from the outputs.

It goes by the data flow alone, whatever operators and values are called. Where the structures differ, it goes on at values further up
that are computed alike in both. Level 1 compares what it pairs (see `structure`), and `diagnosis` looks for a difference there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass

from bnfold.algebra.graph import Graph, Node, Value
from bnfold.algebra.settings import COMMUTATIVE, RESHAPING, SAID_BY_COEFFICIENTS, operator
from bnfold.folding.plan import NormalForm

NORMALISES = {"BatchNormalization", "batch_norm", "_batch_norm_with_update", "_native_batch_norm_legit", "native_batch_norm"}
MOST_EXTRA = 4  # operators in a row that one side may have more


class Walk(ABC):
    """The walk. visited: pairs of values, in order; equal: whether the two of a pair should be equal, or only their operators match.

    nodes: the operators that correspond. trouble: why others don't, each with the place in the reference.
    """

    def __init__(self, reference: NormalForm, candidate: NormalForm) -> None:
        self.plans = reference, candidate
        self.keys = _keys(reference.graph) | _keys(candidate.graph)
        self.visited: list[tuple[Value, Value]] = []
        self.equal: dict[tuple[Value, Value], bool] = {}
        self.nodes: dict[tuple[Node, Node], None] = {}
        self.trouble: list[tuple[int, str]] = []
        self._stack: list[tuple[Value, Value]] = []

    @abstractmethod
    def visit(self, a: Value, b: Value) -> None:
        """Look at a pair of values, and push what it leads to."""

    def push(self, a: Value, b: Value, *, equal: bool = True) -> None:
        """Come to a pair of values next, once."""
        pair = through(a), through(b)
        if pair not in self.equal:
            self._stack.append(pair)
        self.equal[pair] = equal or self.equal.get(pair, False)

    def push_inputs(self, p: Node, q: Node) -> None:
        """Come to the inputs of two operators, each of p's with its counterpart among those of q."""
        left, reorder = list(q.inputs), _commutes(p) and not self.read_alike(p, q)
        for a in p.inputs:
            alike = [v for v in left if self.keys[v] == self.keys[a]] or [v for v in left if v.name == a.name] if reorder else []
            b = (alike or left)[0]
            left.remove(b)
            self.push(a, b)

    def read_alike(self, p: Node, q: Node) -> bool:
        """Whether the inputs of two operators are computed alike."""
        return [self.keys[v] for v in p.inputs] == [self.keys[v] for v in q.inputs]

    def run(self) -> None:
        """From the outputs, and then, where something has no counterpart, from the values that are computed alike in both."""
        one, other = (plan.outputs for plan in self.plans)
        for name in one:
            if name in other:
                self.push(one[name], other[name])
        self._go()
        if not self.trouble:
            return
        left = []
        for i, plan in enumerate(self.plans):
            paired = {pair[i] for pair in self.nodes}
            left.append({v: self.keys[v] for node in plan.graph.nodes if node not in paired for v in node.outputs})
        counts = [Counter(values.values()) for values in left]
        place = {key: v for v, key in left[1].items()}
        for v, key in reversed(left[0].items()):
            if counts[0][key] == counts[1][key] == 1:
                self.push(v, place[key])
                self._go()

    def _go(self) -> None:
        while self._stack:
            self.visited.append(self._stack.pop())
            self.visit(*self.visited[-1])


def through(value: Value) -> Value:
    """The value behind operators that do nothing, which other tools take out: copies, and reshapes back to the sizes that were."""
    while (source := _unchanged(value)) is not None:
        value = source
    return value


def _unchanged(value: Value) -> Value | None:
    node, sizes = value.producer, value.sizes
    if node is not None and node.op == "Identity" and len(node.inputs) == 1:
        return node.inputs[0]
    if sizes is None or sizes.count(None) > 1:
        return None
    while node is not None and node.op == "Move" and len(node.inputs) == 1 and operator(node) in RESHAPING:
        if node.inputs[0].sizes == sizes:
            return node.inputs[0]
        node = node.inputs[0].producer
    return None


def comparable(p: Node, q: Node) -> bool:
    """Whether two operators are of one kind, so that they differ by their settings and coefficients at most."""
    if len(p.inputs) != len(q.inputs) or p.params.keys() != q.params.keys():
        return False
    if p.op != q.op:  # a setting may decide what it counts as
        return not {p.op, q.op} & {"Move", *SAID_BY_COEFFICIENTS} and p.label == q.label
    return p.op in SAID_BY_COEFFICIENTS or p.op == "Move" or operator(p) == operator(q)


def product_before(whole: Node, add: Node) -> Node | None:
    """The product in front of a constant affine operator, where the other model has one product in the place of both."""
    product = add.inputs[0].producer if add.inputs else None
    split = whole.op == "Contraction" and add.op == "Affine" and product is not None and product.op == "Contraction"
    return product if split else None


def _keys(graph: Graph) -> dict[Value, int]:
    """What each value is computed by, as a hash: alike in two models where their structures are."""
    keys: dict[Value, int] = {}
    for node in graph.nodes:
        inputs = [keys.setdefault(v, hash(("input", v.name))) for v in node.inputs]
        before = node.inputs[0].producer if node.inputs else None
        bias = node.op == "Affine" and node.params.keys() == {"beta"} and before is not None and before.op == "Contraction"
        if bias:  # it may be the product's own in the other model
            keys[node.output] = inputs[0]
            continue
        if len(node.outputs) == 1 and (source := through(node.output)) is not node.output:
            keys[node.output] = keys.setdefault(source, hash(("input", source.name)))
            continue
        shapes = tuple((role, param.shape) for role, param in sorted(node.params.items()))
        order = tuple(sorted(inputs) if _commutes(node) else inputs)
        for i, v in enumerate(node.outputs):
            keys[v] = hash((node.op, operator(node) if node.op == "Barrier" else "", shapes, order, i))
    return keys


def _commutes(node: Node) -> bool:
    multiples, factors = node.attrs.get("multiples", ()), node.attrs.get("factors", len(node.inputs))
    return node.op in COMMUTATIVE and len(set(multiples)) <= 1 and factors == len(node.inputs)


# --- counterparts, also where the structures differ -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A value of the reference's normal form and its counterpart. same: whether they should be equal; without, only their operators match.

    node: the operator in the reference to which a difference is laid; other: the candidate's.
    """

    reference: Value
    candidate: Value
    node: Node
    other: Node | None
    same: bool = True


def counterparts(reference: NormalForm, candidate: NormalForm) -> list[Pair]:
    """All pairs of values, in the reference's order."""
    walk = _Counterparts(reference, candidate)
    walk.run()
    found = [Pair(a, b, a.producer, b.producer, walk.equal[a, b]) for a, b in walk.visited if a.producer is not None]
    return sorted(found, key=lambda pair: pair.node.index)


class _Counterparts(Walk):
    """Goes on behind operators that don't correspond, by what folds and tools are known to make of one another."""

    def visit(self, a: Value, b: Value) -> None:
        p, q = a.producer, b.producer
        if p is None:
            return
        if q is not None and comparable(p, q):
            self.nodes[p, q] = None
            self.push_inputs(p, q)
            return
        self.trouble.append((p.index, "they don't correspond"))
        mine, theirs = _normalises(p), q is not None and _normalises(q)
        if mine and not theirs:  # folded one way or the other: one of the two pairs will agree
            self.push(p.inputs[0], b)
        elif q is None:
            return
        elif theirs and not mine:
            self.push(a, q.inputs[0], equal=False)
        elif (product := product_before(p, q)) is not None:
            self.push(a, product.output, equal=False)
        elif (product := product_before(q, p)) is not None:
            self.push(product.output, b, equal=False)
        elif (further := self._passed_over(a, b)) is not None:
            self.push(*further)
        elif len(p.inputs) == len(q.inputs) == 1 or self.read_alike(p, q):
            self.push_inputs(p, q)

    def _passed_over(self, a: Value, b: Value) -> tuple[Value, Value] | None:
        """What corresponds once operators of one side are passed over that the other lacks: alike by all that it is made of, or by kind."""
        ways = [(a, c) for c in _before(b)] + [(c, b) for c in _before(a)]
        known = [each for each in ways if self.keys.get(each[0]) == self.keys.get(each[1])]
        alike = [(x, y) for x, y in ways if x.producer is not None and y.producer is not None and comparable(x.producer, y.producer)]
        return next(iter(known + alike), None)


def _before(value: Value) -> list[Value]:
    """The values before one, as far as operators of one input without coefficients made it."""
    found: list[Value] = []
    while (node := value.producer) is not None and len(node.inputs) == 1 and not node.params and len(found) < MOST_EXTRA:
        value = through(node.inputs[0])
        found.append(value)
    return found


def _normalises(node: Node) -> bool:
    return len(node.inputs) >= 1 and ("mean" in node.attrs or node.label in NORMALISES)
