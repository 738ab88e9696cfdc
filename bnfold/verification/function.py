"""Level 2 of `verify`: both models in float64 on the same inputs, against what rounded weights explain (see `yardstick`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bnfold.data import Batch
from bnfold.errors import DataError, UnsupportedError
from bnfold.report import Function
from bnfold.running import Runner
from bnfold.text import listed

from .comparison import Comparison
from .inputs import moved, sample_count
from .noise import Errors, Noise, Outputs, numbers
from .yardstick import FEW, FUNCTION_LIMIT, MANY, Run, Scale, Truth, function_ratio

PLENTY = 256  # numbers of an output, from which one run with moved weights tells the noise well enough for a quick check
MOVED = 2  # runs with moved weights at each of the other sizes
ELSEWHERE = 10.0  # another path errs by far more, and one sample's yardstick is rough
ENOUGH = 64  # numbers of an output; with fewer, the same samples are fed again, slightly moved,
ENOUGH_SAMPLES = 4  # until there are so many: each costs a run for every yardstick


@dataclass(frozen=True)
class Deviation:
    """The candidate's errors in one output, the yardstick, and the ratio of the two."""

    errors: Errors
    noise: Noise
    scale: Scale
    ratio: float

    @property
    def error(self) -> float:
        """The largest, relatively to the largest number."""
        return self.errors.peak / (self.scale.largest or 1.0)

    @property
    def yardstick(self) -> float:
        """What rounded weights explain, likewise."""
        return max(self.noise.peak, self.scale.floor) / (self.scale.largest or 1.0)


Deviations = dict[str, Deviation]  # by output


def truth_of(both: Comparison, feeds: Iterable[Batch], others: Iterable[Batch], *, quick: bool) -> tuple[Truth | None, str]:
    """The reference in float64 with its yardstick, or in its stored type on the first provider and why; None where it runs in neither.

    others: data of other sizes. quick: one run with moved weights does, where there are plenty of outputs.
    """
    feeds, others, reference = list(feeds), list(others), both.reference
    lacking: list[str] = []
    unfit = False
    for make in (reference.exact, partial(reference.session, next(iter(both.providers), "cpu"), reference.optimisations[0])):
        try:
            return _truth(both, make, feeds, others, exact=not lacking, quick=quick), "; ".join(lacking)
        except (UnsupportedError, DataError) as error:
            if isinstance(error, DataError):
                if not both.made_up:
                    raise
                unfit = True
            lacking.append(str(error))
    how = (
        "by --input-shape or input_shapes, or give data" if both.thorough else "by --input-shape, or give an example of the input in Python"
    )
    return None, "; ".join(lacking) + f" (these are random data: say which shapes fit, {how})" * unfit


