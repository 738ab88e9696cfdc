"""Two networks operator by operator: what stands where in both, what became of the rest, and how far off each layer's values are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from bnfold.algebra.graph import Node, Value
from bnfold.data import Batch
from bnfold.report.verify import LayerError, Mark, PairedOperator

from ..noise import plain
from ..normal_form import Normal
from .sides import Sides, Values, together

Row = tuple[Node | None, Node | None]  # the reference's operator and the candidate's


def layer_errors(sides: Sides, feeds: Batch) -> tuple[LayerError, ...]:
    """Every layer that both compute, in the reference's order. BnfoldError: a side can't be run in float64, or seen into in its types."""
    runs = [(sides.reference, None, True), (sides.reference, None, False), (sides.candidate, None, False)]
    found = []
    with np.errstate(all="ignore"):
        for pair, (want, own, got) in together(sides, feeds, runs, alike=True):
            if want.dtype.kind == "f" and want.size and want.size == own.size == got.size:
                name = sides.reference.name_of(pair.node)
                found.append(LayerError(name, pair.node.label, _error(want, own), _error(want, got)))
    return tuple(found)


def _error(want: Values, got: Values) -> float:
    """The root mean square of the error over that of the values, of those that are finite in the reference."""
    got = plain({"": got})[""].reshape(want.shape)
    finite = np.isfinite(want)
    square = float(np.square(want[finite]).mean()) if finite.any() else 0.0
    off = float(np.square((got - want)[finite]).mean()) if finite.any() else 0.0
    return float(np.sqrt(off / square)) if square else float(np.sqrt(off))


def paired_operators(sides: Sides, differing: Collection[str | None]) -> tuple[PairedOperator, ...]:
    """Both networks as they stand, side by side. differing: the names of operators that are known to differ."""
    partners = {pair.node: pair.other for pair in sides.pairs if pair.other is not None}
    theirs = {sides.candidate.name_of(step.node): step.node for step in sides.candidate.steps}
    sites = {node: outcome for outcome in sides.reference.plan.outcomes for node in outcome.site.nodes}
    for node in sites:  # which the normal forms have no more
        if (same := theirs.get(sides.reference.name_of(node))) is not None and same.label == node.label:
            partners[node] = same
    rows = list(_rows([step.node for step in sides.reference.steps], [step.node for step in sides.candidate.steps], partners))
    reads = [_reads(side, [row[i] for row in rows]) for i, side in enumerate((sides.reference, sides.candidate))]
    norms = [{n for o in side.plan.outcomes if o.site.is_batchnorm for n in o.site.nodes} for side in (sides.reference, sides.candidate)]
    merges = sides.reference.plan.merges
    merged = {node: merge.host.name for merge in merges for node in (merge.branch, merge.add) if node is not None}
    found = []
    for i, (mine, other) in enumerate(rows):
        mark, note = _mark(sides, mine, other, merged, differing)
        if mark == "gone" and mine in sites and sites[mine].folded:
            mark, note = "folded", ", ".join(dict.fromkeys(node.name for node in sites[mine].into))
        elif mark == "same" and other is not None and mine in norms[0] and other not in norms[1]:
            mark, note = "lowered", other.label
        label = next(node.label for node in (mine, other) if node is not None)
        found.append(
            PairedOperator(_name(sides.reference, mine), _name(sides.candidate, other), label, mark, note, reads[0][i], reads[1][i])
        )
    for row in [row for row in found if row.mark == "lowered"]:  # a Mul before the Add that stands in the BatchNorm's place
        for i in row.candidate_reads:
            made = rows[i][1]
            if found[i].mark == "new" and made is not None and made.op == "Affine":
                found[i] = replace(found[i], mark="lowered", note=made.label)
    return tuple(found)


def _name(side: Normal, node: Node | None) -> str | None:
    return None if node is None else side.name_of(node)


def _mark(
    sides: Sides, mine: Node | None, other: Node | None, merged: Mapping[Node, str], differing: Collection[str | None]
) -> tuple[Mark, str]:
    """What became of an operator, and a note on it."""
    if mine is None:
        return "new", ""
    if other is None:
        return ("merged", merged[mine]) if mine in merged else ("gone", "")
    if mine.name in differing:
        return "differs", ""
    kept = {sides.candidate.name_of(step.node) for step in sides.candidate.steps}
    held = [name for node in sides.reference.sites.get(mine, ()) if (name := sides.reference.name_of(node)) not in kept]
    return ("holds", ", ".join(dict.fromkeys(held))) if held else ("same", "")


def _rows(mine: list[Node], theirs: list[Node], partners: dict[Node, Node]) -> Iterator[Row]:
    """The operators of both in one order, in which each stands behind those that it reads; a partner only once, and as far as both orders
    allow."""
    place = {node: i for i, node in enumerate(theirs)}
    paired, done = set(partners.values()), 0
    for node in mine:
        other = partners.get(node)
        at = -1 if other is None else place.get(other, -1)
        if at < done:
            yield node, None
            continue
        for each in theirs[done:at]:
            if each not in paired:
                yield None, each
        yield node, other
        done = at + 1
    for each in theirs[done:]:
        if each not in paired:
            yield None, each


def _reads(side: Normal, rows: Iterable[Node | None]) -> list[tuple[int, ...]]:
    """For each row, those that made what its operator reads."""
    made: dict[Value, int] = {}
    inputs = {step.node: (step.inputs, step.outputs) for step in side.steps}
    found = []
    for i, node in enumerate(rows):
        before, outputs = inputs[node] if node is not None else ((), ())
        found.append(tuple(dict.fromkeys(made[v] for v in before if v in made)))
        made.update(dict.fromkeys(outputs, i))
    return found
