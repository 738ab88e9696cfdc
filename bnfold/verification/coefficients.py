"""Level 1 of `verify`: two models in normal form, whole: operators, settings, and coefficients in units of roundoff. No data, no run.

Both models are brought to normal form by the planner: all that can be folded is planned, in float64. Then their operators are paired
by data flow, backwards from the outputs, and each pair's settings (see `settings`) and coefficients are compared. What is set otherwise
differs; what stands in another form can't be paired, and says nothing. Rounding once errs by at most one unit roundoff u
of the number itself. Another tool's arithmetic in the stored type errs by 3.5 u for gamma/sqrt(var + eps) * W (half for the sum under the
root, and one for each of root, division and product; the model is Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., equation
2.4), and for beta - s*mean by as much of the magnitudes of the summands, which may cancel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Graph, Node, Norm, Param, Tensor, Value
from bnfold.algebra.settings import COMMUTATIVE, SAID_BY_COEFFICIENTS, Setting, differing, differing_moves, operator, place, same, settings
from bnfold.folding.plan import NormalForm
from bnfold.folding.search import Outcome
from bnfold.report import Coefficients

LIMIT = 4.0  # units of roundoff
DOUBLE_LIMIT = 2 * LIMIT  # in float64 what they are compared with is rounded as well
DOUBLE = 2.0**-53

# Where one in two coefficients of several layers is off by this much, relatively and in units of roundoff, and the outputs still agree to
# rounding, scales were moved between layers.
ANOTHER_FORM, ANOTHER_FORM_UNITS = 1e-2, 100.0

# In half precision: where nearly all channels of a weight are rounded once, it was worked out in a wider type, and so one that isn't
# stands out. (Of arithmetic in the stored type itself, a third of the channels with 9 numbers pass for that by chance, fewer with more.)
HALF = 2.0**-20
ONCE = 1.01  # units of roundoff, with what float32 arithmetic adds to them
STANDS_OUT = 1 / 16  # the share of channels
LEAST_CHANNELS, LEAST_NUMBERS = 16, 8  # of channels, and of numbers in each, that say anything about the others

STATISTICS = ("gain", "mean")  # what of a BatchNorm isn't a parameter
STATISTIC, EPSILON, UNKNOWN = "statistics", "epsilon", "something else"
FIXED = (*STATISTICS, "shift")  # likewise of any affine map


class Mismatch(NamedTuple):
    """One array that differs. units: its largest error; widespread: whether at least half of it is off by 1 % and 100 units or more;
    scaled: whether it is a weight of which most channels differ, each by a factor of its own; setting: whether it is a setting of the kind
    that would show wherever it matters."""

    node: Node
    text: str
    units: float
    widespread: bool
    scaled: bool = False
    setting: bool = False


@dataclass(frozen=True)
class Correspondence:
    """What level 1 found. unpaired: why the structures don't correspond, "" if they do; mismatches are in the reference's order.

    certified: of so many BatchNorms of the reference every coefficient was found to be right. remark: what the mismatches look like.
    unfolded: whether the candidate still has as many BatchNorms. uncertified: the names of the others. narrower: how the candidate computes
    in a narrower type, "" where it doesn't. paired: how many pairs of operators agree; left: the operators of each that have no counterpart
    of which all is known to agree; graphs: both, in normal form.
    """

    checked: int
    worst: float
    mismatches: tuple[Mismatch, ...]
    unpaired: str = ""
    certified: int = 0
    batchnorms: int = 0
    remark: str = ""
    unfolded: bool = False
    uncertified: tuple[str, ...] = ()
    narrower: str = ""
    paired: int = 0
    left: tuple[frozenset[Node], frozenset[Node]] = (frozenset(), frozenset())
    graphs: tuple[Graph, Graph] | None = None

    def report(self) -> Coefficients:
        counts = self.certified, self.batchnorms, self.uncertified
        if self.unpaired:
            more = f"; {self.certified} of {self.batchnorms} BatchNorms could be certified" if self.batchnorms else ""
            return Coefficients("skipped", self.checked, self.worst, self.unpaired + more, *counts)
        if self.mismatches:
            text = "; ".join(filter(None, (self.narrower, self.remark, self.mismatches[0].text)))
            return Coefficients("different", self.checked, self.worst, text, *counts)
        if self.narrower:
            return Coefficients("different", self.checked, self.worst, self.narrower, *counts)
        if not self.checked and not self.paired:
            return Coefficients("skipped", 0, 0.0, "no coefficients that a fold could change", *counts)
        return Coefficients("equivalent", self.checked, self.worst, "", *counts)

    @property
    def may_be_another_form(self) -> bool:
        """Whether the differences are so large that outputs which agree all the same prove another parametrisation of one function.

        That takes two layers, of which one undoes what the other does. A setting that changes nothing (how the odd element is rounded,
        where there is none) is another form as well, and so is a narrower type, which level 3 measures.
        """
        numbers = [m for m in self.mismatches if not m.setting]
        return (len({m.node for m in numbers}) > 1 or not numbers) and all(m.widespread for m in numbers)


def correspond(reference: NormalForm, candidate: NormalForm) -> Correspondence:
    """Pair the operators of two plans and compare their coefficients."""
    pairing = _Pairing(reference, candidate).run()
    pairs, unpaired = list(pairing.pairs), pairing.trouble()
    hidden = _hidden(reference.outcomes)
    checked, worst = 0, 0.0
    mismatches = [Mismatch(a, each.text, np.inf, not each.number, setting=not each.number) for a, each in pairing.settings]
    right: set[Node] = set()
    for pair in sorted(pairs, key=lambda pair: pair.reference.index):
        compared = _arrays(pair, hidden)
        if compared is None:
            continue
        a, role = pair.reference, pair.role
        want, have, magnitude, unit, tiny = compared
        checked += 1
        right.add(a)
        try:
            want, have, magnitude = np.broadcast_arrays(want, have, magnitude)
        except ValueError:
            unpaired = unpaired or f"the {role} of {a.label} {a.name} has shape {have.shape} instead of {want.shape}"
            continue
        with np.errstate(all="ignore"):
            error = np.abs(have - want)
            units = np.maximum(error - tiny, 0) / (unit * magnitude)
        same = (error <= tiny) | (want == have) | (np.isnan(want) & np.isnan(have))
        units = np.where(same, 0.0, np.where(np.isnan(units), np.inf, units))
        most = float(units.max(initial=0.0))
        worst = max(worst, most)
        limit = LIMIT if unit > DOUBLE else DOUBLE_LIMIT
        axis = _channel(a, role, units.ndim)
        alone = unit > HALF and role == "weight" and most > ONCE and _stands_out(units, axis)
        if most > limit or alone:
            place = np.atleast_1d(np.unravel_index(int(units.argmax()), units.shape or (1,)))[axis]
            text = f"the {role} of {a.label} {a.name} is off by {most:.3g} units of roundoff (channel {place})"
            text += "" if most > limit else f", where the other channels are within {ONCE:.2g}"
            large = (error <= ANOTHER_FORM * np.abs(want)) | (units <= ANOTHER_FORM_UNITS)
            scaled = role == "weight" and _scaled(want, have, units, axis, limit)
            mismatches.append(Mismatch(a, text, most, bool(np.mean(~large) >= 0.5), scaled))
    mismatches.sort(key=lambda m: m.node.index)
    right -= {m.node for m in mismatches}
    sites = [o for o in reference.outcomes if o.site.is_batchnorm]
    found = [(o.site.name, o.into if o.folded else o.site.nodes) for o in sites]
    uncertified = tuple(name for name, nodes in found if not nodes or not right.issuperset(nodes))
    remark = _remark(reference, candidate, mismatches)
    kept = sum(o.site.is_batchnorm for o in candidate.outcomes)
    certified = len(sites) - len(uncertified)
    off = {m.node for m in mismatches}
    agreeing = [(a, b) for a, b in pairing.nodes if a not in off]
    apart = [frozenset({*plan.graph.nodes} - {pair[i] for pair in agreeing}) for i, plan in enumerate((reference, candidate))]
    return Correspondence(
        checked,
        worst,
        tuple(mismatches),
        unpaired,
        certified,
        len(sites),
        remark,
        0 < len(sites) == kept,
        uncertified,
        _narrower(reference, candidate),
        len(agreeing),
        (apart[0], apart[1]),
        (reference.graph, candidate.graph),
    )


def _narrower(reference: NormalForm, candidate: NormalForm) -> str:
    (mine, _), (theirs, where) = reference.narrowest, candidate.narrowest
    if theirs >= mine:
        return ""
    return f"the candidate computes in {type_of(theirs)} ({where}), the reference in {type_of(mine)}"


def type_of(limit: float) -> str:
    """The floating-point type whose largest number it is."""
    names = {65504.0: "float16", 2.0**128 * (1 - 2.0**-8): "bfloat16", 2.0**128 * (1 - 2.0**-24): "float32"}
    return names.get(limit, "float64" if limit > 1e300 else f"a type that ends at {limit:.3g}")


def _stands_out(units: Array, axis: int) -> bool:
    """Whether a few channels are off by more than one rounding, and the others aren't."""
    by_channel = np.moveaxis(units, axis, 0).reshape(units.shape[axis], -1) if units.ndim else units.reshape(1, 1)
    channels, numbers = by_channel.shape
    off = int((by_channel.max(1, initial=0.0) > ONCE).sum())
    return channels >= LEAST_CHANNELS and numbers >= LEAST_NUMBERS and 0 < off <= STANDS_OUT * channels


