"""Levels 2 and 3 of `verify`: how far one run lies from another, and what rounding explains of that.

The yardstick is measured, not chosen: the reference is run again with every weight moved at random by up to half a unit in its last
place. That is all that its rounded weights say about the function, so a right fold moves the outputs by as much, and a bug by far more.
Where moved weights come to nothing (no number comes out, or none moves), nothing was measured, and a floor stands in: a unit of roundoff
for each linear operator that stands behind the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bnfold.algebra.affine import Array
from bnfold.errors import DataError, UnsupportedError

if TYPE_CHECKING:
    from bnfold.data import Batch

Outputs = Mapping[str, npt.NDArray[Any]]
Run = Callable[["Batch"], Outputs]

# How many times the yardstick a candidate may err. Of 1,800 right folds of small networks (tests/networks.py), none erred more than 1.7
# times, or 4.4 with float32 arithmetic; a channel off by 1e-3 in the digits sample errs 840 times. Between 1 and 100, the geometric middle.
FUNCTION_LIMIT = 10.0
# A part of an output is judged by its own yardstick, which is measured on fewer numbers.
PART_LIMIT = 3 * FUNCTION_LIMIT
PART_SIZE = 8  # elements; smaller parts say too little
# In the stored type: arithmetic and weights are rounded on both sides, so a right candidate errs as much as the reference itself.
DEPLOYED_LIMIT, HALF_LIMIT = 2.0, 3.0
ARITHMETIC = 3.0  # units of roundoff: a fold moves sums and shifts around, which costs as much in a network of two or three operators
SHALLOW = 3  # linear operators; behind each other in a deeper network their errors grow as a random walk does, with the root of the depth
PEAK_SLACK = 2.0  # the largest of many errors scatters more than their root mean square
FLOOR = 1e-13  # of the largest output: what float64 itself leaves uncertain
CHANGED = 1e-4  # the share of integers that a yardstick of none still allows, over the limit
DEAD = 1e-3  # of the usual noise: what a part that should be all zeros may show
FEW, MANY = 3, 8  # runs with moved weights: as a rule, and where they scatter
SCATTER = 0.25  # relative


@dataclass
class Tally:
    """Errors of one output, gathered over the samples. part: the worst ratio of a part of it; problem: what no number says."""

    square: float = 0.0
    peak: float = 0.0
    count: int = 0
    part: float = 0.0
    where: str = ""
    problem: str = ""

    def add(self, error: Array) -> None:
        self.square += float(np.square(error).sum())
        self.peak = max(self.peak, float(error.max(initial=0.0)))
        self.count += error.size

    @property
    def rms(self) -> float:
        return float(np.sqrt(self.square / max(self.count, 1)))


@dataclass
class Noise:
    """What moved weights do to one output. runs: one tally a seed; squares: for each batch, the mean square by element.

    problem: what no number says, where it is a matter of the weights' rounding whether a number comes out.
    """

    runs: list[Tally] = field(default_factory=list)
    squares: list[Array] = field(default_factory=list)
    problem: str = ""

    def add(self, wanted: Sequence[npt.NDArray[Any]], got: Sequence[npt.NDArray[Any]]) -> None:
        """One run, in all batches; left out where less than half of the reference's numbers come out."""
        errors, counted = [], []
        for want, have in zip(wanted, got, strict=True):
            error, problem = deviation(want, have)
            self.problem = self.problem or problem
            whole = _numbers(want) if error is None else _numbers(want) & _numbers(have)
            if error is None or 2 * whole.sum() < _numbers(want).sum():
                return
            errors.append(error)
            counted.append(whole)
        self.runs.append(Tally())
        for i, (error, whole) in enumerate(zip(errors, counted, strict=True)):
            self.runs[-1].add(error[whole])
            if i == len(self.squares):
                self.squares.append(np.square(error))
            else:
                self.squares[i] += np.where(whole, np.square(error) - self.squares[i], 0.0) / len(self.runs)

    def square(self, batch: int, like: npt.NDArray[Any]) -> Array:
        """The mean square by element, 0 where nothing was measured."""
        return self.squares[batch] if self.squares else np.zeros(like.shape)

    @property
    def rms(self) -> float:
        """Their root mean square, and three deviations more where the runs scatter: then few independent numbers came out."""
        each = np.array([t.rms for t in self.runs])
        return float(each.mean() + 3 * each.std()) if each.size else 0.0

    @property
    def peak(self) -> float:
        return max((t.peak for t in self.runs), default=0.0)

    @property
    def scatters(self) -> bool:
        each = np.array([t.rms for t in self.runs])
        return bool(each.size and each.std() > SCATTER * each.mean())


