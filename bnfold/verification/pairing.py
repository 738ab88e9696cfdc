"""Which values of two models correspond: by the data flow of their normal forms, whatever the values are called.

Backwards from the outputs, operator by operator; where the structures part, the values above are found again by what computes them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from bnfold.algebra.graph import Node, Value
from bnfold.algebra.settings import COMMUTATIVE, operator

from .coefficients import through
from .normal_form import Normal

NORMALISES = {"BatchNormalization", "batch_norm", "_batch_norm_with_update", "_native_batch_norm_legit", "native_batch_norm"}


FURTHEST = 4  # operators that one side may have more, in a row


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


def pairs(reference: Normal, candidate: Normal) -> list[Pair]:
    """All pairs, in the reference's order."""
    found = _Pairing(reference, candidate).run()
    return sorted(found, key=lambda pair: pair.node.index)


class _Pairing:
    def __init__(self, reference: Normal, candidate: Normal) -> None:
        self.sides = reference, candidate
        self.keys = _keys(reference) | _keys(candidate)
        self.found: dict[tuple[Value, Value], Pair] = {}
        self.stack: list[tuple[Value, Value, bool]] = []

    def run(self) -> list[Pair]:
        one, other = self.sides
        self.stack = [(v, other.outputs[name], True) for name, v in one.outputs.items() if name in other.outputs]
        self._walk()
        taken = {a for a, _ in self.found}
        mine, theirs = (Counter(self.keys[v] for v in _made(side)) for side in self.sides)
        place, useful = {self.keys[v]: v for v in _made(other)}, _useful(one)
        for v in reversed(_made(one)):
            key = self.keys[v]
            if v in useful and v not in taken and mine[key] == theirs[key] == 1:
                self.stack.append((v, place[key], True))
                self._walk()
                taken = {a for a, _ in self.found}
        return list(self.found.values())

    def _walk(self) -> None:
        while self.stack:
            a, b, same = self.stack.pop()
            a, b = through(a), through(b)
            p, q = a.producer, b.producer
            if ((a, b) in self.found and (self.found[a, b].same or not same)) or p is None:
                continue
            self.found[a, b] = Pair(a, b, p, q, same)
            if q is None:
                if _normalises(p):  # folded into what comes behind
                    self.stack.append((p.inputs[0], b, True))
                continue
            if _alike(p, q):
                self.stack.extend((x, y, True) for x, y in zip(p.inputs, self._ordered(p, q), strict=True))
            elif _normalises(p) and not _normalises(q):  # folded one way or the other: one of the two pairs will agree
                self.stack.append((p.inputs[0], b, True))
            elif _normalises(q) and not _normalises(p):
                self.stack.append((a, q.inputs[0], False))
            elif (product := _product(p, q)) is not None:
                self.stack.append((*product, False))
            elif (further := self._one_more(a, b)) is not None:
                self.stack.append((*further, True))
            elif len(p.inputs) == len(q.inputs) == 1 or self._same_inputs(p, q):
                self.stack.extend((x, y, True) for x, y in zip(p.inputs, self._ordered(p, q), strict=True))

    def _one_more(self, a: Value, b: Value) -> tuple[Value, Value] | None:
        """What corresponds once operators of one side are passed over that the other lacks: alike by all that it is made of, or by kind."""
        ways = [(a, c) for c in _before(b)] + [(c, b) for c in _before(a)]
        known = [each for each in ways if self.keys.get(each[0]) == self.keys.get(each[1])]
        alike = [(x, y) for x, y in ways if x.producer is not None and y.producer is not None and _alike(x.producer, y.producer)]
        return next(iter(known + alike), None)

    def _same_inputs(self, p: Node, q: Node) -> bool:
        return [self.keys.get(v) for v in p.inputs] == [self.keys.get(v) for v in q.inputs]

    def _ordered(self, p: Node, q: Node) -> list[Value]:
        """The inputs of q in the order of their counterparts among those of p."""
        if p.op not in COMMUTATIVE or len(set(p.attrs.get("signs", (1,)))) > 1 or self._same_inputs(p, q):
            return q.inputs
        left, order = list(q.inputs), []
        for a in p.inputs:
            found = next((v for v in left if self.keys.get(v) == self.keys.get(a)), None)
            found = found or next((v for v in left if v.name == a.name), left[0])
            left.remove(found)
            order.append(found)
        return order


def _before(value: Value) -> list[Value]:
    """The values before one, as far as operators of one input without coefficients made it."""
    found: list[Value] = []
    while (node := value.producer) is not None and len(node.inputs) == 1 and not node.params and len(found) < FURTHEST:
        value = through(node.inputs[0])
        found.append(value)
    return found


def _alike(p: Node, q: Node) -> bool:
    named = p.op != "Barrier" or operator(p) == operator(q)
    return p.op == q.op and named and len(p.inputs) == len(q.inputs) and p.params.keys() == q.params.keys()


def _normalises(node: Node) -> bool:
    return len(node.inputs) >= 1 and ("mean" in node.attrs or node.label in NORMALISES)


def _product(p: Node, q: Node) -> tuple[Value, Value] | None:
    """A product with a bias on one side, a product and an Add behind it on the other: what goes on with the product alone."""
    for whole, add in ((p, q), (q, p)):
        before = add.inputs[0].producer if add.inputs else None
        if whole.op == "Contraction" and add.op == "Affine" and before is not None and before.op == "Contraction":
            return (p.output, add.inputs[0]) if whole is p else (add.inputs[0], q.output)
    return None


def _made(side: Normal) -> list[Value]:
    return [v for node in side.graph.nodes for v in node.outputs]


def _useful(side: Normal) -> set[Value]:
    """What the outputs depend on."""
    found, stack = set(side.outputs.values()), list(side.outputs.values())
    while stack:
        node = stack.pop().producer
        for v in node.inputs if node is not None else ():
            if v not in found:
                found.add(v)
                stack.append(v)
    return found


def _keys(side: Normal) -> dict[Value, int]:
    """What each value is computed by, as a hash: alike in two models where their structures are."""
    keys: dict[Value, int] = {}
    for node in side.graph.nodes:
        inputs = [keys.setdefault(v, hash(("input", v.name))) for v in node.inputs]
        shapes = tuple((role, param.shape) for role, param in sorted(node.params.items()))
        order = tuple(sorted(inputs) if node.op in COMMUTATIVE else inputs)
        label = operator(node) if node.op == "Barrier" else ""
        for i, v in enumerate(node.outputs):
            keys[v] = inputs[0] if node.op == "Identity" and len(inputs) == 1 else hash((node.op, label, shapes, order, i))
    return keys
