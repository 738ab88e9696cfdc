"""Level 1 of `verify`, first half: which operators of two plans correspond, and how these are set.

What is set otherwise differs; what stands in another form has no counterpart, and says nothing. Affine operators in a row are held against
others in a row that may be of other kinds: a BatchNorm against a Mul and an Add, say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Affine, Array
from bnfold.algebra.graph import Graph, Node, Value, Window
from bnfold.algebra.settings import Setting, differing, differing_moves, place, same, settings
from bnfold.folding.plan import NormalForm

from .pairing import Walk, comparable, product_before, through

STATISTICS = ("gain", "mean")  # what of a BatchNorm isn't a parameter
FIXED = (*STATISTICS, "shift")  # likewise of any affine map


class ParameterPair(NamedTuple):
    """Two parameters that should be equal."""

    reference: Node
    role: str
    candidate: Node
    its_role: str


class Structure(Walk):
    """Both plans' operators side by side. parameters: to be compared; chains: the same of affine operators in a row, in other words;
    settings: those that differ, each with its operator; idle: the operators that do nothing, and that the other side hasn't.
    """

    def __init__(self, reference: NormalForm, candidate: NormalForm) -> None:
        super().__init__(reference, candidate)
        self._left = set(reference.graph.nodes), set(candidate.graph.nodes)
        self.parameters: dict[ParameterPair, None] = {}
        self.chains: list[tuple[AffineChain, AffineChain]] = []
        self.settings: list[tuple[Node, Setting]] = []
        self.idle: set[Node] = set()
        self._alike: set[tuple[Value, Value]] = set()  # inputs of the graphs that operators hold
        for name in {*reference.outputs} ^ {*candidate.outputs}:
            self.trouble.append((-1, f"output {name} depends on the inputs in one of the models alone"))
        for name in {*reference.constants, *candidate.constants}:
            if name not in reference.constants or name not in candidate.constants:
                self.trouble.append((-1, f"{name} is a constant in one of the models alone"))
            elif not same(reference.constants[name], candidate.constants[name]):
                self.trouble.append((-1, f"{name} is another constant in the candidate"))
        self.run()

    @property
    def unpaired(self) -> str:
        """The first reason why something has no counterpart, "" where all has."""
        return min(self.trouble, default=(0, ""))[1]

    def visit(self, a: Value, b: Value) -> None:
        p, q = a.producer, b.producer
        if p is None or q is None:
            self._at_an_end(a, b)
        elif not self._split(p, q):
            if comparable(p, q):
                self._compare(a, b, p, q)
            elif (node := next((node for node in (p, q) if _does_nothing(node)), None)) is not None:
                self.idle.add(node)
                self.push(*(node.inputs[0] if value.producer is node else value for value in (a, b)))
            elif (found := _chains(a, b)) is not None:
                one, other = found
                self.chains.append((one, other))
                self.nodes |= {(mine, theirs): None for mine in one.nodes for theirs in other.nodes}
                self.push(one.source, other.source)
            else:
                self.trouble.append((p.index, f"{p.label} {p.name} stands where the candidate has {q.label} {q.name}"))

    def _at_an_end(self, a: Value, b: Value) -> None:
        """Where one of two values comes from no operator."""
        p, given = a.producer, a in self.plans[0].inputs
        fed = given and b in self.plans[1].inputs and a.name == b.name
        if p is b.producer and (fed or (a, b) in self._alike or (a.fixed and b.fixed)):  # what is fixed its users state
            return
        node = p if p is not None else next((user for user, _ in a.users), None)
        where = f"{node.label} {node.name}" if node is not None else f"input {a.name}"
        if p is None and not given:
            where = f"{a.name}, which comes from an operator's second output,"
        self.trouble.append((node.index if node is not None else 0, f"{where} has no counterpart in the candidate"))

    def _split(self, p: Node, q: Node) -> bool:
        """A product with a bias on one side, a product and an Add behind it on the other: weights and shifts correspond."""
        for whole, add in ((p, q), (q, p)):
            product = product_before(whole, add)
            if product is None or add.params.keys() != {"beta"} or "mean" in add.attrs:
                continue
            if len(product.inputs) != len(whole.inputs) or has(product, "bias"):
                continue
            found = [ParameterPair(whole, "weight", product, "weight"), ParameterPair(whole, "bias", add, "beta")]
            if whole is q:
                found = [ParameterPair(b, its_role, a, role) for a, role, b, its_role in found]
            self.parameters |= dict.fromkeys(found)
            self.nodes |= {(each.reference, each.candidate): None for each in found}
            for a, b in zip(found[0].reference.inputs, found[0].candidate.inputs, strict=True):
                self.push(a, b)
            return True
        return False

    def _compare(self, a: Value, b: Value, p: Node, q: Node) -> None:
        """Two operators of one kind."""
        if (p, q) not in self.nodes:
            found, unread = differing_moves(p, q) if p.op == "Move" else differing(p, q)
            if p.op == "Contraction" and order_of_axes(p, q) is None:
                found = [Setting(f"{p.label} {p.name} multiplies along other axes than the candidate's {q.label} {q.name}", number=False)]
            if p.op != "Move" or (unread and differing(p, q) == ([], "")):
                mine, theirs = settings(p).flows, settings(q).flows
                for name in mine:
                    if name in theirs:
                        self.push(self._last(0, mine[name]), self._last(1, theirs[name]))
                unread = "" if p.op == "Move" and mine else unread
            if unread:
                self.trouble.append((p.index, unread))
            else:
                self.nodes[p, q] = None
            self.settings += [(p, each) for each in found]
            fixed = [role for role in FIXED if np.ndim(p.attrs.get(role, 0)) or p.attrs.get(role) != q.attrs.get(role)]
            self.parameters |= dict.fromkeys(ParameterPair(p, role, q, role) for role in (*p.params, *fixed))
        if p.op != "Move" and len(p.outputs) + len(q.outputs) > 2 and place(a, p) != place(b, q):
            text = f"output {place(a, p)} of {p.label} {p.name} stands where the candidate has its output {place(b, q)}"
            self.trouble.append((p.index, text))
        self.push_inputs(p, q)
        if p.op == "Barrier":
            self._inside(p, q)

    def _inside(self, p: Node, q: Node) -> None:
        """What the graphs compute that two operators hold, and whose sizes they give."""
        one, other, name = settings(p), settings(q), f"{p.label} {p.name}"
        if one.shape_of is not None and other.shape_of is not None:
            if not _same_sizes(one.shape_of, other.shape_of):
                self.push(_as_large(self._last(0, one.shape_of)), _as_large(self._last(1, other.shape_of)))
        elif one.shape_of is not other.shape_of:
            self.trouble.append((p.index, f"{name} gives the sizes of a constant in one of the models alone"))
        shapes = [[(body.name, len(body.inputs), len(body.outputs)) for body in each.bodies] for each in (one, other)]
        if shapes[0] != shapes[1]:
            self.trouble.append((p.index, f"{name} holds other graphs than the candidate's"))
            return
        for mine, theirs in zip(one.bodies, other.bodies, strict=True):
            self._alike |= set(zip(mine.inputs, theirs.inputs, strict=True))
            for x, y in zip(mine.outputs, theirs.outputs, strict=True):
                if isinstance(x, Value) and isinstance(y, Value):
                    self.push(self._last(0, x), self._last(1, y))
                elif isinstance(x, Value) or isinstance(y, Value):
                    self.trouble.append((p.index, f"what {mine.name} of {name} gives is a constant in one of the models alone"))
                elif not same(x, y):
                    self.settings.append((p, Setting(f"what {mine.name} of {name} gives is another constant", number=False)))

    def _last(self, side: int, value: Value) -> Value:
        """What stands for a value that is no operator's input, where what made it is planned away."""
        return Graph.end(value, self._left[side])


