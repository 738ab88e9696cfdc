"""Why a layer differs, decided by trying: its coefficients are folded again with each mistake that is known to be made, and the one that
gives what the candidate holds, to rounding, is named. What nothing explains is called that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from bnfold.algebra.graph import Node, Value, Window
from bnfold.algebra.settings import differing, differing_moves, operator
from bnfold.data import Batch
from bnfold.errors import BnfoldError

from ..normal_form import Normal
from ..pairing import NORMALISES, Pair, product_before
from ..roundoff import precision, rounded_in, type_of
from .fold_mistakes import mistakes, other_statistics
from .sides import Compared, Sides
from .weights import Both, Coefficient, both_planned, channels_off, orders, worst_coefficient

UNEXPLAINED = "nothing that was tried explains it"
SETTINGS = ("groups", "window", "x", "w", "y", "axis", "axes", "multiples", "factors")  # they decide which places an operator reads
MIXED = 1e3  # units of roundoff of the largest number: another batch moves a sample by more than this, if by anything


@dataclass(frozen=True)
class Cause:
    """In words, the name of the BatchNorm whose fold is in question, and the coefficient that is furthest off, if one is."""

    text: str
    batchnorm: str = ""
    worst: Coefficient | None = None


def cause_of(sides: Sides, pair: Pair | None, compared: Compared | None, feeds: Batch | None) -> Cause:
    """What explains the difference at a pair of operators. compared: their values, where these differ."""
    if pair is None:
        return Cause(UNEXPLAINED)
    p, q = pair.node, pair.other
    if q is None:
        return Cause(f"the candidate has nothing in the place of {p.label} {p.name}")
    sites = [node for node in sides.reference.sites.get(p, []) if "norm" in node.attrs] or ([p] if "norm" in p.attrs else [])
    q = product_before(p, q) or q
    batchnorm, both = sites[0] if sites else _normaliser(p), both_planned(p, q)
    name = "" if batchnorm is None else sides.reference.name_of(batchnorm)
    text = next(_explanations(sides, pair, q, both, compared, feeds, sites, name), None)
    worst = None if both is None else worst_coefficient(*both, ("gain", "shift") if "norm" in p.attrs else ("weight", "bias"))
    return Cause(text or UNEXPLAINED + ("" if both is None else f"; {channels_off(*both)}"), name, worst)


def _explanations(
    sides: Sides, pair: Pair, q: Node, both: Both | None, compared: Compared | None, feeds: Batch | None, sites: list[Node], name: str
) -> Iterator[str]:
    """The likeliest first. q: the candidate's operator; sites: the BatchNorms that went into the reference's; name: of the first."""
    p = pair.node
    mixes = partial(_depends_on_the_batch, sides, pair, feeds)
    yield from _refused(sides.candidate, p, q, mixes)
    yield from _not_finite(p, q)
    if compared is not None and compared.border and p.op == "Conv":
        of = "a BatchNorm" if _normaliser(p) is None else f"BatchNorm {name}"
        fold = f"as where the shift of {of} in front is folded into a convolution that pads with zeros"
        yield f"padding: the map is off at its border alone, {fold}"
    yield from _another_operator(p, q)
    yield from _lacking_in_front(sides, p, q)
    if both is not None:
        yield from _stored_narrower(sides, p, q, both)
        if len(sites) == 1:
            twin = _twin(sides.candidate, sides.reference, sites[0])
            kept = twin.attrs.get("norm") if twin is not None and twin in (q, *sides.candidate.sites.get(q, [])) else None
            yield from mistakes(name, sites[0], p, *both, kept=kept)
        yield from orders(*both, int(p.attrs.get("groups", 1)), sites)
        if len(sites) == 1 and sites[0].index >= p.index:
            yield from other_statistics(name, sites[0].attrs["norm"], *both)
    yield from _other_settings(p, q)
    if compared is not None and not p.params and not q.params and operator(p) != operator(q):
        yield _in_the_place(p, q)
    if compared is not None and mixes():
        yield "training mode: the candidate's output for one sample depends on the others in its batch"
    (one, _), (other, _) = sides.reference.plan.narrowest, sides.candidate.plan.narrowest
    if other != one:
        off = "" if both is None else f"; {channels_off(*both)}"
        yield f"the candidate computes in {type_of(other)}, the reference in {type_of(one)}{off}"


def is_right(pair: Pair) -> bool:
    """Whether an operator's coefficients and settings are the reference's: then its value differs for another's sake."""
    p, q = pair.node, pair.other
    if q is None or p.op != q.op or any(True for _ in _other_settings(p, q)) or (both := both_planned(p, q)) is None:
        return False
    want, have = both
    return have.is_explained(want.weight, want.bias, np.full_like(want.bias, np.abs(want.bias).max(initial=0.0)))


