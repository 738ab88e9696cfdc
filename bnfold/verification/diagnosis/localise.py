"""Where two models part: the first layer, in the reference's order, whose value differs by more than rounded weights explain.

Both models are computed side by side, and each value is compared as soon as both have it, then dropped. The yardstick of a value is the
reference with moved weights, computed along with them (see `yardstick`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bnfold.algebra.graph import Node, Value, Window
from bnfold.errors import UnsupportedError
from bnfold.model import Model, Stream
from bnfold.report import Difference

from ..normal_form import Normal
from ..pairing import Pair, pairs
from ..yardstick import ARITHMETIC, FUNCTION_LIMIT, Truth, deviation, function_ratio, plain
from .causes import cause_of, is_right

if TYPE_CHECKING:
    from bnfold.data import Batch

    from ..coefficients import Correspondence

Values = npt.NDArray[Any]


@dataclass
class Held:
    """How many values were held for comparison at once, at most, and how many bytes."""

    most: int = 0
    most_bytes: int = 0

    def note(self, waiting: Sequence[Mapping[Any, Values]]) -> None:
        self.most = max(self.most, sum(map(len, waiting)))
        self.most_bytes = max(self.most_bytes, sum(array.nbytes for each in waiting for array in each.values()))


@dataclass(frozen=True)
class Compared:
    """One pair of values. ratio: the error over the yardstick; position: the worst place; border: whether the inside of the map agrees."""

    pair: Pair
    ratio: float
    position: tuple[int, ...] = ()
    channel: int | None = None
    expected: float | None = None
    found: float | None = None
    border: bool = False
    problem: str = ""

    @property
    def differs(self) -> bool:
        return bool(self.problem) or self.ratio > FUNCTION_LIMIT


@dataclass
class Sides:
    """Both models in normal form, with what corresponds in them."""

    reference: Normal
    candidate: Normal
    pairs: list[Pair]
    unit: float
    exact: bool = True
    held: Held = field(default_factory=Held)

    def comparable(self) -> list[Pair]:
        """Pairs whose values both models compute themselves, the first for each value of the reference."""
        found: dict[str, Pair] = {}
        for pair in self.pairs:
            mine, theirs = self.reference.stands.get(pair.reference), self.candidate.stands.get(pair.candidate)
            if pair.same and mine and theirs and pair.candidate.producer is not None:
                found.setdefault(mine, pair)
        return list(found.values())


@dataclass(frozen=True)
class Located:
    """Where two models part. feeds: what was fed; pair, compared: None where only coefficients show it."""

    sides: Sides
    difference: Difference
    node: Node
    feeds: Batch | None = None
    pair: Pair | None = None
    compared: Compared | None = None
    agreeing: tuple[Pair, ...] = ()
    runtime: Any = None  # what of the runtime is at fault (see `Model.culprit`)


def sides_of(reference: Model, candidate: Model) -> Sides | None:
    """None where one of the models can't be seen into."""
    try:
        mine, theirs = Normal(reference), Normal(candidate)
    except UnsupportedError:
        return None
    return Sides(mine, theirs, pairs(mine, theirs), max(reference.roundoff, candidate.roundoff))