def order_of_axes(p: Node, q: Node) -> tuple[int, ...] | None:
    """How the axes of q's weight must stand to lie as p's do; None where the two multiply along different axes."""
    one, other = p.attrs, q.attrs
    if any(len(one[key]) != len(other[key]) for key in "xyw"):
        return None
    named: dict[str, str] = {}
    for key in "yx":
        for mine, theirs in zip(one[key], other[key], strict=True):
            if named.setdefault(theirs, mine) != mine:
                return None
    w = [named.get(name, "") for name in other["w"]]
    return tuple(w.index(name) for name in one["w"]) if sorted(w) == sorted(one["w"]) else None


def has(node: Node, role: str) -> bool:
    """Whether an operator has a parameter that it could have."""
    param = node.params.get(role)
    return param is not None and (param.tensor is not None or param.update is not None)


def _chains(a: Value, b: Value) -> tuple[AffineChain, AffineChain] | None:
    """The affine operators in a row that make two values, if they correspond. What is the product's own bias in one model is no part."""
    if (mine := chain(a)) is None or (its := chain(b)) is None:
        return None
    one, other = chain(a, _bias_of(its.source.producer, mine)), chain(b, _bias_of(mine.source.producer, its))
    return (one, other) if one is not None and other is not None and one.resembles(other) else None