def _truth(both: Comparison, make: Callable[..., Runner], feeds: list[Batch], others: list[Batch], *, exact: bool, quick: bool) -> Truth:
    both.progress("outputs, reference", 0, None)

    def truth(feeds: list[Batch]) -> Truth:
        found = Truth(make().run, feeds, others=others, depth=lambda: both.depth)
        if not exact:
            found.slack = found.roundings()
        return found

    found = truth(feeds)
    sizes = [min((a.size for a in outputs.values() if a.size), default=0) for outputs in found.expected]
    samples = sum(sample_count(batch) for batch in feeds)
    if both.thorough and 0 < sum(sizes) < ENOUGH and samples < ENOUGH_SAMPLES:
        copies = list(moved(feeds, -(-ENOUGH_SAMPLES // samples) - 1, both.seed))
        found = truth([*feeds, *copies])
        found.copies = sum(map(sample_count, copies))
    least = 1 if quick and sum(sizes) >= PLENTY else FEW

    def measure() -> None:
        both.progress("outputs, rounded weights", 0, None)
        found.measure(lambda k: make(jitter=both.seed + k + 1).run, least=least, settle=both.thorough and least > 1)

    if both.thorough or not exact:
        measure()
    else:
        found.measure_when_asked(measure)

    def again() -> Truth:
        other = truth(list(moved(feeds, 1, both.seed + 1)))
        other.measure(lambda k: make(jitter=both.seed + MANY + k + 1).run, least=MANY)
        return other

    found.again = again
    return found


def compare_functions(both: Comparison, truth: Truth | None, lacking: str) -> tuple[Function, Deviations]:
    """The candidate against the truth, and its outputs by name. lacking: why the truth isn't in float64, "" where it is."""
    if truth is None:
        return Function("inconclusive", reason=lacking), {}
    both.progress("outputs, candidate", 0, None)
    candidate = both.candidate
    how = f"by the noise of the stored type, since {lacking}" if lacking else ""
    try:
        run: Run = (candidate.session("cpu", candidate.optimisations[0]) if lacking else candidate.exact()).run
        if not both.thorough and not lacking:
            run = _remembered(run)
            if settled := _settled(both, truth, run):
                return _judged(settled, truth, how), settled
        deviations = _deviations(both, truth, run)
        found = _judged(deviations, truth, how)
        if found.verdict == "different" and truth.again is not None and not any(each.errors.problem for each in deviations.values()):
            # Before a fold is refused, the yardstick is measured anew, with more runs and on other data.
            other = truth.again()
            second = _deviations(both, other, run)
            if (doubt := _judged(second, other, how)).verdict == "equivalent":
                return doubt, second
    except UnsupportedError as error:
        return Function("skipped", reason=str(error)), {}
    except DataError as error:
        return Function("different", np.inf, reason=f"the candidate doesn't run on what the reference takes: {error}"), {}
    return found, deviations


def _remembered(run: Run) -> Run:
    """The same, without running again on a batch that it has run on."""
    results: dict[int, tuple[Batch, Outputs]] = {}  # the batch is held, or another might be given its number

    def once(batch: Batch) -> Outputs:
        if id(batch) not in results:
            results[id(batch)] = batch, run(batch)
        return results[id(batch)][1]

    return once


def _settled(both: Comparison, truth: Truth, run: Run) -> Deviations:
    """The candidate's errors where they are within the limit whatever moved weights do, which then need not be run; else none.

    The yardstick that is stated is then what rounding the outputs explains, once.
    """
    found = {}
    for name, (errors, scale) in (truth.settled(run, both.unit) or {}).items():
        ratio = function_ratio(errors, Noise(), scale)
        if ratio > FUNCTION_LIMIT:
            return {}
        found[name] = Deviation(errors, Noise(), dataclasses.replace(scale, floor=both.unit * scale.largest), ratio)
    return found


def compare_unrounded(both: Comparison, feeds: Iterable[Batch], found: Function) -> Function:
    """Both models without the rounding of activations to integers. found: what came of them with it, which stands where nothing does.

    With it, an activation that lies on a step falls on either side, in a right fold too, and steps are large. Without, a right fold moves
    outputs by no more than the rounding of its weights.
    """
    truth, lacking = truth_of(both, feeds, [], quick=True)
    function, _ = compare_functions(both, truth, lacking)
    if function.verdict not in ("equivalent", "different"):
        return found
    reason = f"before activations are rounded to integers, {function.reason}" if function.verdict == "different" else ""
    return dataclasses.replace(function, reason=reason, before_rounding=True)


def _deviations(both: Comparison, truth: Truth, run: Run) -> Deviations:
    found = {}
    for name, errors in truth.compare(run, both.unit).items():
        noise, scale = truth.noise[name], truth.scale(name, both.unit)
        found[name] = Deviation(errors, noise, scale, function_ratio(errors, noise, scale))
    return found


def compare_elsewhere(both: Comparison) -> tuple[str, tuple[str, ...]]:
    """Where two modules part at other sizes than those that were fed, where their code may take another path; "" where they don't. And
    what couldn't be compared."""
    tried = both.reference.elsewhere(both.candidate)
    if tried is None:
        return "", ()
    both.progress("outputs, other sizes", 0, None)
    noisy: list[Any] = []
    refused: list[str] = []
    for text, call in tried.calls:
        try:
            truth = Truth(tried.reference, [call])
        except (DataError, UnsupportedError):
            continue
        noisy = noisy or [tried.moved(both.seed + k + 1) for k in range(MOVED)]
        try:
            truth.measure(noisy.__getitem__, least=MOVED, most=MOVED)
            deviations = _deviations(both, truth, tried.candidate)
        except (DataError, UnsupportedError) as error:
            if tried.bounded:
                refused.append(text)
                continue
            return f"with {text} the candidate doesn't run, where the reference does: {error}", ()
        for name, found in deviations.items():
            if found.errors.problem:
                return f"with {text} {found.errors.problem}", ()
            if found.ratio > ELSEWHERE * FUNCTION_LIMIT:
                return f"with {text} output {name} is off by {found.ratio:.3g} times what rounded weights explain", ()
    return "", (f"the candidate states for which sizes it holds, and doesn't run with {listed(refused)}",) if refused else ()


def _judged(deviations: Deviations, truth: Truth, how: str) -> Function:
    if not deviations:
        return Function("inconclusive", reason="the model has no outputs")
    name, worst = max(deviations.items(), key=lambda item: item[1].ratio)
    if problems := [each for each in deviations.values() if each.errors.problem]:
        decided = next((each.errors.problem for each in problems if not each.noise.problem), None)
        if decided is None:
            text = f"{problems[0].errors.problem}; but so it is with the reference's own weights, moved within their rounding"
            return Function("inconclusive", reason=text)
        return Function("different", np.inf, worst.yardstick, decided)
    if worst.ratio > FUNCTION_LIMIT:
        where = f" ({worst.errors.where})" if worst.errors.where and worst.errors.part >= worst.ratio else ""
        text = f"output {name}{where} is off by {worst.ratio:.3g} times what rounded weights explain"
        return Function("different", worst.error, worst.yardstick, text)
    if reason := _numberless(truth):
        return Function("inconclusive", reason=reason)
    return Function("equivalent", worst.error, worst.yardstick, how)


def _numberless(truth: Truth) -> str:
    """Why outputs that agree say nothing."""
    arrays = {name: [outputs[name] for outputs in truth.expected] for name in truth.names}
    sizes = {name: sum(a.size for a in each) for name, each in arrays.items()}
    if not any(sizes.values()):
        return "all outputs are empty"
    if numberless := [name for name, each in arrays.items() if sizes[name] and not any(numbers(a).any() for a in each)]:
        which = "all outputs" if len(numberless) == len(sizes) else f"all numbers of output {numberless[0]}"
        return f"{which} of both models are NaN or infinite"
    return ""
