"""Levels 2 and 3 of `verify`: the reference's outputs, what rounding explains of an error in them, and the limits of that.

The yardstick is measured, not chosen: the reference is run again with every weight moved at random by up to half a unit in its last
place. That is all that its rounded weights say about the function, so a right fold moves the outputs by as much, and a bug by far more.
Where moved weights come to nothing (no number comes out, or none moves), nothing was measured, and a floor stands in: a unit of roundoff
for each linear operator that stands behind the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfold.data import Batch
from bnfold.errors import DataError, UnsupportedError

from .noise import FLOOR, Errors, Noise, Outputs, deviation, plain, sliced, variation, worst_part

Run = Callable[["Batch"], Outputs]

# How many times the yardstick a candidate may err. Of 1,800 right folds of small networks (tests/networks.py), none erred more than 1.7
# times, or 4.4 with float32 arithmetic; a channel off by 1e-3 in the digits sample errs 840 times. Between 1 and 100, the geometric middle.
FUNCTION_LIMIT = 10.0
# A part of an output is judged by its own yardstick, which is measured on fewer numbers.
PART_LIMIT = 3 * FUNCTION_LIMIT
# In the stored type: arithmetic and weights are rounded on both sides, so a right candidate errs as much as the reference itself.
DEPLOYED_LIMIT, HALF_LIMIT = 2.0, 3.0
ARITHMETIC = 3.0  # units of roundoff: a fold moves sums and shifts around, which costs as much in a network of two or three operators
SHALLOW = 3  # linear operators; behind each other in a deeper network their errors grow as a random walk does, with the root of the depth
PEAK_SLACK = 2.0  # the largest of many errors scatters more than their root mean square
CHANGED = 1e-4  # the share of integers that a yardstick of none still allows, over the limit
FEW, MANY = 3, 8  # runs with moved weights: as a rule, and where they scatter


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

        slack: units of roundoff by which two right runs differ: none in float64. most_bytes: of outputs and their noise, kept in memory.
        """
        self._depth, self.slack = depth, slack
        self.again: Callable[[], Truth] | None = None  # the same, measured afresh on data that are slightly moved
        self._run = run
        self.copies = 0  # samples among those that are others, slightly moved
        self.feeds: list[Batch] = []
        self.expected: list[dict[str, npt.NDArray[Any]]] = []
        self._noise: dict[str, Noise] = {}
        self._unmeasured: Callable[[], None] | None = None
        for batch in feeds:
            self._add(batch, plain(run(batch)))
            if (most_bytes := most_bytes - 2 * sum(array.nbytes for array in self.expected[-1].values())) < 0:
                return
        for batch in others:
            try:
                outputs = plain(run(batch))
            except (DataError, UnsupportedError):
                continue
            if self.expected and outputs.keys() == self.expected[0].keys():
                self._add(batch, outputs)

    def _add(self, batch: Batch, outputs: dict[str, npt.NDArray[Any]]) -> None:
        self.feeds.append(batch)
        self.expected.append(outputs)

    @property
    def noise(self) -> dict[str, Noise]:
        """By output; measured when it is first asked for, if that was left till then."""
        if self._unmeasured is not None:
            measure, self._unmeasured = self._unmeasured, None
            measure()
        return self._noise

    def measure_when_asked(self, measure: Callable[[], None]) -> None:
        """Leave a call of `measure` till somebody asks for the noise."""
        self._unmeasured = measure

    def measure(self, moved: Callable[[int], Run], *, least: int = FEW, most: int = MANY, settle: bool = True) -> None:
        """Run with moved weights: `least` times, and up to `most` where a run comes to nothing, or (`settle`) what they do scatters."""
        self._noise = {name: Noise() for name in self.names}
        for seed in range(most):
            known = min((len(n.runs) for n in self._noise.values()), default=least)
            if known >= least and not (settle and any(n.scatters for n in self._noise.values())):
                break
            run = moved(seed)
            runs = [plain(run(batch)) for batch in self.feeds]
            for name, noise in self._noise.items():
                noise.add([expected[name] for expected in self.expected], [got[name] for got in runs])
            del run  # before the next one is made

    def roundings(self) -> float:
        """How many units of roundoff the arithmetic of the stored type leaves uncertain in a network of this depth."""
        return ARITHMETIC * float(np.sqrt(max(self._depth() / SHALLOW, 1.0)))

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
        square = n = largest = 0.0
        for i, array in enumerate(arrays):
            finite = np.isfinite(array)
            size = np.abs(np.where(finite, array, 0.0))
            largest = max(largest, float(size.max(initial=0.0)))
            alive = finite if silent or not squares else finite & (squares[i] > 0)
            square, n = square + float(np.square(size[alive]).sum()), n + int(alive.sum())
        units = max(self.slack, float(self._depth()) if silent else 1.0)
        return Scale(largest, max(units * unit * float(np.sqrt(square / max(n, 1))), FLOOR * largest), count, False, silent)

    def compare(self, run: Run, unit: float = 0.0) -> dict[str, Errors]:
        """The errors of a run, output by output. unit: roundoff of the stored type."""
        found = {name: Errors() for name in self.names}
        for i, (batch, expected) in enumerate(zip(self.feeds, self.expected, strict=True)):
            got = plain(run(batch))
            for name, want in expected.items():
                errors = found[name]
                error, problem = deviation(want, got[name]) if name in got else (None, "is missing")
                if problem:
                    errors.problem = errors.problem or f"output {name} {problem}"
                if error is None:
                    continue
                errors.add(error)
                if self.noise and want.dtype.kind == "f":
                    ratio, where = worst_part(want, error, self.noise[name].square(i, want), self.slack * unit)
                    if ratio > errors.part:
                        errors.part, errors.where = ratio, where
        return found

    def settled(self, run: Run, unit: float) -> dict[str, tuple[Errors, Scale]] | None:
        """The errors of a run and the least floor that any noise leaves them; None where its parts are judged, or something is missing.

        A floor is measured on the numbers that moved weights move. Those that the run moved are some of them, however little.
        """
        if any(want.dtype.kind == "f" and sliced(want.shape) for outputs in self.expected for want in outputs.values()):
            return None
        found = {name: Errors() for name in self.names}
        squares, largest = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0.0)
        for batch, expected in zip(self.feeds, self.expected, strict=True):
            got = plain(run(batch))
            for name, want in expected.items():
                error, problem = deviation(want, got[name]) if name in got else (None, "")
                if error is None or problem:
                    return None
                found[name].add(error)
                if want.dtype.kind in "fc":
                    size = np.abs(want)
                    squares[name] += float(np.square(size[error > 0]).sum())
                    largest[name] = max(largest[name], float(size[np.isfinite(size)].max(initial=0.0)))
        discrete = {name for name in found if any(outputs[name].dtype.kind not in "fc" for outputs in self.expected)}
        return {
            name: (errors, Scale(1.0, CHANGED, errors.count, True))
            if name in discrete
            else (errors, Scale(largest[name], unit * float(np.sqrt(squares[name] / max(errors.count, 1))), errors.count, False))
            for name, errors in found.items()
        }

    def variation(self, probe: Callable[[Batch], Batch]) -> float:
        """By how much of its largest number an output differs from one batch to another, at most.

        probe: other data like the ones given, used where there is but one batch.
        """
        first = self.expected[0]
        same = [outputs for outputs in self.expected[1:] if all(outputs[n].shape == first[n].shape for n in self.names)]
        others = same or [plain(self._run(probe(self.feeds[0])))]
        return max((variation(first[n], each[n]) for n in self.names for each in others if each[n].shape == first[n].shape), default=0.0)


