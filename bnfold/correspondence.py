"""Level 1 of `verify`: every coefficient of two models in normal form, in units of roundoff of the stored type. No data, no run.

Both models are brought to normal form by the planner: all that can be folded is planned, in float64. Then their operators are paired
by data flow, backwards from the outputs, and each pair's coefficients are compared. Rounding once errs by at most one unit roundoff u
of the number itself. Another tool's arithmetic in the stored type errs by 3.5 u for gamma/sqrt(var + eps) * W (half for the sum under the
root, and one for each of root, division and product; the model is Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., equation
2.4), and for beta - s*mean by as much of the magnitudes of the summands, which may cancel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .absorbing import coefficients
from .affine import Array
from .fold import Outcome
from .graph import Node, Param, Tensor, Value
from .report import Coefficients
from .subject import Plan

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
COMMUTATIVE = {"Add", "Mul", "Mean", "Maximum"}


class Mismatch(NamedTuple):
    """One array that differs. units: its largest error; widespread: whether at least half of it is off by 1 % and 100 units or more;
    scaled: whether it is a weight of which most channels differ, each by a factor of its own."""

    node: Node
    text: str
    units: float
    widespread: bool
    scaled: bool = False


@dataclass(frozen=True)
class Correspondence:
    """What level 1 found. unpaired: why the structures don't correspond, "" if they do; mismatches are in the reference's order.

    certified: of so many BatchNorms of the reference every coefficient was found to be right. remark: what the mismatches look like.
    unfolded: whether the candidate still has as many BatchNorms. uncertified: the names of the others.
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

    def report(self) -> Coefficients:
        counts = self.certified, self.batchnorms, self.uncertified
        if self.unpaired:
            more = f"; {self.certified} of {self.batchnorms} BatchNorms could be certified" if self.batchnorms else ""
            return Coefficients("skipped", self.checked, self.worst, self.unpaired + more, *counts)
        if self.mismatches:
            text = "; ".join(filter(None, (self.remark, self.mismatches[0].text)))
            return Coefficients("different", self.checked, self.worst, text, *counts)
        if not self.checked:
            return Coefficients("skipped", 0, 0.0, "no coefficients that a fold could change", *counts)
        return Coefficients("equivalent", self.checked, self.worst, "", *counts)

    @property
    def may_be_another_form(self) -> bool:
        """Whether the differences are so large that outputs which agree all the same prove another parametrisation of one function.

        That takes two layers, of which one undoes what the other does.
        """
        return len({m.node for m in self.mismatches}) > 1 and all(m.widespread for m in self.mismatches)


def correspond(reference: Plan, candidate: Plan) -> Correspondence:
    """Pair the operators of two plans and compare their coefficients."""
    pairs, unpaired = _paired(reference, candidate)
    hidden = _hidden(reference.outcomes)
    checked, worst = 0, 0.0
    mismatches = []
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
    right -= {m.node for m in mismatches}
    sites = [o for o in reference.outcomes if o.site.is_batchnorm]
    found = [(o.site.name, o.into if o.folded else o.site.nodes) for o in sites]
    uncertified = tuple(name for name, nodes in found if not nodes or not right.issuperset(nodes))
    remark = _remark(reference, candidate, mismatches)
    left = sum(o.site.is_batchnorm for o in candidate.outcomes)
    certified = len(sites) - len(uncertified)
    return Correspondence(checked, worst, tuple(mismatches), unpaired, certified, len(sites), remark, 0 < len(sites) == left, uncertified)


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


def _remark(reference: Plan, candidate: Plan, mismatches: list[Mismatch]) -> str:
    """Whether all that differs is statistics, as a recalibration leaves them: no defect of a fold."""
    mine, theirs = ([o for o in plan.outcomes if o.site.is_batchnorm] for plan in (reference, candidate))
    if mismatches and len(mine) == len(theirs):
        moved: set[Node] = set()
        layers = 0
        for a, b in zip(mine, theirs, strict=True):
            found = [_statistics_differ(p, q) for p, q in zip(a.site.nodes, b.site.nodes, strict=False)]
            if None in found or len(a.site.nodes) != len(b.site.nodes):
                return ""
            if any(found):
                layers += 1
                moved |= {*a.into, *a.site.nodes}
        if layers and moved.issuperset(m.node for m in mismatches):
            found_in = f"{layers} of {len(mine)} BatchNorms"
            return f"the statistics differ in {found_in}, and nothing else does: a recalibration, not a defect of a fold"
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