def _refused(candidate: Normal, p: Node, q: Node, mixes: Callable[[], bool]) -> Iterator[str]:
    """A BatchNorm of the candidate that no fold takes. mixes: whether the value depends on its batch."""
    for node in (q, *(u for u, _ in q.output.users)):
        if _is_left(node) and not _is_left(p):
            why, name = str(node.attrs.get("why", "")), candidate.name_of(node)
            if "training" in why or "each batch by itself" in why:
                depends = "; its output for one sample depends on the others in its batch" * mixes()
                yield f"training mode: BatchNorm {name} of the candidate normalises each batch by itself{depends}"
            elif why:
                yield f"BatchNorm {name} of the candidate can't be used: {why}"


def _is_left(node: Node) -> bool:
    """Whether it is a BatchNorm that stays where it is."""
    return node.op == "Barrier" and node.label in NORMALISES


def _normaliser(p: Node) -> Node | None:
    """The BatchNorm in front of an operator."""
    before = p.inputs[0].producer if p.inputs else None
    return before if before is not None and "norm" in before.attrs else None


def _not_finite(p: Node, q: Node) -> Iterator[str]:
    """Coefficients that are no numbers where the reference's are."""
    for node in (q, *(u for u, _ in q.output.users if u.op == "Affine")):
        for role, param in node.params.items():
            array, mine = param.read(), p.params.get(role)
            if not np.isfinite(array).all() and (mine is None or np.isfinite(mine.read()).all()):
                at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
                yield f"the candidate's {role} holds {array[at]} at ({', '.join(map(str, at))})"


def _another_operator(p: Node, q: Node) -> Iterator[str]:
    """Unless both are such as a fold makes of one another."""
    if _of_one_kind(p, q):
        return
    if (before := _extra_behind(q, p)) is not None:
        yield f"the candidate has {q.label} {q.name} behind {before.label} {before.name}, which the reference hasn't"
    elif (before := _extra_behind(p, q)) is not None:
        yield f"the candidate lacks {p.label} {p.name}, which the reference has behind {before.label} {before.name}"
    elif {p.op, q.op} != {"Contraction", "Affine"} and not all(n.op in ("Conv", "Contraction", "Affine") and n.params for n in (p, q)):
        yield _in_the_place(p, q)


def _in_the_place(p: Node, q: Node) -> str:
    return f"the candidate has {q.label} {q.name} where the reference has {p.label} {p.name}"


def _of_one_kind(p: Node, q: Node) -> bool:
    return p.op == q.op and (p.op != "Barrier" or operator(p) == operator(q))


def _extra_behind(extra: Node, other: Node) -> Node | None:
    """What stands before an operator that the other model lacks, if that is the other model's own."""
    for value in () if extra.params else extra.inputs:
        before = value.producer
        if before is not None and "norm" in before.attrs:
            before = before.inputs[0].producer
        if before is not None and before.params.keys() == other.params.keys() and _of_one_kind(before, other):
            return before
    return None


