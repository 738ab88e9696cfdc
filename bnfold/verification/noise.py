"""How far one run lies from another, and what moved weights do to the outputs: errors, gathered over the samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfold.algebra.affine import Array
from bnfold.errors import UnsupportedError

Outputs = Mapping[str, npt.NDArray[Any]]

FLOOR = 1e-13  # of the largest output: what float64 itself leaves uncertain
PART_SIZE = 8  # elements; smaller parts of an output say too little
DEAD = 1e-3  # of the usual noise: what a part that should be all zeros may show
SCATTER = 0.25  # of their mean, by which the noise of several runs scatters where few independent numbers came out


@dataclass
class Errors:
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
    def mean_square(self) -> float:
        return self.square / max(self.count, 1)

    @property
    def rms(self) -> float:
        return float(np.sqrt(self.mean_square))


@dataclass
class Noise:
    """What moved weights do to one output. runs: the errors of each seed; squares: for each batch, the mean square by element.

    problem: what no number says, where it is a matter of the weights' rounding whether a number comes out.
    """

    runs: list[Errors] = field(default_factory=list)
    squares: list[Array] = field(default_factory=list)
    problem: str = ""

    def add(self, wanted: Sequence[npt.NDArray[Any]], got: Sequence[npt.NDArray[Any]]) -> None:
        """One run, in all batches; left out where less than half of the reference's numbers come out."""
        found = []
        for want, have in zip(wanted, got, strict=True):
            error, problem = deviation(want, have)
            self.problem = self.problem or problem
            whole = numbers(want) if error is None else numbers(want) & numbers(have)
            if error is None or 2 * whole.sum() < numbers(want).sum():
                return
            found.append((error, whole))
        self.runs.append(Errors())
        for i, (error, whole) in enumerate(found):
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
        each = np.array([run.rms for run in self.runs])
        return float(each.mean() + 3 * each.std()) if each.size else 0.0

    @property
    def peak(self) -> float:
        return max((run.peak for run in self.runs), default=0.0)

    @property
    def spread(self) -> float:
        """Over how many numbers it spreads: (sum v)^2 / sum v^2 of their variances v, all of them where all are moved alike; 0 for none."""
        most = max((float(each.max(initial=0.0)) for each in self.squares), default=0.0)
        if not most or not np.isfinite(most):
            return 0.0
        total, squares = (sum(float(((each / most) ** power).sum()) for each in self.squares) for power in (1, 2))
        return total**2 / squares

    @property
    def scatters(self) -> bool:
        each = np.array([run.rms for run in self.runs])
        return bool(each.size and each.std() > SCATTER * each.mean())


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
    if (usable != whole).any():
        at = tuple(np.argwhere(usable & ~whole if (usable & ~whole).any() else ~usable & whole)[0])
        return error, f"is {got[at]:.6g} at {_shape(at)}, where the reference gives {want[at]:.6g}"
    if ((want != got) & ~(np.isnan(want) & np.isnan(got)) & ~usable).any():
        return error, "is infinite with the other sign, or not a number where the reference is infinite"
    return error, ""


def numbers(array: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which elements are finite, or no floats at all."""
    return np.isfinite(array) if array.dtype.kind in "fc" else np.ones(array.shape, bool)


def variation(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """By how much of the first one's largest number two arrays differ, at most; without end where their shapes do."""
    if one.shape != other.shape:
        return np.inf
    if one.dtype.kind not in "fc":
        return np.inf if (one != other).any() else 0.0
    finite = np.isfinite(one) & np.isfinite(other)
    size, off = (float(np.abs(each).max(initial=0.0)) for each in (one[finite], (other - one)[finite]))
    return 0.0 if not off else off / size if size else np.inf


def sliced(shape: Sequence[int]) -> bool:
    """Whether an output of this shape is also judged by parts: slices along an axis that are large enough to tell."""
    size = math.prod(shape)
    return any(length >= 2 and size // length >= PART_SIZE for length in shape)


def worst_part(want: Array, error: Array, noise: Array, slack: float = 0.0) -> tuple[float, str]:
    """The largest ratio of error to noise over the slices along each axis, so that one bad channel doesn't hide among the others.

    A slice's noise may be small by chance, or none where few weights move, so its relative noise counts as at least the median of its axis.
    slack: a relative error that says nothing.
    """
    worst, where = 0.0, ""
    finite = np.isfinite(want)
    alive = (noise > 0) & finite
    floor = FLOOR * float(np.abs(np.where(finite, want, 0.0)).max(initial=0.0))
    for axis, length in enumerate(want.shape):
        if length < 2 or want.size // length < PART_SIZE:
            continue
        others = tuple(i for i in range(want.ndim) if i != axis)
        counted = np.where(alive.any(others, keepdims=True), alive, finite)
        size = np.sqrt(np.square(np.where(counted, want, 0.0)).sum(others) / np.maximum(counted.sum(others), 1))
        own, got = np.sqrt(noise.mean(others)), np.sqrt(np.square(error).mean(others))
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
