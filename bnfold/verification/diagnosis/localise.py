"""Where two models part: the first layer, in the reference's order, whose value differs by more than rounded weights explain.

Where both models can be seen into, their normal forms show it. Of other models only the inner values by name may be known, and there the
first of those that both have is looked for.
"""

from __future__ import annotations

import numpy as np

from bnfold.algebra.graph import Value
from bnfold.data import Batch
from bnfold.errors import BnfoldError
from bnfold.model import Model
from bnfold.report import Difference

from ..coefficients import Mismatch
from ..comparison import Comparison
from ..pairing import comparable, through
from ..preconditions import CHUNK, chunks, only
from ..roundoff import output_axis
from ..verdict import Findings
from ..yardstick import FUNCTION_LIMIT, Truth, function_ratio
from .causes import cause_of, is_right
from .sides import Compared, Located, Sides, compare_values, sides_of
from .weights import Coefficient


def first_difference(both: Comparison, found: Findings) -> tuple[str | None, Located | None]:
    """The name of the layer, and all that is known of the place; None for what isn't."""
    level = found.correspondence if found.coefficients.verdict == "different" else None
    mismatch = level.mismatches[0] if level is not None and level.mismatches else None
    if found.elsewhere or not found.ran:
        return (mismatch.node.name if mismatch is not None and not found.elsewhere else None), None
    both.progress("first difference", 0, None)
    feeds = found.truth.feeds[0] if found.truth is not None and found.truth.feeds else None
    values = found.function.verdict == "different"
    wrong = {row.optimisation: row.provider for row in found.rows if row.verdict == "different"}
    located = None
    try:
        if values or found.coefficients.verdict == "different":
            located = localise(both.reference, both.candidate, feeds, mismatch, values=values)
        elif set(wrong) == {"on"} and feeds is not None:
            located = localise_runtime(both.reference, both.candidate, feeds, wrong["on"])
    except BnfoldError:
        pass
    if located is not None:
        return located.difference.layer, located
    seen = [] if mismatch is None else [mismatch.node.name]
    if values and found.deviations and feeds is not None:
        seen += _first_by_name(both, feeds)
    places = list(both.reference.layers().values())
    return min(seen, key=lambda name: places.index(name) if name in places else len(places), default=None), None


def localise(reference: Model, candidate: Model, feeds: Batch | None, mismatch: Mismatch | None, *, values: bool = True) -> Located | None:
    """The first difference and its likely cause; None where nothing inside shows one.

    feeds: a batch by the reference's names. values: whether values are known to differ. mismatch: the first that level 1 found.
    """
    sides = sides_of(reference, candidate)
    if sides is None:
        return None
    seen = _likeliest(compare_values(sides, feeds)) if values and feeds else []
    first = first_to_reach_an_output(sides, seen)
    place = {node.name: node.index for node in reversed(sides.reference.plan.graph.nodes)}
    at = -1 if mismatch is None else place.get(mismatch.node.name, 0)
    if mismatch is not None and (first is None or at < first.pair.node.index or (at > first.pair.node.index and is_right(first.pair))):
        named = [p for p in sides.pairs if p.node.name == mismatch.node.name and p.other is not None]
        pair = next((p for p in named if p.other is not None and comparable(p.node, p.other)), named[0] if named else None)
        node = mismatch.node if pair is None else pair.node
        first = next((c for c in seen if pair is not None and c.pair.node is pair.node and c.differs), None)
    elif first is not None:
        pair, node = first.pair, first.pair.node
    else:
        return None
    cause = cause_of(sides, pair, first, feeds)
    worst = first or cause.worst or Coefficient()
    what = worst.what if isinstance(worst, Coefficient) else "output"
    difference = Difference(node.name, worst.channel, worst.position, worst.expected, worst.found, cause.text, what, cause.batchnorm)
    return Located(sides, difference, node, feeds, pair, first, tuple(c.pair for c in seen if not c.differs))


def _likeliest(seen: list[Compared]) -> list[Compared]:
    """Of several values that a BatchNorm's fold may have left in one, the nearest, where none agrees: the others are no counterparts."""
    nearest: dict[Value, float] = {}
    for c in seen:
        nearest[c.pair.candidate] = min(nearest.get(c.pair.candidate, np.inf), c.ratio)
    return [c for c in seen if c.ratio <= nearest[c.pair.candidate] or nearest[c.pair.candidate] <= FUNCTION_LIMIT]