def _scaled(want: Array, have: Array, units: Array, axis: int, limit: float) -> bool:
    """Whether most channels are off, each by a factor: what other statistics would make of a weight."""
    a, b, off = (np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) if x.ndim else x.reshape(1, 1) for x in (want, have, units))
    if np.mean(off.max(1, initial=0.0) > limit) < 0.5:
        return False
    with np.errstate(all="ignore"):
        factor = (a * b).sum(1, keepdims=True) / np.square(a).sum(1, keepdims=True)
        # What is left of the error once the factor is taken out, in the units in which it was measured.
        left = np.abs(b - factor * a) / np.abs(b - a) * off
    return bool(np.nan_to_num(left, nan=0.0, posinf=0.0).max(initial=0.0) <= 2 * limit)


def _remark(reference: NormalForm, candidate: NormalForm, mismatches: list[Mismatch]) -> str:
    """Whether all that differs is statistics, as a recalibration leaves them: no defect of a fold."""
    mine, theirs = ([o for o in plan.outcomes if o.site.is_batchnorm] for plan in (reference, candidate))
    if mismatches and len(mine) == len(theirs):
        moved: set[Node] = set()
        found: dict[str, list[tuple[Node, Node]]] = {}
        for a, b in zip(mine, theirs, strict=True):
            pairs = list(zip(a.site.nodes, b.site.nodes, strict=False))
            if len(a.site.nodes) != len(b.site.nodes):
                return ""
            for what in {each for p, q in pairs for each in _what_differs(p, q)}:
                found.setdefault(what, []).append(pairs[0])
                moved |= {*a.into, *a.site.nodes}
        if moved.issuperset(m.node for m in mismatches):
            return _told(found, len(mine))
        return ""
    into = {node for o in mine if o.folded for node in o.into}
    scaled = {m.node for m in mismatches if m.scaled}
    off = {m.node for m in mismatches}
    if len(scaled) > 1 and 2 * len(scaled) >= max(len(into), len(off)) and into.issuperset(off):
        return (
            f"the statistics seem to differ in {len(off)} layers, where each channel is off by a factor of its own: "
            "compare a fold with the recalibrated model that it was made of"
        )
    return ""