@dataclass(frozen=True)
class Scale:
    """The size of one output. floor: an error below which nothing can be told; discrete: integers, booleans, text.

    silent: whether moved weights move none of its numbers, so that the floor is all that there is to go by.
    """

    largest: float
    floor: float
    count: int
    discrete: bool
    silent: bool = False


class Truth:
    """The reference's outputs on all samples, and the yardstick."""

    def __init__(
        self,
        run: Run,
        feeds: Iterable[Batch],
        *,
        others: Iterable[Batch] = (),
        depth: Callable[[], int] = lambda: 1,
        slack: float = 0.0,
        most_bytes: int = 1 << 29,
    ) -> None:
        """others: data of other sizes, left out where the reference doesn't take them. depth: of the reference, in linear operators.

        slack: units of roundoff by which two right runs differ: none in float64. most_bytes: of outputs and their noise, held.
        """
        self._depth, self.slack = depth, slack
        self.again: Callable[[], Truth] | None = None  # the same, measured afresh on data that are slightly moved
        self._run = run
        self.feeds: list[Batch] = []
        self.expected: list[dict[str, npt.NDArray[Any]]] = []
        self.noise: dict[str, Noise] = {}
        held = 0
        for batch in feeds:
            outputs = plain(run(batch))
            self.feeds.append(batch)
            self.expected.append(outputs)
            held += 2 * sum(v.nbytes for v in outputs.values())
            if held > most_bytes:
                break
        for batch in others if held <= most_bytes else ():
            try:
                outputs = plain(run(batch))
            except (DataError, UnsupportedError):
                continue
            if self.expected and outputs.keys() == self.expected[0].keys():
                self.feeds.append(batch)
                self.expected.append(outputs)

    def measure(self, moved: Callable[[int], Run], *, least: int = FEW, most: int = MANY, settle: bool = True) -> None:
        """Run with moved weights: `least` times, and up to `most` where a run comes to nothing, or (`settle`) what they do scatters."""
        self.noise = {name: Noise() for name in self.names}
        for seed in range(most):
            known = min((len(n.runs) for n in self.noise.values()), default=least)
            if known >= least and not (settle and any(n.scatters for n in self.noise.values())):
                break
            run = moved(seed)
            runs = [plain(run(batch)) for batch in self.feeds]
            for name, noise in self.noise.items():
                noise.add([expected[name] for expected in self.expected], [got[name] for got in runs])
            del run  # before the next one is made

    def roundings(self, depth: bool = True) -> float:
        """How many units of roundoff the arithmetic of the stored type leaves uncertain. depth: whether that of the network counts."""
        return ARITHMETIC * float(np.sqrt(max(self._depth() / SHALLOW, 1.0) if depth else 1.0))

    @property
    def names(self) -> list[str]:
        return list(self.expected[0]) if self.expected else []

    def scale(self, name: str, unit: float) -> Scale:
        """unit: roundoff of the stored type; an output can't be more certain than that. Constants (no noise) don't count."""
        arrays = [outputs[name] for outputs in self.expected]
        count = sum(a.size for a in arrays)
        if any(a.dtype.kind not in "fc" for a in arrays):
            return Scale(1.0, CHANGED, count, True)
        squares = self.noise[name].squares if name in self.noise else []
        silent = bool(self.noise) and not any(each.any() for each in squares)
        square = n = 0.0
        largest = 0.0
        for i, array in enumerate(arrays):
            finite = np.isfinite(array)
            size = np.abs(np.where(finite, array, 0.0))
            largest = max(largest, float(size.max(initial=0.0)))
            alive = finite if silent or not squares else finite & (squares[i] > 0)
            square, n = square + float(np.square(size[alive]).sum()), n + int(alive.sum())
        units = max(self.slack, float(self._depth()) if silent else 1.0)
        return Scale(largest, max(units * unit * float(np.sqrt(square / max(n, 1))), FLOOR * largest), count, False, silent)

    def compare(self, run: Run, unit: float = 0.0) -> dict[str, Tally]:
        """The errors of a run, output by output. unit: roundoff of the stored type."""
        tallies = {name: Tally() for name in self.names}
        for i, (batch, expected) in enumerate(zip(self.feeds, self.expected, strict=True)):
            got = plain(run(batch))
            for name, want in expected.items():
                tally = tallies[name]
                if name not in got:
                    tally.problem = tally.problem or f"output {name} is missing"
                    continue
                error, problem = deviation(want, got[name])
                if error is None or problem:
                    tally.problem = tally.problem or f"output {name} {problem}"
                if error is None:
                    continue
                tally.add(error)
                if self.noise and want.dtype.kind == "f":
                    ratio, where = worst_part(want, error, self.noise[name].square(i, want), self.slack * unit)
                    if ratio > tally.part:
                        tally.part, tally.where = ratio, where
        return tallies

    def constant(self, probe: Callable[[Batch], Batch], least: float) -> bool:
        """Whether every output is the same whatever goes in, or varies by less than this share of its largest number.

        probe: other data like the ones given, used where there is but one batch.
        """
        same = [outputs for outputs in self.expected[1:] if all(outputs[n].shape == self.expected[0][n].shape for n in self.names)]
        others = same or [plain(self._run(probe(self.feeds[0])))]
        return not any(
            varies([self.expected[0][name], *(o[name] for o in others if o[name].shape == self.expected[0][name].shape)], least)
            for name in self.names
        )