def _bias_of(whole: Node | None, found: AffineChain) -> Node | None:
    """The first operator in a row, where it adds what a product in the other model has as its bias."""
    add = found.nodes[-1]
    product = None if whole is None else product_before(whole, add)
    return add if product is not None and add.params.keys() == {"beta"} and not has(product, "bias") else None


def _does_nothing(node: Node) -> bool:
    """Whether an operator is an affine map that gives what it is given."""
    if node.op != "Affine" or len(node.inputs) != 1 or (sizes := node.output.sizes) is None:
        return False
    return node.inputs[0].sizes == sizes and coefficients(node).is_identity


def _same_sizes(a: Value, b: Value) -> bool:
    """Whether two values have the same sizes, whatever goes in."""
    return a.sizes is not None and None not in a.sizes and a.sizes == b.sizes


def _as_large(value: Value) -> Value:
    """The first value on the way to one that surely has its sizes."""
    while (node := value.producer) is not None and node.op in ("Identity", "Affine", "Relu"):
        if node.inputs[0].probes is None or node.inputs[0].probes != node.output.probes:
            break
        value = node.inputs[0]
    return value


class AffineChain(NamedTuple):
    """What stands between two values. nodes: from the back. Their map is read when it is asked for, since their parameters may change."""

    nodes: tuple[Node, ...]
    source: Value

    def read(self) -> tuple[Affine, Array]:
        """Their map, and the magnitudes of what its shift is made of."""
        total, summands = Affine(np.ones(()), np.zeros(())), np.zeros(())
        for node in self.nodes:
            own = _map(node)
            assert own is not None
            centred = np.abs(own.scale * np.asarray(node.attrs.get("mean", 0.0)))
            summands = summands + np.abs(total.scale) * (np.abs(own.shift) + 2 * centred)
            total = own if node is self.nodes[0] else total.after(own)
        return total, summands

    def resembles(self, other: AffineChain) -> bool:
        """Whether at least half of the scales are within 1 % of another's. Otherwise a scale went elsewhere, and the two are no pair."""
        mine, theirs = np.broadcast_arrays(*(each.read()[0].scale for each in (self, other)))
        return bool((np.abs(theirs - mine) <= 0.01 * np.abs(mine)).mean() >= 0.5)


def chain(value: Value, behind: Node | None = None) -> AffineChain | None:
    """The affine operators that make a value, as many as stand in a row, those behind a node if one is given; None where there is none."""
    value = through(value)
    nodes: list[Node] = []
    while (node := value.producer) is not None and node is not behind and len(node.inputs) == 1 and _map(node) is not None:
        nodes.append(node)
        value = through(node.inputs[0])
    return AffineChain(tuple(nodes), value) if nodes else None


def _map(node: Node) -> Affine | None:
    """The map of an affine operator, or of a convolution that has one tap for each channel and nothing else."""
    if node.output.rank is None or node.inputs[0].rank != node.output.rank:
        return None
    if node.op == "Affine":
        return coefficients(node)
    window = node.attrs.get("window")
    if node.op != "Conv" or not isinstance(window, Window) or any(window.before) or any(window.after) or {*window.stride} != {1}:
        return None
    weight = node.params["weight"]
    channels, *others = weight.shape
    if set(others) != {1} or node.attrs["groups"] != channels:
        return None
    ones = (1,) * len(window.stride)
    return Affine(weight.read().reshape(1, channels, *ones), node.params["bias"].read().reshape(1, channels, *ones))


def coefficients_of(one: AffineChain, other: AffineChain) -> Iterator[tuple[str, Array, Array, Array]]:
    """Scale and shift of both, each with the magnitude of what it is made of."""
    (mine, summands), (its, its_summands) = one.read(), other.read()
    for role, a, b in (("scale", mine.scale, its.scale), ("shift", mine.shift, its.shift)):
        size = np.abs(a) if role == "scale" else np.maximum(summands, its_summands)
        want, have, magnitude = np.broadcast_arrays(a, b, size)
        yield role, want, have, magnitude