def _told(found: Mapping[str, list[tuple[Node, Node]]], of: int) -> str:
    """What of the BatchNorms differs, where nothing else does."""
    counted = " and ".join(f"{what}{'' if i else ' differs'} in {len(pairs)}" for i, (what, pairs) in enumerate(sorted(found.items())))
    if not found or UNKNOWN in found:
        return ""
    if found.keys() == {STATISTIC}:
        where = f"{len(found[STATISTIC])} of {of} BatchNorms"
        return f"the statistics differ in {where}, and nothing else does: a recalibration, not a defect of a fold"
    agree = "" if STATISTIC in found else ": all statistics agree"
    numbers = ""
    if EPSILON in found:
        p, q = found[EPSILON][0]
        numbers = f" ({p.attrs['norm'].epsilon:.6g} in {p.name}, {q.attrs['norm'].epsilon:.6g} in the candidate)"
    return f"{counted} of {of} BatchNorms{numbers}, and nothing else does{agree}"


def _what_differs(a: Node, b: Node) -> set[str]:
    """In what two BatchNorms differ."""
    found: set[str] = set()
    for role in ("gamma", "beta"):
        if (role in a.params) != (role in b.params):
            return {UNKNOWN}
        if role in a.params and not np.array_equal(_stored(a.params[role]), _stored(b.params[role]), equal_nan=True):
            found.add(role)
    one, other = a.attrs.get("norm"), b.attrs.get("norm")
    if not isinstance(one, Norm) or not isinstance(other, Norm):
        fixed = [np.array_equal(np.asarray(a.attrs.get(role, 0.0)), np.asarray(b.attrs.get(role, 0.0))) for role in STATISTICS]
        return found if all(fixed) else {*found, STATISTIC}
    pairs = (
        (one.gamma, other.gamma, "gamma"),
        (one.beta, other.beta, "beta"),
        (one.mean, other.mean, STATISTIC),
        (one.var, other.var, STATISTIC),
    )
    found |= {what for mine, theirs, what in pairs if not np.array_equal(mine, theirs, equal_nan=True)}
    return found | ({EPSILON} if one.epsilon != other.epsilon else set())