def first_to_reach_an_output(sides: Sides, seen: list[Compared]) -> Compared | None:
    """The first value whose difference reaches an output: another fold may leave a scale to a later layer, or change what nobody reads.

    A value of the candidate that agrees with one of the reference is no counterpart of another, unless the operators at the difference
    read these two: then one side lacks what stands between (a BatchNorm may have been folded onwards, rightly or wrongly).
    """
    known = {c.pair.reference: c for c in seen}
    settled = {c.pair.candidate for c in seen if not c.differs}
    reaches: dict[Value, bool] = {}
    for node in reversed(sides.reference.plan.graph.nodes):
        for value in node.outputs:
            agrees = value in known and not known[value].differs
            reaches[value] = not agrees and (value.is_output or any(reaches.get(v, False) for user, _ in value.users for v in user.outputs))
    off = [c for c in seen if c.differs and reaches.get(c.pair.reference, True)]
    first = next((c for c in off if c.pair.candidate not in settled), None)
    if first is None or first.pair.other is None:
        return first
    mine, theirs = ({through(v) for v in node.inputs} for node in (first.pair.node, first.pair.other))
    lacking = (c for c in off if c.pair.reference in mine and c.pair.candidate in theirs and "norm" not in c.pair.node.attrs)
    return next(lacking, first)


def localise_runtime(reference: Model, candidate: Model, feeds: Batch, provider: str) -> Located | None:
    """Where a runtime's own optimisation makes another function of a candidate that is right, and which optimisation it is."""
    sides = sides_of(reference, candidate)
    found = None if sides is None else candidate.culprit(candidate.own(feeds), provider, sides.unit)
    if sides is None or found is None:
        return None
    pair = next((p for p in sides.pairs if p.same and sides.candidate.stands.get(p.candidate) == found.output), None)
    name = pair.node.name if pair is not None else found.nodes[-1].name or found.output
    off = np.abs(np.nan_to_num(found.found.astype(np.float64) - found.expected.astype(np.float64), nan=np.inf))
    at = tuple(int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
    channel = at[output_axis(pair.node, off.ndim)] if pair is not None and at else at[-1] if at else None
    difference = Difference(name, channel, at, float(found.expected[at]), float(found.found[at]), found.text)
    node = pair.node if pair is not None else sides.reference.plan.graph.nodes[-1]
    return Located(sides, difference, node, feeds, pair, runtime=found)


def _first_by_name(both: Comparison, feeds: Batch) -> list[str]:
    """The layer of the first inner value that differs, by the names that both models have for them; none where there is none.

    A value may also be what it becomes where the reference is folded.
    """
    reference, candidate = both.reference, both.candidate
    try:
        layers, shared = reference.layers(), candidate.layers().keys()
        names, (folded, also) = [name for name in layers if name in shared], _folded(reference)
        for i, chunk in enumerate(chunks(names)):
            both.progress("first difference", i * CHUNK, len(names))
            truth = Truth(only(reference, chunk), [feeds])
            truth.measure(lambda seed, chunk=chunk: only(reference, chunk, jitter=seed + 1), least=1, most=1)  # type: ignore[misc]
            errors = truth.compare(only(candidate, chunk))
            known = [name for name in chunk if name in also]
            others = Truth(only(folded, known), [feeds]).compare(only(candidate, known)) if known else {}
            for name in chunk:
                scale, noise, other = truth.scale(name, both.unit), truth.noise[name], others.get(name)
                agrees = not errors[name].problem and function_ratio(errors[name], noise, scale) <= FUNCTION_LIMIT
                least = FUNCTION_LIMIT * max(noise.peak, scale.floor)
                if not agrees and (other is None or other.problem or other.peak > least):
                    return [layers[name]]
    except BnfoldError:
        pass
    return []


def _folded(model: Model) -> tuple[Model, dict[str, str]]:
    """The model with its BatchNorms folded, and its inner values; none where that can't be."""
    try:
        folded, report = model.folded()
        return folded, folded.layers() if any(layer.verdict == "folded" for layer in report.layers) else {}
    except BnfoldError:
        return model, {}
