"""Level 1 of `verify`: two models in normal form, whole: operators, settings, and coefficients in units of roundoff. No data, no run.

Both models are brought to normal form by the planner: all that can be folded is planned, in float64. Then their operators are paired
(see `structure`), and each pair's settings and coefficients are compared. Rounding once errs by at most one unit roundoff u
of the number itself. Another tool's arithmetic in the stored type errs by 3.5 u for gamma/sqrt(var + eps) * W (half for the sum under the
root, and one for each of root, division and product; the model is Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., equation
2.4), and for beta - s*mean by as much of the magnitudes of the summands, which may cancel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bnfold.algebra.absorbing import coefficients
from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Graph, Node, Norm
from bnfold.folding.plan import NormalForm
from bnfold.report import Coefficients

from .rescaling import rescaled
from .roundoff import DOUBLE, ShapesDifferError, UnitErrors, chain_errors, errors_of, hidden_summands, merged_summands, type_of
from .structure import STATISTICS, Structure

# Where one in two coefficients of several layers is off by this much, relatively and in units of roundoff, and the outputs still agree to
# rounding, scales were moved between layers.
ANOTHER_FORM, ANOTHER_FORM_UNITS = 1e-2, 100.0

# In half precision: where nearly all channels of a weight are rounded once, it was worked out in a wider type, and so one that isn't
# stands out. (Of arithmetic in the stored type itself, a third of the channels with 9 numbers pass for that by chance, fewer with more.)
HALF = 2.0**-20
UNIT_SCALE = 1e-6  # what a rounded variance and epsilon leave of a scale of 1
ONCE = 1.01  # units of roundoff, with what float32 arithmetic adds to them
STANDS_OUT = 1 / 16  # the share of channels
LEAST_CHANNELS, LEAST_NUMBERS = 16, 8  # of channels, and of numbers in each, that say anything about the others

MEASURED = 4  # times the limit in float64, where factors that were measured in it are no more exact than what they are held against
RESCALED = "scales were moved between layers, where they cancel"
STATISTIC, EPSILON, UNKNOWN = "statistics", "epsilon", "something else"


class Mismatch(NamedTuple):
    """One array that differs. widespread: whether at least half of it is off by 1 % and 100 units or more; scaled: whether it is a weight
    of which most channels differ, each by a factor of its own; setting: whether it is a setting of the kind that would show wherever it
    matters."""

    node: Node
    text: str
    widespread: bool
    scaled: bool = False
    setting: bool = False


@dataclass(frozen=True)
class Correspondence:
    """What level 1 found. unpaired: why the structures don't correspond, "" if they do; mismatches are in the reference's order.

    uncertified: the BatchNorms of the reference of which not every coefficient was found to be right. remark: what the mismatches look
    like. unfolded: whether the candidate still has as many BatchNorms. narrower: how the candidate computes in a narrower type, "" where it
    doesn't. paired: how many pairs of operators agree; left: each normal form, and its operators that have no counterpart of which all is
    known to agree.
    """

    checked: int
    worst: float
    mismatches: tuple[Mismatch, ...]
    unpaired: str
    batchnorms: int
    uncertified: tuple[str, ...]
    remark: str
    unfolded: bool
    narrower: str
    paired: int
    left: tuple[tuple[Graph, frozenset[Node]], ...]

    @property
    def certified(self) -> int:
        return self.batchnorms - len(self.uncertified)

    def report(self) -> Coefficients:
        counts = self.certified, self.batchnorms, self.uncertified
        if self.unpaired:
            more = f"; {self.certified} of {self.batchnorms} BatchNorms could be certified" if self.batchnorms else ""
            return Coefficients("skipped", self.checked, self.worst, self.unpaired + more, *counts)
        if self.mismatches or self.narrower:
            text = "; ".join(filter(None, (self.narrower, self.remark, *(m.text for m in self.mismatches[:1]))))
            return Coefficients("different", self.checked, self.worst, text, *counts)
        if not self.checked and not self.paired:
            return Coefficients("skipped", 0, 0.0, "no coefficients that a fold could change", *counts)
        return Coefficients("equivalent", self.checked, self.worst, self.remark, *counts)

    @property
    def another_form(self) -> str:
        """Why the two are one function in another form, if their outputs agree; "" where the differences may be too small to show there.

        Scales that were moved take two layers, of which one undoes what the other does. A setting that changes nothing (how the odd element
        is rounded, where there is none) is another form as well, and so is a narrower type, which level 3 measures.
        """
        numbers = [m for m in self.mismatches if not m.setting]
        if len({m.node for m in numbers}) == 1 or not all(m.widespread for m in numbers):
            return ""
        if settings := [m.text for m in self.mismatches if m.setting]:
            return f"the outputs agree to rounding, although {settings[0]}"
        if self.narrower and not numbers:
            return self.narrower
        return "the outputs agree to rounding while most coefficients differ: the same function in another form"


def correspond(reference: NormalForm, candidate: NormalForm) -> Correspondence:
    """Pair the operators of two plans and compare their settings and coefficients; once more where scales may have moved between layers."""
    structure = Structure(reference, candidate)
    found = _compared(reference, candidate, structure)
    if found.unpaired or len({m.node for m in found.mismatches}) < 2:
        return found
    with rescaled(reference, structure.parameters) as scales:
        again = _compared(reference, candidate, structure, scales)
    return found if again.mismatches else dataclasses.replace(again, remark=RESCALED)


def _compared(
    reference: NormalForm, candidate: NormalForm, structure: Structure, scales: Mapping[Node, Array] | None = None
) -> Correspondence:
    """What corresponds. scales: by which the reference's biases were multiplied for the occasion, if it was rescaled."""
    unpaired, hidden = structure.unpaired, hidden_summands(reference, scales or {}) | hidden_summands(candidate)
    merged = merged_summands(reference) | merged_summands(candidate)
    mismatches = [Mismatch(a, each.text, each.widespread or not each.number, setting=not each.number) for a, each in structure.settings]
    compared: list[Node] = []
    worst = 0.0

    def judge(node: Node, role: str, errors: UnitErrors | None, *, once: bool) -> bool:
        """Whether there is something to compare. (Here, so that the arrays of one parameter are gone when the next come.)"""
        nonlocal worst
        if errors is None:
            return False
        worst = max(worst, errors.most)
        if (found := _mismatch(node, role, errors, once=once)) is not None:
            mismatches.append(found)
        return True

    for pair in sorted(structure.parameters, key=lambda pair: pair.reference.index):
        try:
            if not judge(pair.reference, pair.role, errors_of(pair, hidden, merged), once=scales is None):
                continue
        except ShapesDifferError as error:
            unpaired = unpaired or str(error)
        compared.append(pair.reference)
    for one, other in structure.chains:
        for role, errors in chain_errors(one, other):
            judge(one.nodes[0], role, errors, once=False)
        compared += one.nodes
    mismatches.sort(key=lambda m: m.node.index)
    off = {m.node for m in mismatches}
    right = {*compared} - off
    sites = [o for o in reference.outcomes if o.site.is_batchnorm]
    held_in = [(o.site.name, o.into if o.folded else o.site.nodes) for o in sites]
    agreeing = [pair for pair in structure.nodes if pair[0] not in off]
    known = structure.idle.union(*agreeing)
    (mine, _), (theirs, where) = reference.narrowest, candidate.narrowest
    return Correspondence(
        checked=len(compared),
        worst=worst,
        mismatches=tuple(mismatches),
        unpaired=unpaired,
        batchnorms=len(sites),
        uncertified=tuple(name for name, nodes in held_in if not nodes or not right.issuperset(nodes)),
        remark=_remark(reference, candidate, mismatches),
        unfolded=bool(sites) and _scaling(reference) == _scaling(candidate),
        narrower=f"the candidate computes in {type_of(theirs)} ({where}), the reference in {type_of(mine)}" if theirs < mine else "",
        paired=len(agreeing),
        left=tuple((plan.graph, frozenset(plan.graph.nodes) - known) for plan in (reference, candidate)),
    )