# --- pairing ------------------------------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """Two parameters that should be equal."""

    reference: Node
    role: str
    candidate: Node
    its_role: str


class _Pairing:
    """Which operators of two plans stand at the same place in the data flow, and how these are set.

    nodes, pairs: operators and parameters that correspond; settings: those that differ, each with its operator.
    """

    def __init__(self, reference: NormalForm, candidate: NormalForm) -> None:
        self.plans = reference, candidate
        self.keys = _keys(reference) | _keys(candidate)
        self.nodes: dict[tuple[Node, Node], None] = {}
        self.pairs: dict[_Pair, None] = {}
        self.settings: list[tuple[Node, Setting]] = []
        self._trouble: list[tuple[int, str]] = []
        self._stack: list[tuple[Value, Value]] = []
        self._seen: set[tuple[Value, Value]] = set()
        self._alike: set[tuple[Value, Value]] = set()  # inputs of the graphs that operators hold

    def run(self) -> _Pairing:
        """Backwards from the outputs; where the structures part, what is computed alike from the inputs is paired again."""
        one, other = self.plans
        for name in dict.fromkeys((*one.outputs, *other.outputs)):
            if name in one.outputs and name in other.outputs:
                self._stack.append((one.outputs[name], other.outputs[name]))
            else:
                self._part(-1, f"output {name} depends on the inputs in one of the models alone")
        for name in dict.fromkeys((*one.constants, *other.constants)):
            if name not in one.constants or name not in other.constants:
                self._part(-1, f"{name} is a constant in one of the models alone")
            elif not same(one.constants[name], other.constants[name]):
                self._part(-1, f"{name} is another constant in the candidate")
        self._walk()
        if self._trouble:
            self._again()
        return self

    def trouble(self) -> str:
        """The first reason why something has no counterpart, "" where all has."""
        return min(self._trouble, default=(0, ""))[1]

    def _part(self, index: int, why: str) -> None:
        self._trouble.append((index, why))

    def _again(self) -> None:
        done = {a for a, _ in self.nodes}, {b for _, b in self.nodes}
        made = [
            [v for node in plan.graph.nodes if node not in each for v in node.outputs] for plan, each in zip(self.plans, done, strict=True)
        ]
        counts = [Counter(self.keys[v] for v in values) for values in made]
        at = {self.keys[v]: v for v in made[1]}
        for v in reversed(made[0]):
            key = self.keys[v]
            if counts[0][key] == counts[1][key] == 1:
                self._stack.append((v, at[key]))
        self._walk()

    def _walk(self) -> None:
        while self._stack:
            a, b = (through(v) for v in self._stack.pop())
            if (a, b) in self._seen:
                continue
            self._seen.add((a, b))
            p, q = a.producer, b.producer
            if p is None or q is None:
                fed = a in self.plans[0].inputs and b in self.plans[1].inputs and a.name == b.name
                if p is not q or not (fed or (a, b) in self._alike or (a.fixed and b.fixed)):  # what is fixed its users state
                    node = p if p is not None else next((user for user, _ in a.users), None)
                    where = f"{node.label} {node.name}" if node is not None else f"input {a.name}"
                    if p is None and a not in self.plans[0].inputs:
                        where = f"{a.name}, which comes from an operator's second output,"
                    self._part(node.index if node is not None else 0, f"{where} has no counterpart in the candidate")
                continue
            if (parted := _parted(p, q)) is not None:
                self.pairs |= dict.fromkeys(parted)
                self.nodes |= {(pair.reference, pair.candidate): None for pair in parted}
                self._stack.extend(zip(parted[0].reference.inputs, parted[0].candidate.inputs, strict=True))
                continue
            if not _comparable(p, q):
                self._part(p.index, f"{p.label} {p.name} stands where the candidate has {q.label} {q.name}")
                continue
            self._compare(a, b, p, q)

    def _compare(self, a: Value, b: Value, p: Node, q: Node) -> None:
        """Two operators of one kind."""
        if (p, q) not in self.nodes:
            found, unread = differing_moves(p, q) if p.op == "Move" else differing(p, q)
            if p.op == "Contraction" and _letters(p, q) is None:
                found = [Setting(f"{p.label} {p.name} multiplies along other axes than the candidate's {q.label} {q.name}", number=False)]
            if p.op != "Move" or (unread and differing(p, q) == ([], "")):
                flows = settings(p).flows, settings(q).flows
                self._stack += [(self._end(0, v), self._end(1, flows[1][name])) for name, v in flows[0].items() if name in flows[1]]
                unread = "" if p.op == "Move" and flows[0] else unread
            if unread:
                self._part(p.index, unread)
            else:
                self.nodes[p, q] = None
            self.settings += [(p, each) for each in found]
            fixed = [role for role in FIXED if np.ndim(p.attrs.get(role, 0)) or p.attrs.get(role) != q.attrs.get(role)]
            self.pairs |= dict.fromkeys(_Pair(p, role, q, role) for role in (*p.params, *fixed))
        if p.op != "Move" and len(p.outputs) + len(q.outputs) > 2 and place(a, p) != place(b, q):
            self._part(p.index, f"output {place(a, p)} of {p.label} {p.name} stands where the candidate has its output {place(b, q)}")
        self._stack.extend(zip(p.inputs, _ordered(p, q, self.keys), strict=True))
        if p.op == "Barrier":
            self._inside(p, q)

    def _inside(self, p: Node, q: Node) -> None:
        """What the graphs compute that two operators hold, and whose sizes they give."""
        one, other = settings(p), settings(q)
        if (one.shape_of is None) != (other.shape_of is None):
            self._part(p.index, f"{p.label} {p.name} gives the sizes of a constant in one of the models alone")
        elif one.shape_of is not None and other.shape_of is not None and not _same_sizes(one.shape_of, other.shape_of):
            self._stack.append((_as_large(self._end(0, one.shape_of)), _as_large(self._end(1, other.shape_of))))
        if [(body.name, len(body.inputs), len(body.outputs)) for body in one.bodies] != [
            (body.name, len(body.inputs), len(body.outputs)) for body in other.bodies
        ]:
            self._part(p.index, f"{p.label} {p.name} holds other graphs than the candidate's")
            return
        for mine, theirs in zip(one.bodies, other.bodies, strict=True):
            self._alike |= set(zip(mine.inputs, theirs.inputs, strict=True))
            for x, y in zip(mine.outputs, theirs.outputs, strict=True):
                if isinstance(x, Value) and isinstance(y, Value):
                    self._stack.append((self._end(0, x), self._end(1, y)))
                elif isinstance(x, Value) or isinstance(y, Value):
                    self._part(p.index, f"what {mine.name} of {p.label} {p.name} gives is a constant in one of the models alone")
                elif not same(x, y):
                    self.settings.append((p, Setting(f"what {mine.name} of {p.label} {p.name} gives is another constant", number=False)))

    def _end(self, side: int, value: Value) -> Value:
        graph = self.plans[side].graph
        return graph.end(value, set(graph.nodes))