def localise(
    reference: Model,
    candidate: Model,
    feeds: Batch | None,
    found: Correspondence | None,
    *,
    values: bool = True,
    coefficients: bool = True,
) -> Located | None:
    """The first difference and its likely cause; None where nothing inside shows one.

    feeds: a batch by the reference's names. found: what level 1 found. values, coefficients: which of the two are known to differ.
    """
    sides = sides_of(reference, candidate)
    if sides is None:
        return None
    first: Compared | None = None
    agreeing: tuple[Pair, ...] = ()
    if values and feeds:
        seen = _likeliest(compare_streams(sides, feeds))
        first = first_to_reach_an_output(sides, seen)
        agreeing = tuple(c.pair for c in seen if not c.differs)
    mismatch = found.mismatches[0] if coefficients and found is not None and found.mismatches else None
    place = {node.name: node.index for node in reversed(sides.reference.graph.nodes)}
    at = -1 if mismatch is None else place.get(mismatch.node.name, 0)
    if mismatch is not None and (first is None or at < first.pair.node.index or (at > first.pair.node.index and is_right(first.pair))):
        pair = next((p for p in sides.pairs if p.node.name == mismatch.node.name and p.other is not None), None)
        node = mismatch.node if pair is None else pair.node
        first = next((c for c in seen if pair is not None and c.pair.node is pair.node and c.differs), None) if values and feeds else None
    elif first is not None:
        pair, node = first.pair, first.pair.node
    else:
        return None
    cause = cause_of(sides, pair, first, feeds)
    if first is not None:
        shown = Difference(node.name, first.channel, first.position, first.expected, first.found, cause.text, "output", cause.batchnorm)
    else:
        off = cause.furthest
        shown = Difference(node.name, off.channel, off.position, off.expected, off.found, cause.text, off.what, cause.batchnorm)
    return Located(sides, shown, node, feeds, pair, first, agreeing)


def _likeliest(seen: list[Compared]) -> list[Compared]:
    """Of several values that a BatchNorm's fold may have left in one, the nearest, where none agrees: the others are no counterparts."""
    nearest: dict[Value, float] = {}
    for c in seen:
        nearest[c.pair.candidate] = min(nearest.get(c.pair.candidate, np.inf), c.ratio)
    return [c for c in seen if c.ratio <= nearest[c.pair.candidate] or nearest[c.pair.candidate] <= FUNCTION_LIMIT]


def first_to_reach_an_output(sides: Sides, seen: list[Compared]) -> Compared | None:
    """The first value whose difference reaches an output: another fold may leave a scale to a later layer, or change what nobody reads.

    A value of the candidate that agrees with one of the reference is no counterpart of another.
    """
    known = {c.pair.reference: c for c in seen}
    settled = {c.pair.candidate for c in seen if not c.differs}
    reaches: dict[Value, bool] = {}
    for node in reversed(sides.reference.graph.nodes):
        for value in node.outputs:
            agrees = value in known and not known[value].differs
            reaches[value] = not agrees and (value.is_output or any(reaches.get(v, False) for user, _ in value.users for v in user.outputs))
    return next((c for c in seen if c.differs and c.pair.candidate not in settled and reaches.get(c.pair.reference, True)), None)


# --- values, one by one ---------------------------------------------------------------------------------------------------------


def compare_streams(sides: Sides, feeds: Batch) -> list[Compared]:
    """Every comparable pair, in the reference's order: in float64, or in the stored types where one of the models has no oracle."""
    try:
        sides.exact = True
        return list(_compared(sides, feeds))
    except UnsupportedError:
        sides.exact = False
        return list(_compared(sides, feeds))


def _compared(sides: Sides, feeds: Batch) -> Iterator[Compared]:
    wanted = sides.comparable()
    mine = {sides.reference.stands[p.reference]: p for p in wanted}
    theirs: dict[str, list[Pair]] = {}
    for pair in wanted:
        theirs.setdefault(sides.candidate.stands[pair.candidate], []).append(pair)
    streams = [
        _by_pair(sides.reference.stream(feeds, mine, exact=sides.exact), {name: [p] for name, p in mine.items()}),
        _by_pair(sides.candidate.stream(feeds, theirs, exact=sides.exact), theirs),
        _by_pair(sides.reference.stream(feeds, mine, jitter=1, exact=sides.exact), {name: [p] for name, p in mine.items()}),
    ]
    with np.errstate(all="ignore"):
        for pair, (want, got, moved) in in_step(streams, wanted, sides.held):
            yield compare(pair, want, got, moved, sides.unit, exact=sides.exact)


def _by_pair(stream: Stream, names: Mapping[str, Sequence[Pair]]) -> Iterator[tuple[Pair, Values]]:
    """What isn't made of numbers (a sequence, a map, text) goes as nothing at all: what is behind it tells."""
    for name, value in stream:
        array = value if isinstance(value, np.ndarray) and value.dtype.kind not in "OUST" else np.zeros(0)
        for pair in names.get(name, ()):
            yield pair, array