def _mismatch(node: Node, role: str, errors: UnitErrors, *, once: bool) -> Mismatch | None:
    """What of an array is off by more than rounding explains; None where nothing is. once: whether what it is held against is rounded once
    at most; else it has factors in it, in float64, that were measured."""
    most = errors.most
    alone = once and errors.unit > HALF and role == "weight" and most > ONCE and _stands_out(errors)
    if most <= errors.limit * (1 if once or errors.unit > DOUBLE else MEASURED) and not alone:
        return None
    want, have, units = errors.whole
    place = np.atleast_1d(np.unravel_index(int(units.argmax()), units.shape or (1,)))[errors.axis]
    text = f"the {role} of {node.label} {node.name} is off by {most:.3g} times what rounding explains (channel {place})"
    text += "" if most > errors.limit else f", where the other channels are within {ONCE:.2g}"
    with np.errstate(all="ignore"):
        small = (np.abs(have - want) <= ANOTHER_FORM * np.abs(want)) | (units <= ANOTHER_FORM_UNITS)
    return Mismatch(node, text, bool(np.mean(~small) >= 0.5), role == "weight" and _scaled(errors))


def _scaling(plan: NormalForm) -> int:
    """How many of the BatchNorms are more than a shift: one that folds into a code that stays is still called, and does no more."""
    scales = [[coefficients(node).scale for node in o.site.nodes] for o in plan.outcomes if o.site.is_batchnorm]
    return sum(any((np.abs(scale - 1) > UNIT_SCALE).any() for scale in each) for each in scales)