def _comparable(p: Node, q: Node) -> bool:
    if len(p.inputs) != len(q.inputs) or p.params.keys() != q.params.keys():
        return False
    if p.op != q.op:  # a setting may decide what it counts as
        return not {p.op, q.op} & {"Move", *SAID_BY_COEFFICIENTS} and p.label == q.label
    return p.op in SAID_BY_COEFFICIENTS or p.op == "Move" or operator(p) == operator(q)


def _letters(p: Node, q: Node) -> tuple[int, ...] | None:
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


def _parted(p: Node, q: Node) -> tuple[_Pair, _Pair] | None:
    """A product with a bias on one side, a product and an Add behind it on the other: weights and shifts correspond."""
    for whole, add in ((p, q), (q, p)):
        product = add.inputs[0].producer if add.inputs else None
        if whole.op != "Contraction" or add.op != "Affine" or add.params.keys() != {"beta"} or "mean" in add.attrs or product is None:
            continue
        if product.op != "Contraction" or len(product.inputs) != len(whole.inputs) or _has(product, "bias"):
            continue
        if whole is p:
            return _Pair(whole, "weight", product, "weight"), _Pair(whole, "bias", add, "beta")
        return _Pair(product, "weight", whole, "weight"), _Pair(add, "beta", whole, "bias")
    return None


