"""Whether two models compute the same function, decided without a tolerance, on three levels.

1. Coefficients (`correspondence`): every coefficient that a fold could change, against float64, in units of roundoff.
2. Function (`levels`): both models in float64. What rounded weights explain is measured on the reference itself.
3. Deployment (`levels`): both in their stored types on each provider, against the float64 oracle of the reference.

Each finds what the others can't: an epsilon of 1.1e-5 for 1e-5 shows in no output, a transposed matrix product in no coefficient, and what
a runtime's optimiser makes of a right model shows only there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .bundle import ready, with_bundle
from .correspondence import Correspondence, correspond
from .errors import BnfoldError, DataError, UnsupportedError
from .exercise import another, given, interface_difference, moved, random, resized
from .graph import Graph, Value
from .levels import (
    DEPLOYED_LIMIT,
    FEW,
    FUNCTION_LIMIT,
    HALF_LIMIT,
    Noise,
    Scale,
    Tally,
    Truth,
    deployed_ratio,
    function_ratio,
    plain,
    varies,
)
from .localise import Located, localise, localise_runtime
from .report import Coefficients, Deployment, Function, Levels, OutputError, Verdict, VerifyReport
from .sides import sides
from .subject import Runner, Subject

if TYPE_CHECKING:
    from .data import Batch

Progress = Callable[[str, int, "int | None"], None]

STEADY = 100.0  # units of roundoff within which two runs of one model agree, whatever the order of their sums
PLENTY = 256  # numbers of an output, from which one run with moved weights tells the noise well enough for a quick check
ENOUGH = 64  # numbers of an output; with fewer, the same samples are fed again, slightly moved


def verify(
    reference: Any,
    candidate: Any,
    batches: Iterable[Any] | None = None,
    *,
    providers: Iterable[str] = ("cpu",),
    samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    example: Any = None,
    progress: Progress | None = None,
    oracle_only: bool = False,
    bundle: Path | None = None,
    force: bool = False,
    coefficients_only: bool = False,
) -> VerifyReport:
    """Compare a candidate with its reference. Both are `subject.Subject`s or models of one framework or the other.

    batches: what to feed; random data where it is None. samples: how many; 2, or 32 of small ones, where it is None, and whole batches
    of them: this is about rounding, of which each sample shows as much as the next.
    example: how a PyTorch module is called, where neither the other side nor the data show it.
    oracle_only: leave the third level out. coefficients_only: the first level alone, which runs nothing. bundle: a folder for what shows
    the first difference by itself (see `bundle`); force: also where it exists and isn't empty.
    Raises DeviceError where a provider isn't there, DataError where the data don't fit.
    """
    start = time.perf_counter()
    if bundle is not None:
        ready(bundle, force=force)
    first, second, batches = sides(reference, candidate, batches, input_shapes, example)
    check = _Check(first, second, progress or (lambda stage, done, total: None), made_up=batches is None)
    if coefficients_only:
        return _timed(check.coefficients_only(), start)
    feeds: Iterable[Batch]
    if batches is None:
        feeds = made = random(check.reference, check.candidate, samples, batch_size, seed, input_shapes)
        check.others = resized(first, second, made[0], seed) if input_shapes is None else []
    else:
        feeds = given(check.reference, batches, samples, batch_size)
    report = check.run(feeds, () if oracle_only else tuple(dict.fromkeys(providers)), seed)
    if bundle is not None:
        report = with_bundle(report, check.at, check.fed, bundle, force=force)
    return _timed(report, start)


def check_fold(reference: Any, fused: Any, example: Any = None) -> VerifyReport:
    """What `fuse` asks of its own result before it gives it out: levels 1 and 2, on one sample."""
    start = time.perf_counter()
    first, second, _ = sides(reference, fused)
    check = _Check(first, second, lambda stage, done, total: None, made_up=example is None, thorough=False)
    feeds: Iterable[Batch]
    if (known := first.example()) is not None:
        feeds = [known]
    else:
        feeds = random(first, second, 1, None, 0, None) if example is None else given(first, [example], 1, None)
    return _timed(check.run(feeds, (), 0), start)


def _same(one: Subject, other: Subject) -> bool:
    """Whether both sides are one and the same model, whatever its names: who compares that has compared nothing."""
    identity = one.identity()
    return identity is not None and identity == other.identity()


def _timed(report: VerifyReport, start: float) -> VerifyReport:
    return dataclasses.replace(report, seconds=time.perf_counter() - start)


@dataclass
class _Measured:
    """One output on level 2: the candidate's errors, the yardstick, and the ratio of the two."""

    tally: Tally
    noise: Noise
    scale: Scale
    ratio: float