def function_ratio(errors: Errors, noise: Noise, scale: Scale) -> float:
    """The candidate's error over the yardstick: the worst of the whole, of single numbers, and of parts (to their own limit)."""
    if scale.discrete:
        return errors.mean_square / max(noise.rms**2, CHANGED)
    part = errors.part * FUNCTION_LIMIT / PART_LIMIT
    return max(_over(errors.rms, max(noise.rms, scale.floor)), _over(errors.peak, max(noise.peak, scale.floor)), part)


def deployed_ratio(candidate: Errors, reference: Errors, noise: Noise, scale: Scale, roundings: float = ARITHMETIC) -> float:
    """The candidate's error over what is usual in the stored type: the reference's own error and its noise, added as independent errors.

    roundings: units of roundoff that its arithmetic leaves uncertain, however exact the reference's sums happen to be.
    """
    if scale.discrete:
        return DEPLOYED_LIMIT / FUNCTION_LIMIT * candidate.mean_square / max(reference.mean_square, noise.rms**2, CHANGED)
    floor = scale.floor if scale.silent else roundings * scale.floor
    rms, peak = (float(np.hypot(own, moved)) for own, moved in ((reference.rms, noise.rms), (reference.peak, noise.peak)))
    return max(_over(candidate.rms, max(rms, floor)), _over(candidate.peak, max(peak, floor)) / PEAK_SLACK)


def chance(count: float) -> float:
    """How many times too large a root mean square of so many errors may come out: three of its own standard deviations, 1/sqrt(2n)."""
    return 1 + 3 / float(np.sqrt(2 * max(count, 1)))


def _over(error: float, yardstick: float) -> float:
    return 0.0 if error == 0 else error / yardstick if yardstick else np.inf