def _has(node: Node, role: str) -> bool:
    param = node.params.get(role)
    return param is not None and (param.tensor is not None or param.update is not None)


def through(value: Value) -> Value:
    """The value behind operators that do nothing, which other tools take out."""
    while value.producer is not None and value.producer.op == "Identity" and len(value.producer.inputs) == 1:
        value = value.producer.inputs[0]
    return value


def _keys(plan: NormalForm) -> dict[Value, int]:
    """What each value is computed by, as a hash: alike in two models where their structures are."""
    keys: dict[Value, int] = {}
    for node in plan.graph.nodes:
        inputs = [keys.setdefault(v, hash(("input", v.name))) for v in node.inputs]
        if node.op == "Identity" and len(inputs) == 1:
            keys[node.output] = inputs[0]
            continue
        before = node.inputs[0].producer if node.inputs else None
        if node.op == "Affine" and node.params.keys() == {"beta"} and before is not None and before.op == "Contraction":
            keys[node.output] = inputs[0]  # the product's bias, in other words
            continue
        shapes = tuple((role, param.shape) for role, param in sorted(node.params.items()))
        order = tuple(sorted(inputs) if _commutes(node) else inputs)
        for i, v in enumerate(node.outputs):
            keys[v] = hash((node.op, operator(node) if node.op == "Barrier" else "", shapes, order, i))
    return keys


def _commutes(node: Node) -> bool:
    signs, factors = node.attrs.get("signs", ()), node.attrs.get("factors", len(node.inputs))
    return node.op in COMMUTATIVE and len(set(signs)) <= 1 and factors == len(node.inputs)


def _ordered(p: Node, q: Node, keys: dict[Value, int]) -> list[Value]:
    """The inputs of q in the order of their counterparts among the inputs of p."""
    if not _commutes(p) or all(keys.get(a) == keys.get(b) for a, b in zip(p.inputs, q.inputs, strict=True)):
        return q.inputs
    left, order = list(q.inputs), []
    for a in p.inputs:
        found = next((v for v in left if keys.get(v) == keys.get(a)), None) or next((v for v in left if v.name == a.name), left[0])
        left.remove(found)
        order.append(found)
    return order


# --- coefficients -------------------------------------------------------------------------------------------------------------

_Compared = tuple[Array, Array, Array, float, float]  # reference, candidate, magnitude, unit roundoff, half the smallest number