def _stands_out(errors: UnitErrors) -> bool:
    """Whether a few channels are off by more than one rounding, and the others aren't."""
    units = errors.by_channel()[2]
    channels, numbers = units.shape
    off = int((units.max(1, initial=0.0) > ONCE).sum())
    return bool(channels >= LEAST_CHANNELS and numbers >= LEAST_NUMBERS and 0 < off <= STANDS_OUT * channels)


def _scaled(errors: UnitErrors) -> bool:
    """Whether most channels are off, each by a factor: what other statistics would make of a weight."""
    a, b, off = errors.by_channel()
    if np.mean(off.max(1, initial=0.0) > errors.limit) < 0.5:
        return False
    with np.errstate(all="ignore"):
        factor = (a * b).sum(1, keepdims=True) / np.square(a).sum(1, keepdims=True)
        # What is left of the error once the factor is taken out, in the units in which it was measured.
        left = np.abs(b - factor * a) / np.abs(b - a) * off
    return bool(np.nan_to_num(left, nan=0.0, posinf=0.0).max(initial=0.0) <= 2 * errors.limit)


# --- what the BatchNorms tell ---------------------------------------------------------------------------------------------------------


def _remark(reference: NormalForm, candidate: NormalForm, mismatches: list[Mismatch]) -> str:
    """Whether all that differs is statistics, as a recalibration leaves them: no defect of a fold."""
    mine, theirs = ([o for o in plan.outcomes if o.site.is_batchnorm] for plan in (reference, candidate))
    off = {m.node for m in mismatches}
    if mismatches and len(mine) == len(theirs):
        explained: set[Node] = set()
        found: dict[str, list[tuple[Node, Node]]] = {}
        for a, b in zip(mine, theirs, strict=True):
            if len(a.site.nodes) != len(b.site.nodes):
                return ""
            pairs = list(zip(a.site.nodes, b.site.nodes, strict=True))
            for what in {each for p, q in pairs for each in _what_differs(p, q)}:
                found.setdefault(what, []).append(pairs[0])
                explained |= {*a.into, *a.site.nodes}
        return _counted(found, len(mine)) if explained.issuperset(off) else ""
    into = {node for o in mine if o.folded for node in o.into}
    scaled = {m.node for m in mismatches if m.scaled}
    if len(scaled) > 1 and 2 * len(scaled) >= max(len(into), len(off)) and into.issuperset(off):
        return (
            f"the statistics or the epsilons seem to differ in {len(off)} layers, where each channel is off by a factor of its own: "
            "compare a fold with the very model that it was made of, recalibrated where that one was"
        )
    return ""


def _counted(found: Mapping[str, list[tuple[Node, Node]]], of: int) -> str:
    """What of the BatchNorms differs, where nothing else does."""
    if not found or UNKNOWN in found:
        return ""
    if found.keys() == {STATISTIC}:
        where = f"{len(found[STATISTIC])} of {of} BatchNorms"
        return f"the statistics differ in {where}, and nothing else does: a recalibration, not a defect of a fold"
    counted = " and ".join(f"{what}{'' if i else ' differs'} in {len(pairs)}" for i, (what, pairs) in enumerate(sorted(found.items())))
    agree = "" if STATISTIC in found else ": all statistics agree"
    numbers = ""
    if EPSILON in found:
        p, q = found[EPSILON][0]
        numbers = f" ({p.attrs['norm'].epsilon:.6g} in {p.name}, {q.attrs['norm'].epsilon:.6g} in the candidate)"
    return f"{counted} of {of} BatchNorms{numbers}, and nothing else does{agree}"


def _what_differs(a: Node, b: Node) -> set[str]:
    """In what two BatchNorms differ."""
    if any((role in a.params) != (role in b.params) for role in ("gamma", "beta")):
        return {UNKNOWN}
    pairs = [(param.original(), b.params[role].original(), role) for role, param in a.params.items() if role in ("gamma", "beta")]
    one, other = a.attrs.get("norm"), b.attrs.get("norm")
    epsilon = False
    if isinstance(one, Norm) and isinstance(other, Norm):
        pairs += [(one.gamma, other.gamma, "gamma"), (one.beta, other.beta, "beta")]
        pairs += [(one.mean, other.mean, STATISTIC), (one.var, other.var, STATISTIC)]
        epsilon = one.epsilon != other.epsilon
    else:
        pairs += [(np.asarray(a.attrs.get(role, 0.0)), np.asarray(b.attrs.get(role, 0.0)), STATISTIC) for role in STATISTICS]
    return {what for mine, theirs, what in pairs if not np.array_equal(mine, theirs, equal_nan=True)} | ({EPSILON} if epsilon else set())