def _stored_narrower(sides: Sides, p: Node, q: Node, both: Both) -> Iterator[str]:
    """Where that explains the coefficients."""
    want, have = both
    mine, theirs = (min((rounded_in(param.tensor) for param in n.params.values() if param.tensor is not None), default=0.0) for n in (p, q))
    if 0 < theirs < mine:
        rounded = replace(have, unit=precision(theirs)[0])
        if rounded.is_explained(want.weight, want.bias, np.full_like(want.bias, np.abs(want.bias).max(initial=0.0))):
            how = "computes" if sides.candidate.plan.narrowest[0] < sides.reference.plan.narrowest[0] else "stores its weights"
            yield f"the candidate {how} in {type_of(theirs)}, the reference in {type_of(mine)}"


def _twin(of: Normal, model: Normal, site: Node) -> Node | None:
    """The BatchNorm of one model that has the place of another's: that of its name, or of its number where both have as many."""
    own, others = ([node for each in side.batchnorms for node in each.nodes] for side in (model, of))
    name = model.name_of(site)
    named = [node for node in others if of.name_of(node) == name]
    return named[0] if len(named) == 1 else others[own.index(site)] if site in own and len(own) == len(others) else None


def _lacking_in_front(sides: Sides, p: Node, q: Node) -> Iterator[str]:
    """What the reference has in front of a BatchNorm that goes into the candidate's operator, and into another of the reference."""
    for site in sides.candidate.sites.get(q, []):
        twin = _twin(sides.reference, sides.candidate, site)
        if twin is None or twin in sides.reference.sites.get(p, []):
            continue
        mine, theirs = sides.reference.in_front_of(twin), sides.candidate.in_front_of(site)
        if mine is not None and theirs is not None and not mine.params and not _of_one_kind(mine, theirs):
            name = sides.reference.name_of(twin)
            yield f"the candidate lacks {mine.label} {mine.name}, which the reference has in front of BatchNorm {name}"


def _other_settings(p: Node, q: Node) -> Iterator[str]:
    """Of two operators of one kind."""
    if p.op != q.op:
        return
    for key in SETTINGS:
        if p.attrs.get(key) != q.attrs.get(key):
            mine, theirs = (
                f"(stride {v.stride}, dilation {v.dilation}, padding {v.before} and {v.after})" if isinstance(v, Window) else v
                for v in (p.attrs.get(key), q.attrs.get(key))
            )
            yield f"the candidate's {q.label} {q.name} has other settings: {key} {theirs} for {mine}"
    found, _ = differing_moves(p, q) if p.op == "Move" else differing(p, q)
    for each in found:
        yield f"other settings: {each.text}"


def _depends_on_the_batch(sides: Sides, pair: Pair, feeds: Batch | None) -> bool:
    """Whether the candidate's value for one sample changes with the rest of its batch, as in training mode, and the reference's doesn't."""
    if feeds is None:
        return False
    return _mixes(sides, sides.candidate, pair.candidate, feeds) and not _mixes(sides, sides.reference, pair.reference, feeds)


def _mixes(sides: Sides, side: Normal, value: Value, feeds: Batch) -> bool:
    name = side.stands.get(value)
    batch = {key: array for key, array in feeds.items() if array.ndim}
    if name is None or len(batch) < len(feeds) or not batch:
        return False
    if min(len(a) for a in batch.values()) < 2:
        batch = {key: np.concatenate([a, (a * a.dtype.type(0.5)).astype(a.dtype)]) for key, a in batch.items()}
    try:
        whole, alone = (
            next(array for _, array in side.stream(fed, [name], exact=sides.exact))
            for fed in (batch, {key: np.concatenate([a[:1], a[:1]]) for key, a in batch.items()})
        )
    except (BnfoldError, StopIteration):
        return False
    if whole.ndim != alone.ndim or whole.shape[1:] != alone.shape[1:] or not whole.ndim or not whole[:1].size:
        return False
    return bool(np.abs(whole[:1] - alone[:1]).max() > MIXED * sides.unit * float(np.abs(whole[:1]).max(initial=0.0)))