def _arrays(pair: _Pair, hidden: dict[Node, list[Array]]) -> _Compared | None:
    """What a pair compares; None where neither side has such a parameter."""
    a, role, b, its_role = pair
    if role in FIXED:
        want, have = (np.asarray(node.attrs.get(role, role == "gain"), np.float64) for node in (a, b))
        limit = next(_limits(_tensors((b, a))), a.attrs.get("limit", np.finfo(np.float32).max))
        return want, have, np.abs(want), *precision(float(limit))
    param, other = a.params[role], b.params[its_role]
    if not _has(a, role) and not _has(b, its_role):
        return None
    limit = next(_limits((other.tensor, param.tensor, *_tensors((a, b)))))
    have, summands = other.read(), _magnitude(other)
    order = _letters(a, b) if a.op == b.op == "Contraction" and role == its_role == "weight" else None
    if order is not None:
        have, summands = have.transpose(order), summands.transpose(order)
    magnitude = np.maximum(*_broadcast(_magnitude(param), summands))
    if role != "weight":
        for more in hidden.get(a, ()):
            magnitude = magnitude + (more.reshape(magnitude.shape) if more.size == magnitude.size else more.max())
    return param.read(), have, magnitude, *precision(limit)


def _limits(tensors: Iterable[Tensor | None]) -> Iterator[float]:
    """The largest numbers of the types in which tensors were rounded."""
    return (t.limit if t.cast_from is None else t.cast_from for t in tensors if t is not None)


def _tensors(nodes: Iterable[Node]) -> Iterator[Tensor | None]:
    return (param.tensor for node in nodes for param in node.params.values())


def _broadcast(x: Array, y: Array) -> tuple[Array, Array]:
    try:
        return np.broadcast_arrays(x, y)  # type: ignore[return-value]
    except ValueError:
        return x, x


def _magnitude(param: Param) -> Array:
    """What a coefficient's summands amount to: |S*w| + |T| for the update (S, T) of a stored w."""
    stored = np.abs(_stored(param))
    return stored if param.update is None else np.abs(param.update.scale) * stored + np.abs(param.update.shift)


def _stored(param: Param) -> Array:
    return np.full(param.shape, param.default) if param.tensor is None else param.layout.canonical(param.tensor.read())


def _hidden(outcomes: Iterable[Outcome]) -> dict[Node, list[Array]]:
    """Summands that the planned shifts no longer show: |beta| + |s*mean|, and what a weight makes of them, for each site that went in."""
    found: dict[Node, list[Array]] = {}
    for outcome in outcomes:
        for site_node in outcome.site.nodes if outcome.folded else ():
            if "mean" not in site_node.attrs:
                continue
            own = coefficients(site_node)
            summands = np.abs(own.shift) + 2 * np.abs(own.scale * np.asarray(site_node.attrs["mean"]))
            for node in outcome.into:
                weight = node.params.get("weight")
                if site_node.index < node.index and weight is not None:  # it went down, into W*t
                    found.setdefault(node, []).append(summands.max() * _row_sums(node, weight))
                else:
                    found.setdefault(node, []).append(summands)
    return found


def _row_sums(node: Node, weight: Param) -> Array:
    """The sum of |W| over all that one output reads, the largest of all outputs."""
    array = np.abs(_stored(weight))
    w, y = node.attrs.get("w"), node.attrs.get("y")
    summed = tuple(i for i, name in enumerate(w) if name not in y) if w and y else tuple(range(1, array.ndim))
    return np.asarray(array.sum(axis=summed).max(initial=0.0))


def precision(limit: float) -> tuple[float, float]:
    """Unit roundoff and half the smallest positive number of the IEEE type whose largest number is (2 - 2**(1 - p)) * 2**emax."""
    fraction, exponent = np.frexp(limit)
    unit = 1.0 - float(fraction)  # 2**-p
    return unit, float(np.ldexp(unit, 2 - int(exponent)))


def _channel(node: Node, role: str, rank: int) -> int:
    """The axis of a parameter along which its output channels lie."""
    if not rank:
        return 0
    w, y = node.attrs.get("w"), node.attrs.get("y")
    if role == "weight" and w and y:
        return next((i for i, name in reversed(list(enumerate(w))) if name in y), 0)
    return 1 if node.op == "Affine" and rank > 1 else 0 if role == "weight" or node.op == "Conv" else rank - 1