def deviation(want: npt.NDArray[Any], got: npt.NDArray[Any]) -> tuple[Array | None, str]:
    """|got - want| element by element, 0 where neither is a finite number; 0 and 1 for integers, booleans and text.

    None with the reason where the shapes differ; a reason alone where only one of the two is a number.
    """
    if want.shape != got.shape:
        return None, f"has shape {_shape(got.shape)} instead of {_shape(want.shape)}"
    if want.dtype.kind not in "fc":
        return (want != got).astype(np.float64), ""
    got = got.astype(np.complex128 if got.dtype.kind == "c" else np.float64)
    usable, whole = np.isfinite(want), np.isfinite(got)
    with np.errstate(all="ignore"):
        error = np.where(usable & whole, np.abs(got - want), 0.0)
    if (usable & ~whole).any():
        k = np.argwhere(usable & ~whole)[0]
        return error, f"is {got[tuple(k)]} at {_shape(k)}, where the reference gives {want[tuple(k)]:.6g}"
    if (~usable & whole).any():
        k = np.argwhere(~usable & whole)[0]
        return error, f"is {got[tuple(k)]:.6g} at {_shape(k)}, where the reference gives {want[tuple(k)]}"
    if ((want != got) & ~(np.isnan(want) & np.isnan(got)) & ~usable).any():
        return error, "is infinite with the other sign, or not a number where the reference is infinite"
    return error, ""


