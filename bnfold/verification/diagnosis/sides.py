"""Both models in normal form, side by side, and their values, compared one by one as both compute them.

Each value is compared as soon as both models have it, then dropped. The yardstick of a value is the reference with moved weights, computed
along with them (see `yardstick`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfold.algebra.graph import Node, Window
from bnfold.data import Batch
from bnfold.errors import UnsupportedError
from bnfold.model import Model
from bnfold.report import Difference
from bnfold.running import Stream

from ..noise import deviation, plain
from ..normal_form import Normal
from ..pairing import Pair, comparable, counterparts
from ..roundoff import output_axis
from ..yardstick import ARITHMETIC, FUNCTION_LIMIT, Truth, function_ratio

Values = npt.NDArray[Any]


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
    """Both models, with what corresponds in them. unit: roundoff of the coarser; exact: whether values are computed in float64."""

    reference: Normal
    candidate: Normal
    pairs: list[Pair]
    unit: float
    exact: bool = True

    def comparable(self, *, alike: bool = False) -> list[Pair]:
        """Pairs whose values both models compute themselves, in the reference's order: the first for each value of it; alike: if there is
        one, the first that operators of one kind make."""
        found: dict[str, Pair] = {}
        for pair in sorted(self.pairs, key=lambda pair: alike and not _alike(pair)):
            mine, theirs = self.reference.stands.get(pair.reference), self.candidate.stands.get(pair.candidate)
            if pair.same and mine and theirs and pair.candidate.producer is not None:
                found.setdefault(mine, pair)
        return sorted(found.values(), key=lambda pair: pair.node.index)


def _alike(pair: Pair) -> bool:
    """Whether operators of one kind, with coefficients of one shape, make the two values."""
    mine, other = pair.node, pair.other
    return other is not None and comparable(mine, other) and all(p.shape == other.params[role].shape for role, p in mine.params.items())


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
    return Sides(mine, theirs, counterparts(mine.plan, theirs.plan), max(reference.roundoff, candidate.roundoff))


def compare_values(sides: Sides, feeds: Batch) -> list[Compared]:
    """Every comparable pair, in the reference's order: in float64, or in the stored types where one of the models has no oracle."""
    try:
        sides.exact = True
        return list(_compared(sides, feeds))
    except UnsupportedError:
        sides.exact = False
        return list(_compared(sides, feeds))


def _compared(sides: Sides, feeds: Batch) -> Iterator[Compared]:
    runs = [(sides.reference, None, sides.exact), (sides.candidate, None, sides.exact), (sides.reference, 1, sides.exact)]
    with np.errstate(all="ignore"):
        for pair, (want, got, moved) in together(sides, feeds, runs):
            yield _compare(pair, want, got, moved, sides)


def together(
    sides: Sides, feeds: Batch, runs: Iterable[tuple[Normal, int | None, bool]], *, alike: bool = False
) -> Iterator[tuple[Pair, tuple[Values, ...]]]:
    """Every comparable pair with its value from several runs: of one of the sides, with moved weights (a seed) or without, in float64 or in
    the stored types. alike: see `Sides.comparable`."""
    wanted = sides.comparable(alike=alike)
    names: dict[Normal, dict[str, list[Pair]]] = {sides.reference: {}, sides.candidate: {}}
    for pair in wanted:
        names[sides.reference].setdefault(sides.reference.stands[pair.reference], []).append(pair)
        names[sides.candidate].setdefault(sides.candidate.stands[pair.candidate], []).append(pair)
    streams = [_by_pair(side.stream(feeds, names[side], jitter=jitter, exact=exact), names[side]) for side, jitter, exact in runs]
    yield from _in_step(streams, wanted)


def _by_pair(stream: Stream, names: Mapping[str, Sequence[Pair]]) -> Iterator[tuple[Pair, Values]]:
    """What isn't made of numbers (a sequence, a map, text) goes as nothing at all: what is behind it tells."""
    for name, value in stream:
        array = value if isinstance(value, np.ndarray) and value.dtype.kind not in "OUST" else np.zeros(0)
        for pair in names.get(name, ()):
            yield pair, array


def _in_step(streams: Sequence[Iterator[tuple[Pair, Values]]], order: Sequence[Pair]) -> Iterator[tuple[Pair, tuple[Values, ...]]]:
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
        if all(pair in ready for ready in waiting):
            yield pair, tuple(ready.pop(pair) for ready in waiting)
        for ready in waiting:
            ready.pop(pair, None)


def _compare(pair: Pair, want: Values, got: Values, moved: Values, sides: Sides) -> Compared:
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
    ratio = np.inf if problem else _ratio(want, got, moved, sides.unit)
    if not sides.exact and not problem and want.dtype.kind == "f" and error.size:
        rounding = ARITHMETIC * sides.unit * (np.abs(want[np.isfinite(want)]).max(initial=0.0) or 1.0)
        ratio = min(ratio, float(error.max() / rounding))
    if ratio <= FUNCTION_LIMIT or not error.ndim or not error.size:
        return Compared(pair, ratio, problem=problem)
    if want.dtype.kind == "f":
        error = np.where(np.isfinite(want) != np.isfinite(got), np.inf, error)
    at = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
    inner = None if problem else _inside(pair.node, want.shape)
    border = inner is not None and _ratio(want[inner], got[inner], moved[inner], sides.unit) <= FUNCTION_LIMIT
    return Compared(pair, ratio, at, at[output_axis(pair.node, want.ndim)], float(want[at]), float(got[at]), border, problem)


def _inside(node: Node, shape: tuple[int, ...]) -> tuple[slice, ...] | None:
    """The places of a convolution's output that see no padding; None where there is no padding, or nothing else."""
    window = node.attrs.get("window")
    if len(shape) <= 2 or min(shape[2:]) <= 2 or not isinstance(window, Window) or not any((*window.before, *window.after)):
        return None
    ends = [
        (-(-before // stride), n - -(-after // stride))
        for n, stride, before, after in zip(shape[2:], window.stride, window.before, window.after, strict=True)
    ]
    return None if any(one >= other for one, other in ends) else (slice(None), slice(None), *(slice(one, other) for one, other in ends))


def _ratio(want: Values, got: Values, moved: Values, unit: float) -> float:
    """The error of one value over its yardstick."""
    truth = Truth(lambda batch: {"": want}, [{}])
    truth.measure(lambda k: lambda batch: {"": moved}, least=1, most=1)
    return float(function_ratio(truth.compare(lambda batch: {"": got})[""], truth.noise[""], truth.scale("", unit)))