class _Check:
    """One verification. `run` is the order of the work; every method is a step of it.

    made_up: whether the data are random, so that it isn't their fault if they don't fit. thorough: with several runs for the yardstick, and
    a look at whether the reference is a function of its inputs at all.
    """

    def __init__(self, reference: Subject, candidate: Subject, progress: Progress, *, made_up: bool, thorough: bool = True) -> None:
        self.reference, self.candidate, self.progress = reference, candidate, progress
        self.unit = max(reference.roundoff, candidate.roundoff)
        self.limit = HALF_LIMIT if self.unit > 2.0**-20 else DEPLOYED_LIMIT
        self.made_up, self.thorough = made_up, thorough
        self.measured: dict[str, _Measured] = {}
        self.ratios: dict[str, float] = {}
        self.at: Located | None = None  # where the two part
        self.fed: Batch | None = None  # and on what
        self.unsteady = ""  # why the reference is no function of its inputs
        self.others: list[Batch] = []  # data of other sizes
        self.unfolded = self.same = False  # nothing is folded; nothing is changed at all

    def interface(self) -> VerifyReport | None:
        """The report where the two can't even be called alike."""
        if not (reason := interface_difference(self.reference, self.candidate)):
            return None
        skipped = "the interfaces differ"
        levels = Levels(Coefficients("skipped", reason=skipped), Function("skipped", reason=skipped), ())
        return VerifyReport(verdict="different", levels=levels, reason=reason)

    def coefficients_only(self) -> VerifyReport:
        """Level 1 alone. What operators do besides their coefficients is not looked at."""
        if (report := self.interface()) is not None:
            return report
        self.progress("coefficients", 0, 1)
        coefficients, found = self.coefficients()
        levels = Levels(coefficients, Function("skipped", reason="only the coefficients were asked for"), ())
        if coefficients.verdict == "different":
            first = None if found is None else found.mismatches[0].node.name
            return VerifyReport(verdict="different", levels=levels, first_difference=first, reason=coefficients.reason)
        if coefficients.verdict == "skipped":
            return VerifyReport(verdict="inconclusive", levels=levels, reason=coefficients.reason)
        reason = f"{self._summary(coefficients, [])}; nothing else was compared"
        return VerifyReport(verdict="inconclusive" if self.same else "equivalent", levels=levels, reason=reason)

    def run(self, feeds: Iterable[Batch], providers: tuple[str, ...], seed: int) -> VerifyReport:
        if (report := self.interface()) is not None:
            return report
        for provider in providers:
            for side in (self.reference, self.candidate):
                side.require(provider)
        self.progress("coefficients", 0, 1)
        coefficients, found = self.coefficients()
        truth, lacking = self.truth(feeds, seed, providers)
        function = self.function(truth, lacking)
        rows = [row for p in providers for row in self.deployment(truth, lacking, p)]
        if found is not None and coefficients.verdict == "different" and function.verdict == "equivalent" and found.may_be_another_form:
            text = "the outputs agree to rounding while most coefficients differ: the same function in another form"
            coefficients = dataclasses.replace(coefficients, verdict="skipped", reason=text)
        verdict, reason = self.verdict(coefficients, function, rows, truth)
        uncertain = verdict == "equivalent" and self.thorough and coefficients.verdict != "equivalent"
        if uncertain and truth is not None and (dead := self.dead(truth)):
            verdict, reason = "inconclusive", f"not all was exercised: on these data {dead} gives the same whatever it is fed"
        located = self.located(found, coefficients, truth, function, rows) if verdict == "different" else None
        self.at = located
        first = located.difference.layer if located is not None else None
        if verdict == "different" and first is None:
            first = self.first_difference(found, coefficients, truth, function)
        outputs = tuple(
            OutputError(name, m.tally.peak, m.tally.peak / (m.scale.largest or 1.0), self.ratios.get(name, m.ratio if not rows else 0.0))
            for name, m in self.measured.items()
        )
        return VerifyReport(
            verdict=verdict,
            levels=Levels(coefficients, function, tuple(rows)),
            outputs=outputs,
            first_difference=first,
            reason=reason,
            difference=None if located is None else located.difference,
        )

    # --- level 1 ----------------------------------------------------------------------------------------------------------------

    def coefficients(self) -> tuple[Coefficients, Correspondence | None]:
        found = None
        for clone in (False, True):
            try:
                found = correspond(self.reference.plan(clone=clone), self.candidate.plan(clone=clone))
            except UnsupportedError as error:
                return Coefficients("skipped", reason=str(error)), None
            if not found.unpaired:
                break
        assert found is not None
        self.unfolded = found.unfolded
        self.same = self.unfolded and found.worst == 0 and _same(self.reference, self.candidate)
        return found.report(), found

    # --- level 2 ----------------------------------------------------------------------------------------------------------------

    def truth(self, feeds: Iterable[Batch], seed: int, providers: tuple[str, ...]) -> tuple[Truth | None, str]:
        """The reference in float64 with its yardstick, or in its stored type and why."""
        feeds = list(feeds)
        provider = providers[0] if providers else "cpu"
        lacking: list[str] = []
        for make in (self.reference.oracle, partial(self.reference.deployed, provider, self.reference.optimisations[0])):
            try:
                return self._truth(make, feeds, seed), "; ".join(lacking)
            except UnsupportedError as error:
                lacking.append(str(error))
            except DataError as error:
                if not self.made_up:
                    raise
                lacking.append(f"{error} (random data: say which shapes fit, or give data)")
        return None, "; ".join(lacking)

    def _truth(self, make: Callable[..., Runner], feeds: list[Batch], seed: int) -> Truth:
        self.progress("reference", 0, None)
        truth = Truth(make().run, feeds, others=self.others)
        sizes = [min((a.size for a in outputs.values() if a.size), default=0) for outputs in truth.expected]
        if 0 < sum(sizes) < ENOUGH:
            times = min(-(-(ENOUGH - sum(sizes)) // sum(sizes)), 2 * ENOUGH // len(sizes))
            truth = Truth(make().run, [*feeds, *moved(feeds, times, seed)], others=self.others)
        self.progress("yardstick", 0, None)
        truth.measure(lambda k: make(jitter=seed + k + 1).run, least=FEW if self.thorough or sum(sizes) < PLENTY else 1)
        return truth

    def function(self, truth: Truth | None, lacking: str) -> Function:
        if truth is None:
            return Function("inconclusive", reason=lacking)
        self.progress("candidate", 0, None)
        try:
            run = self.candidate.deployed("cpu", self.candidate.optimisations[0]) if lacking else self.candidate.oracle()
            tallies = truth.compare(run.run)
        except UnsupportedError as error:
            return Function("skipped", reason=str(error))
        except DataError as error:
            return Function("different", np.inf, reason=f"the candidate doesn't run on what the reference takes: {error}")
        for name, tally in tallies.items():
            noise, scale = truth.noise[name], truth.scale(name, self.unit)
            self.measured[name] = _Measured(tally, noise, scale, function_ratio(tally, noise, scale))
        return self._judged(truth, f"by the noise of the stored type, since {lacking}" if lacking else "")

    def _judged(self, truth: Truth, how: str) -> Function:
        if not self.measured:
            return Function("inconclusive", reason="the model has no outputs")
        name, worst = max(self.measured.items(), key=lambda item: item[1].ratio)
        error = worst.tally.peak / (worst.scale.largest or 1.0)
        yardstick = max(worst.noise.peak, worst.scale.floor) / (worst.scale.largest or 1.0)
        if problems := [m.tally.problem for m in self.measured.values() if m.tally.problem]:
            return Function("different", np.inf, yardstick, problems[0])
        if worst.ratio > FUNCTION_LIMIT:
            where = f" ({worst.tally.where})" if worst.tally.where and worst.tally.part >= worst.ratio else ""
            text = f"output {name}{where} is off by {worst.ratio:.3g} times what rounded weights explain"
            return Function("different", error, yardstick, text)
        sizes: dict[str, int] = {}
        counts: dict[str, int] = {}
        for outputs in truth.expected:
            for name, a in outputs.items():
                sizes[name] = sizes.get(name, 0) + a.size
                counts[name] = counts.get(name, 0) + (int(np.isfinite(a).sum()) if a.dtype.kind in "fc" else a.size)
        if not any(sizes.values()):
            return Function("inconclusive", reason="all outputs are empty")
        if numberless := [name for name in sizes if sizes[name] and not counts[name]]:
            which = "all outputs" if len(numberless) == len(sizes) else f"all numbers of output {numberless[0]}"
            return Function("inconclusive", reason=f"{which} of both models are NaN or infinite")
        return Function("equivalent", error, yardstick, how)

    # --- level 3 ----------------------------------------------------------------------------------------------------------------

    def deployment(self, truth: Truth | None, lacking: str, provider: str) -> list[Deployment]:
        """The rows of a provider. Where there are two precisions, the first decides, and the other is for the user to know."""
        first, *more = max((side.precisions(provider) for side in (self.candidate, self.reference)), key=len)
        rows = self._deployment(truth, lacking, provider, first)
        decided = dict(self.ratios), self.unsteady
        for precision in more:
            rows += [_told_only(row) for row in self._deployment(truth, lacking, provider, precision)]
            self.ratios, self.unsteady = decided
        return rows

    def _deployment(self, truth: Truth | None, lacking: str, provider: str, precision: str) -> list[Deployment]:
        rows = []
        options = self.candidate.optimisations
        try:
            reference = self.reference.deployed(provider, self.reference.optimisations[0], precision=precision)
            if truth is None:
                raise UnsupportedError(lacking)
            self.progress(f"{provider}: reference", 0, None)
            own = truth.compare(reference.run)
        except (UnsupportedError, DataError) as error:
            return [Deployment(provider, option, 0.0, "skipped", str(error), precision) for option in options]
        if reason := self._unsteady(truth, reference):
            self.unsteady = reason
            return [Deployment(provider, option, 0.0, "inconclusive", reason, precision) for option in options]
        for option in options:
            self.progress(f"{provider}: candidate, optimisation {option}", 0, None)
            try:
                candidate = self.candidate.deployed(provider, option, precision=precision)
                tallies = truth.compare(candidate.run)
            except (UnsupportedError, DataError) as error:
                text = f"the reference runs, the candidate doesn't: {error}"
                rows.append(Deployment(provider, option, np.inf, "different", text, precision))
                continue
            row = dataclasses.replace(self._row(truth, provider, option, tallies, own), precision=precision, **_placed(candidate, provider))
            if row.verdict == "different" and option in self.reference.optimisations[1:]:
                row = self._excused(truth, row)
            rows.append(row)
        return rows

    def _excused(self, truth: Truth, row: Deployment) -> Deployment:
        """Where the runtime's optimisation does as much harm to the reference, the candidate isn't to blame, and the row says nothing."""
        try:
            same, tallies = (
                truth.compare(side.deployed(row.provider, row.optimisation, precision=row.precision).run)
                for side in (self.reference, self.candidate)
            )
        except (UnsupportedError, DataError):
            return row
        for name, tally in tallies.items():
            if deployed_ratio(tally, same[name], truth.noise[name], truth.scale(name, self.unit)) > self.limit or tally.problem:
                return row
        reason = (
            f"the runtime's optimisation changes the reference itself by as much ({row.ratio:.3g} times its error without): switch it off"
        )
        return dataclasses.replace(row, verdict="skipped", reason=reason)

    def _row(self, truth: Truth, provider: str, option: str, tallies: Mapping[str, Tally], own: Mapping[str, Tally]) -> Deployment:
        worst, reason = 0.0, ""
        for name, tally in tallies.items():
            if own[name].problem:  # the reference itself doesn't give what it should there
                continue
            ratio = np.inf if tally.problem else deployed_ratio(tally, own[name], truth.noise[name], truth.scale(name, self.unit))
            self.ratios[name] = max(self.ratios.get(name, 0.0), ratio)
            if ratio > worst:
                worst = ratio
                reason = tally.problem or f"output {name} errs {ratio:.3g} times as much as the reference (at most {self.limit:g})"
        broken = [t.problem for t in own.values() if t.problem]
        if len(broken) == len(own):
            return Deployment(provider, option, 0.0, "inconclusive", f"the reference itself fails there: {broken[0]}")
        return Deployment(provider, option, worst, *(("different", reason) if worst > self.limit else ("equivalent", "")))

    def _unsteady(self, truth: Truth, reference: Runner) -> str:
        """A model that differs from itself, by far more than rounding."""
        again = Truth(reference.run, truth.feeds[:1])
        for name, tally in again.compare(reference.run).items():
            if tally.problem or tally.peak > STEADY * self.unit * (truth.scale(name, 0.0).largest or 1.0):
                return f"the reference differs from itself between two runs, in output {name}"
        return ""

    # --- what it comes to ---------------------------------------------------------------------------------------------------------

    def verdict(self, coefficients: Coefficients, function: Function, rows: list[Deployment], truth: Truth | None) -> tuple[Verdict, str]:
        ran = {row.verdict for row in rows} - {"skipped"}
        doubtful = "different" in {function.verdict, *ran} or (self.thorough and not ran)
        if doubtful and not self.unsteady and truth is not None and truth.feeds:
            self.unsteady = self._random_reference(truth)
        if self.unsteady:
            return "inconclusive", self.unsteady
        named = [(coefficients.verdict, coefficients.reason), (function.verdict, function.reason)]
        named += [(r.verdict, f"{r.name}: {r.reason}") for r in rows]
        for wanted in ("different", "inconclusive"):
            for verdict, reason in named:
                if verdict == wanted:
                    return wanted, reason
        if truth is None or not truth.feeds:
            return "inconclusive", "nothing was exercised: there are no samples"
        if not truth.feeds[0]:
            return "inconclusive", "nothing was exercised: the model has no inputs"
        if self.thorough and truth.constant(lambda batch: another(self.reference, batch)):
            return "inconclusive", "nothing was exercised: the reference answers the same whatever it is fed"
        certain = coefficients.verdict == "equivalent"
        if self.thorough and not certain and truth.constant(lambda batch: another(self.reference, batch), self.unit):
            return (
                "inconclusive",
                "nothing was exercised: the reference's answers differ by less than its stored type tells (saturated?)",
            )
        if "equivalent" not in (function.verdict, *(row.verdict for row in rows)):
            return "inconclusive", f"neither model's outputs could be compared: {function.reason}"
        if self.thorough and self.same:
            return "inconclusive", self._summary(coefficients, rows)
        return "equivalent", self._summary(coefficients, rows)

    def _summary(self, coefficients: Coefficients, rows: list[Deployment]) -> str:
        parts = []
        if self.unfolded:
            counted = f"the candidate has as many BatchNorms as the reference, {coefficients.batchnorms}"
            same = ", and is the same model: there is no fold to judge" if self.same else ""
            parts.append(f"nothing is folded: {counted}{same}")
        if coefficients.verdict == "equivalent":
            parts.append(f"{coefficients.checked} arrays are within {coefficients.worst:.2g} units of roundoff")
        elif coefficients.batchnorms:
            left = coefficients.uncertified
            names = f", not {', '.join(left[:FEW_NAMES])}{' ...' * (len(left) > FEW_NAMES)}" if left else ""
            counted = f"{coefficients.certified} of {coefficients.batchnorms} BatchNorms"
            parts.append(f"{counted} could be certified by their coefficients{names}")
        if self.measured:
            worst = max(self.measured.values(), key=lambda m: m.ratio)
            explained = max(worst.noise.peak, worst.scale.floor) / (worst.scale.largest or 1.0)
            share = f" ({explained:.0e} of the largest number)"
            parts.append(f"outputs differ by {worst.ratio:.2g} times what rounded weights explain{share}")
        if ratios := [row.ratio for row in rows if row.verdict == "equivalent"]:
            parts.append(f"deployed, the candidate errs at most {max(ratios):.2g} times as much as the reference")
        parts += dict.fromkeys(row.reason for row in rows if row.verdict == "skipped" and row.ratio)
        return "; ".join(parts)

    def _random_reference(self, truth: Truth) -> str:
        """Whether the oracle itself gives two answers (a random operator, dropout in training mode)."""
        try:
            again = Truth(self.reference.oracle().run, truth.feeds[:1])
            tallies = again.compare(self.reference.oracle().run)
        except UnsupportedError:
            return ""
        for name, tally in tallies.items():
            if tally.problem or tally.peak > 1e-9 * (truth.scale(name, 0.0).largest or 1.0):
                return f"the reference differs from itself between two runs, in output {name}"
        return ""

    def located(
        self, found: Correspondence | None, coefficients: Coefficients, truth: Truth | None, function: Function, rows: list[Deployment]
    ) -> Located | None:
        """Where the two part, and why (see `localise`)."""
        self.progress("first difference", 0, None)
        self.fed = feeds = truth.feeds[0] if truth is not None and truth.feeds else None
        differ = function.verdict == "different", coefficients.verdict == "different"
        try:
            if any(differ):
                return localise(self.reference, self.candidate, feeds, found, values=differ[0], coefficients=differ[1])
            wrong = {row.optimisation: row.provider for row in rows if row.verdict == "different"}
            if set(wrong) == {"on"} and feeds is not None:
                return localise_runtime(self.reference, self.candidate, feeds, wrong["on"])
        except BnfoldError:
            pass
        return None

    def dead(self, truth: Truth) -> str:
        """The first layer of the reference whose output is the same on different data though data reach it; "" where there is none.

        What stands before it could be anything, and no output would show it.
        """
        try:
            graph = self.reference.plan().graph
            layers = self.reference.layers()
            alive = {id(v) for v in _fed(graph)}
            names = [v.name for node in graph.nodes for v in node.outputs if id(v) in alive and v.name in layers and node.op != "Barrier"]
            one = truth.feeds[0]
            other = another(self.reference, one)
            for start in range(0, len(names), CHUNK):
                run = _only(self.reference, names[start : start + CHUNK])
                first, second = plain(run(one)), plain(run(other))
                for name, array in first.items():
                    if array.dtype.kind == "f" and array.size and not varies([array, second[name]]):
                        return layers[name]
        except BnfoldError:
            return ""
        return ""

    def first_difference(
        self, found: Correspondence | None, coefficients: Coefficients, truth: Truth | None, function: Function
    ) -> str | None:
        """The first layer of the reference at which the two part."""
        places = list(self.reference.layers().values())
        seen: list[str] = []
        if found is not None and found.mismatches and coefficients.verdict == "different":
            seen.append(found.mismatches[0].node.name)
        if function.verdict == "different" and truth is not None and truth.feeds and self.measured:
            try:
                inner = self._first_inner(truth.feeds[0])
            except BnfoldError:
                inner = None
            seen += [] if inner is None else [inner]
        return min(seen, key=lambda name: places.index(name) if name in places else len(places), default=None)

    def _first_inner(self, feeds: Batch) -> str | None:
        """By inner values that both models have by name. A value may also be what it becomes where the reference is folded."""
        layers, shared = self.reference.layers(), self.candidate.layers().keys()
        names = [name for name in layers if name in shared]
        folded = self.reference.folded()
        also = {} if folded is None else folded.layers()
        for start in range(0, len(names), CHUNK):
            chunk = names[start : start + CHUNK]
            self.progress("first difference", start, len(names))
            truth = Truth(_only(self.reference, chunk), [feeds], most_bytes=1 << 62)
            truth.measure(lambda k, chunk=chunk: _only(self.reference, chunk, jitter=k + 1), least=1, most=1)  # type: ignore[misc]
            tallies = truth.compare(_only(self.candidate, chunk))
            known = [name for name in chunk if name in also]
            right = _only(folded, known)(feeds) if folded is not None and known else {}
            theirs = _only(self.candidate, known)(feeds) if known else {}
            for name in chunk:
                scale = truth.scale(name, self.unit)
                if not tallies[name].problem and function_ratio(tallies[name], truth.noise[name], scale) <= FUNCTION_LIMIT:
                    continue
                if name in right and right[name].shape == theirs[name].shape and right[name].dtype.kind == "f":
                    off = np.abs(right[name] - theirs[name]).max(initial=0.0)
                    if off <= FUNCTION_LIMIT * max(truth.noise[name].peak, scale.floor):
                        continue
                return layers[name]
        return None


def _placed(runner: Runner, provider: str) -> dict[str, Any]:
    """Of a row, what its runner says of where it ran; asked for the CPU, there is nowhere else."""
    placement = getattr(runner, "placement", None)
    if placement is None or not placement.of:
        return {"share": 1.0} if provider == "cpu" else {}
    return {"share": placement.nodes / placement.of, "nodes": placement.nodes, "of": placement.of, "counted": placement.source}


def _told_only(row: Deployment) -> Deployment:
    """A row that doesn't decide: what is wrong with it is said, and no more."""
    if row.verdict not in ("different", "inconclusive"):
        return row
    return dataclasses.replace(row, verdict="skipped", reason=f"{row.reason}; float32 in full decides, see the other rows")


def _fed(graph: Graph) -> Iterator[Value]:
    """The values that data reach. Where an operator isn't known, what it gives may be a size, so nothing is said of what follows."""
    reached = {v for node in graph.nodes for v in node.inputs if v.producer is None}
    for node in graph.nodes:
        if node.op != "Barrier" and any(v in reached for v in node.inputs):
            reached.update(node.outputs)
            yield from node.outputs


FEW_NAMES = 3  # of BatchNorms, in a sentence
CHUNK = 64  # inner values looked at in one run, so that they needn't all be held


def _only(subject: Subject, names: list[str], jitter: int | None = None) -> Callable[[Batch], dict[str, Any]]:
    run = subject.oracle(jitter=jitter, outputs=names).run
    return lambda feeds: {name: value for name, value in run(feeds).items() if name in names}