def _numbers(array: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    return np.isfinite(array) if array.dtype.kind in "fc" else np.ones(array.shape, bool)


def worst_part(want: Array, error: Array, noise: Array, slack: float = 0.0) -> tuple[float, str]:
    """The largest ratio of error to noise over the slices along each axis, so that one bad channel doesn't hide among the others.

    A slice's noise may be small by chance, or none where few weights move, so its relative noise counts as at least the median of its axis.
    slack: a relative error that says nothing.
    """
    worst, where = 0.0, ""
    alive = (noise > 0) & np.isfinite(want)
    floor = FLOOR * float(np.abs(np.where(np.isfinite(want), want, 0.0)).max(initial=0.0))
    for axis, length in enumerate(want.shape):
        if length < 2 or want.size // length < PART_SIZE:
            continue
        others = tuple(i for i in range(want.ndim) if i != axis)
        counted = np.where(alive.any(others, keepdims=True), alive, np.isfinite(want))
        size = np.sqrt(np.square(np.where(counted, want, 0.0)).sum(others) / np.maximum(counted.sum(others), 1))
        own = np.sqrt(noise.mean(others))
        got = np.sqrt(np.square(error).mean(others))
        known = (size > 0) & (own > 0)
        if not known.any():
            continue
        usual = float(np.median(own[known] / size[known]))
        yardstick = np.maximum(np.maximum(own, max(usual, slack) * size), DEAD * np.sqrt(noise.mean()))
        ratios = np.where(got > floor, got / np.maximum(yardstick, floor or 1.0), 0.0)
        k = int(ratios.argmax())
        if ratios[k] > worst:
            worst, where = float(ratios[k]), f"at {k} along axis {axis}"
    return worst, where


def function_ratio(tally: Tally, noise: Noise, scale: Scale) -> float:
    """The candidate's error over the yardstick: the worst of the whole, of single numbers, and of parts (to their own limit)."""
    if scale.discrete:
        return (tally.square / max(tally.count, 1)) / max(noise.rms**2, CHANGED)
    part = tally.part * FUNCTION_LIMIT / PART_LIMIT
    return max(_over(tally.rms, max(noise.rms, scale.floor)), _over(tally.peak, max(noise.peak, scale.floor)), part)


def deployed_ratio(candidate: Tally, reference: Tally, noise: Noise, scale: Scale, roundings: float = ARITHMETIC) -> float:
    """The candidate's error over what is usual in the stored type: the reference's own error and its noise, added as independent errors.

    roundings: units of roundoff that its arithmetic leaves uncertain, however exact the reference's sums happen to be.
    """
    if scale.discrete:
        usual = max(reference.square / max(reference.count, 1), noise.rms**2, CHANGED)
        return DEPLOYED_LIMIT / FUNCTION_LIMIT * (candidate.square / max(candidate.count, 1)) / usual
    floor = scale.floor if scale.silent else roundings * scale.floor
    rms, peak = (float(np.hypot(own, moved)) for own, moved in ((reference.rms, noise.rms), (reference.peak, noise.peak)))
    return max(_over(candidate.rms, max(rms, floor)), _over(candidate.peak, max(peak, floor)) / PEAK_SLACK)


def chance(count: int) -> float:
    """How many times too large a root mean square of so many errors may come out: three of its own standard deviations, 1/sqrt(2n)."""
    return 1 + 3 / float(np.sqrt(2 * max(count, 1)))


def _over(error: float, yardstick: float) -> float:
    return 0.0 if error == 0 else error / yardstick if yardstick else np.inf


def varies(arrays: Sequence[npt.NDArray[Any]], least: float = 1e-9) -> bool:
    """Whether arrays of one shape differ by more than `least` of their largest number."""
    first = arrays[0]
    for other in arrays[1:]:
        if first.dtype.kind not in "fc":
            changed = bool((first != other).any())
        else:
            finite = np.isfinite(first) & np.isfinite(other)
            one, two = np.where(finite, first, 0.0), np.where(finite, other, 0.0)
            changed = bool((np.abs(two - one) > least * np.abs(one).max(initial=0.0)).any())
        if changed:
            return True
    return False


def plain(outputs: Outputs) -> dict[str, npt.NDArray[Any]]:
    """Outputs of any floating-point type in float64."""
    found = {}
    for name, value in outputs.items():
        array = _one_array(value)
        if array is None:
            raise UnsupportedError(f"output {name!r} is neither a tensor nor made of tensors, and can't be compared")
        found[name] = array.astype(np.float64) if array.dtype.kind in "fV" else array  # ml_dtypes' types are of kind V
    return found


def _one_array(value: Any) -> npt.NDArray[Any] | None:
    """A tensor as it is; a sequence of tensors, a map of numbers and a sequence of maps as one array. None where that can't be."""
    if isinstance(value, Mapping):
        value = [value[key] for key in sorted(value)]
    if not isinstance(value, list):
        return np.asarray(value) if isinstance(value, (np.ndarray, np.generic, int, float)) else None
    parts = [_one_array(each) for each in value]
    arrays = [part for part in parts if part is not None]
    if not arrays or len(arrays) < len(parts):
        return None
    if len({a.shape for a in arrays}) == 1:
        return np.stack(arrays)
    return np.concatenate([np.array([len(a.shape), *a.shape]) for a in arrays] + [a.ravel() for a in arrays])  # the shapes count too


def _shape(shape: Iterable[Any]) -> str:
    return "(" + ", ".join(str(int(n)) for n in shape) + ")"