def in_step(
    streams: Sequence[Iterator[tuple[Pair, Values]]], order: Sequence[Pair], held: Held
) -> Iterator[tuple[Pair, tuple[Values, ...]]]:
    """Each pair with its value from every stream. A stream is only asked for more while another one waits for it."""
    waiting: list[dict[Pair, Values]] = [{} for _ in streams]
    for pair in order:
        for stream, ready in zip(streams, waiting, strict=True):
            while pair not in ready:
                made = next(stream, None)
                if made is None:
                    break
                ready[made[0]] = made[1]
                del made
                held.note(waiting)
        if all(pair in ready for ready in waiting):
            yield pair, tuple(ready.pop(pair) for ready in waiting)
        else:
            for ready in waiting:
                ready.pop(pair, None)


def compare(pair: Pair, want: Values, got: Values, moved: Values, unit: float, *, exact: bool = True) -> Compared:
    """How far a value is off, against what moved weights make of it; without float64 also against the rounding of a few operations."""
    try:
        (want,), (got,), (moved,) = (plain({"": v}).values() for v in (want, got, moved))
    except UnsupportedError:
        return Compared(pair, 0.0)
    if want.shape != got.shape and want.size == got.size and want.ndim != got.ndim:
        got = got.reshape(want.shape)
    error, problem = deviation(want, got)
    if error is None:
        return Compared(pair, np.inf, problem=problem)
    ratio = np.inf if problem else value_ratio(want, got, moved, unit)
    if not exact and not problem and want.dtype.kind == "f" and error.size:
        ratio = min(ratio, float(error.max() / (ARITHMETIC * unit * (np.abs(want[np.isfinite(want)]).max(initial=0.0) or 1.0))))
    if ratio <= FUNCTION_LIMIT or not error.ndim or not error.size:
        return Compared(pair, ratio, problem=problem)
    if want.dtype.kind == "f":
        error = np.where(np.isfinite(want) != np.isfinite(got), np.inf, error)
    at = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
    axis = channel_axis(pair.node, want.ndim)
    border = False
    if want.ndim > 2 and not problem and min(want.shape[2:]) > 2:
        inner = _inside(pair.node, want.shape)
        border = inner is not None and value_ratio(want[inner], got[inner], moved[inner], unit) <= FUNCTION_LIMIT
    return Compared(pair, ratio, at, at[axis], float(want[at]), float(got[at]), border, problem)


def _inside(node: Node, shape: tuple[int, ...]) -> tuple[slice, ...] | None:
    """The places of a convolution's output that see no padding; None where there is no padding, or nothing else."""
    window = node.attrs.get("window")
    if not isinstance(window, Window) or not any((*window.before, *window.after)):
        return None
    ends = [
        (-(-before // stride), n - -(-after // stride))
        for n, stride, before, after in zip(shape[2:], window.stride, window.before, window.after, strict=True)
    ]
    return None if any(one >= other for one, other in ends) else (slice(None), slice(None), *(slice(one, other) for one, other in ends))


def value_ratio(want: Values, got: Values, moved: Values, unit: float) -> float:
    """The error of one value over its yardstick."""
    truth = Truth(lambda batch: {"": want}, [{}])
    truth.measure(lambda k: lambda batch: {"": moved}, least=1, most=1)
    tally = truth.compare(lambda batch: {"": got})[""]
    return float(function_ratio(tally, truth.noise[""], truth.scale("", unit)))


def channel_axis(node: Node, rank: int) -> int:
    """Along which axis of its output an operator's channels lie."""
    if rank < 2 or (node.op == "Contraction" and node.attrs.get("y", "")[-1:] in node.attrs.get("w", "")):
        return rank - 1
    return 1


# --- the runtime ------------------------------------------------------------------------------------------------------------------


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
    channel = at[channel_axis(pair.node, off.ndim)] if pair is not None and at else at[-1] if at else None
    shown = Difference(name, channel, at, float(found.expected[at]), float(found.found[at]), found.text)
    node = pair.node if pair is not None else sides.reference.graph.nodes[-1]
    return Located(sides, shown, node, feeds, pair, runtime=found)