def _statistics_differ(a: Node, b: Node) -> bool | None:
    """Whether two BatchNorms have other statistics; None where they differ in more than that."""
    for role in ("gamma", "beta"):
        if (role in a.params) != (role in b.params):
            return None
        if role in a.params and not np.array_equal(_stored(a.params[role]), _stored(b.params[role]), equal_nan=True):
            return None
    return any(not np.array_equal(np.asarray(a.attrs.get(role, 0.0)), np.asarray(b.attrs.get(role, 0.0))) for role in STATISTICS)


# --- pairing ------------------------------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """Two parameters that should be equal."""

    reference: Node
    role: str
    candidate: Node
    its_role: str


def _paired(reference: Plan, candidate: Plan) -> tuple[list[_Pair], str]:
    """Nodes that stand at the same place in the data flow, and the first reason why some don't."""
    keys = _keys(reference) | _keys(candidate)
    stack = [(v, candidate.outputs[name]) for name, v in reference.outputs.items() if name in candidate.outputs]
    pairs: dict[_Pair, None] = {}
    seen: set[tuple[Value, Value]] = set()
    trouble: list[tuple[int, str]] = []
    while stack:
        a, b = (through(v) for v in stack.pop())
        if (a, b) in seen:
            continue
        seen.add((a, b))
        p, q = a.producer, b.producer
        if p is None or q is None:
            if p is not q or a.name != b.name:
                node = p if p is not None else next((user for user, _ in a.users), None)
                where = f"{node.label} {node.name}" if node is not None else f"input {a.name}"
                trouble.append((node.index if node is not None else 0, f"{where} has no counterpart in the candidate"))
            continue
        if (parted := _parted(p, q)) is not None:
            pairs |= dict.fromkeys(parted)
            stack.extend(zip(parted[0].reference.inputs, parted[0].candidate.inputs, strict=True))
            continue
        if (
            p.op != q.op
            or (p.op == "Barrier" and p.label != q.label)
            or len(p.inputs) != len(q.inputs)
            or p.params.keys() != q.params.keys()
        ):
            trouble.append((p.index, f"{p.label} {p.name} stands where the candidate has {q.label} {q.name}"))
            continue
        statistics = [role for role in STATISTICS if np.ndim(p.attrs.get(role, 0)) or p.attrs.get(role) != q.attrs.get(role)]
        pairs |= dict.fromkeys(_Pair(p, role, q, role) for role in (*p.params, *statistics))
        stack.extend(zip(p.inputs, _ordered(p, q, keys), strict=True))
    return list(pairs), min(trouble, default=(0, ""))[1]


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


def _keys(plan: Plan) -> dict[Value, int]:
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
            keys[v] = hash((node.op, node.label if node.op == "Barrier" else "", shapes, order, i))
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
    if role in STATISTICS:
        want, have = (np.asarray(node.attrs.get(role, role == "gain"), np.float64) for node in (a, b))
        limit = next(_limits(_tensors((b, a))), a.attrs.get("limit", np.finfo(np.float32).max))
        return want, have, np.abs(want), *precision(float(limit))
    param, other = a.params[role], b.params[its_role]
    if not _has(a, role) and not _has(b, its_role):
        return None
    limit = next(_limits((other.tensor, param.tensor, *_tensors((a, b)))))
    magnitude = np.maximum(*_broadcast(_magnitude(param), _magnitude(other)))
    if role != "weight":
        for more in hidden.get(a, ()):
            magnitude = magnitude + (more.reshape(magnitude.shape) if more.size == magnitude.size else more.max())
    return param.read(), other.read(), magnitude, *precision(limit)


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
