"""Whether two models compute the same function, decided without a tolerance, on three levels.

1. Coefficients (`coefficients`): every coefficient that a fold could change, against float64, in units of roundoff.
2. Function (`function`): both models in float64. What rounded weights explain is measured on the reference itself.
3. Deployment (`deployment`): both in their stored types on each provider, against the float64 oracle of the reference.

Each finds what the others can't: an epsilon of 1.1e-5 for 1e-5 shows in no output, a transposed matrix product in no coefficient, and what
a runtime's optimiser makes of a right model shows only there.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bnfold.data import Batch
from bnfold.data.memory import repeatable, within_memory
from bnfold.errors import BnfoldError, UnsupportedError
from bnfold.folding.clamps import clips_by_channel
from bnfold.folding.options import PLAIN, FoldOptions
from bnfold.folding.plan import NormalForm
from bnfold.model import Model
from bnfold.recalibration.plan import Progress
from bnfold.report import Coefficients, Function, Levels, VerifyReport
from bnfold.report.verify import LayerError

from .coefficients import RESCALED, Correspondence, correspond
from .comparison import Comparison, Names, alike, interface_difference, interface_notes, silent
from .deployment import Deployments
from .diagnosis.bundle import ready, with_bundle
from .diagnosis.localise import first_difference
from .diagnosis.profile import layer_errors, paired_operators
from .diagnosis.sides import Located, sides_of
from .function import compare_elsewhere, compare_functions, compare_unrounded, truth_of
from .inputs import FEW_SAMPLES, given, in_parts, is_large, is_several, random, resized, shortened
from .verdict import Findings, verdict

RANDOM = "random data"
UNTOLD = "errors aren't told layer by layer"
# What may have been done besides folding: one thing, or several.
OTHERWISE = (
    FoldOptions(clone=True),
    FoldOptions(clamps=True),
    FoldOptions(norm_affine=True),
    FoldOptions(drop_dead=True),
    FoldOptions(merge_linear=True),
    FoldOptions(clamps=True, norm_affine=True, drop_dead=True, merge_linear=True),
    FoldOptions(clone=True, clamps=True, norm_affine=True, drop_dead=True, merge_linear=True),
)


def _weights(plan: NormalForm) -> tuple[int, int]:
    """How many operators have weights and how many arrays those are, which doubling adds to; and how many numbers the operators read."""
    weights = [node.params["weight"] for node in plan.graph.nodes if "weight" in node.params]
    arrays = {weight.tensor for weight in weights}
    return len(weights) + len(arrays), sum(math.prod(weight.shape) for weight in weights)


def verify(
    reference: Model,
    candidate: Model,
    batches: Iterable[Any] | None = None,
    *,
    providers: Iterable[str] = ("cpu",),
    samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    progress: Progress | None = None,
    oracle_only: bool = False,
    bundle: Path | None = None,
    force: bool = False,
    coefficients_only: bool = False,
    map_inputs: Names | None = None,
    map_outputs: Names | None = None,
    by_layer: bool = False,
) -> VerifyReport:
    """Compare a candidate with its reference.

    batches: what to feed; random data where it is None. samples: how many; 2, or 32 of small ones, where it is None, and whole batches
    of them: this is about rounding, of which each sample shows as much as the next. One large random one
    does where level 1 answers for all.
    oracle_only: leave the third level out. coefficients_only: the first level alone, which runs nothing. bundle: a folder for what shows
    the first difference by itself (see `bundle`); force: also where it exists and isn't empty. map_inputs, map_outputs: see `alike`.
    by_layer: compare every layer, too.
    Raises DeviceError where a provider isn't there, DataError where the data don't fit.
    """
    start = time.perf_counter()
    if bundle is not None:
        ready(bundle, force=force)
    first, second = alike(reference, candidate, map_inputs, map_outputs)
    fewer: tuple[str, ...] = ()
    if not coefficients_only and input_shapes is None:
        first, second, fewer = in_parts(first, second)
    wanted = () if oracle_only or coefficients_only else tuple(dict.fromkeys(providers))
    data = RANDOM if batches is None else str(getattr(batches, "description", "")).partition(": ")[0]
    both = Comparison(
        first, second, batches is None, providers=wanted, data=data, by_layer=by_layer, seed=seed, progress=progress or silent
    )

    def compared(size: int | None) -> tuple[VerifyReport, Located | None]:
        if coefficients_only:
            return _compared(both, None)
        if batches is not None:
            return _compared(both, given(first, batches, samples, size))
        made = random(first, second, samples, size, seed, input_shapes)
        brief = dataclasses.replace(both, brief=samples is None and is_large(made[0]))
        return _compared(brief, made, resized(first, second, made[0], seed) if input_shapes is None else [])

    (report, located), notes = within_memory(compared, batch_size) if repeatable(batches) else (compared(batch_size), [])
    if bundle is not None and not coefficients_only:
        report = with_bundle(report, located, bundle, force=force)
    notes += interface_notes(first, second)
    return dataclasses.replace(report, seconds=time.perf_counter() - start, notes=(*report.notes, *fewer, *notes))


def check_fold(reference: Model, fused: Model, example: Any = None, *, by_layer: bool = False) -> VerifyReport:
    """What `fuse` asks of its own result before it gives it out: levels 1 and 2, on one sample of each call that the example states.

    by_layer: as for `verify`.
    """
    start = time.perf_counter()
    calls = reference.calls
    pairs = [(reference, fused, example)] if len(calls) == 1 else [(call, fused.called(call), call) for call in calls]
    reports = [_checked(*pair, by_layer=by_layer) for pair in pairs]
    worst = max(reports, key=lambda report: ("equivalent", "inconclusive", "different").index(report.verdict))
    return dataclasses.replace(worst, seconds=time.perf_counter() - start)


def _checked(reference: Model, fused: Model, example: Any, *, by_layer: bool) -> VerifyReport:
    both_whole = alike(reference, fused)
    first, second, said = in_parts(*both_whole, most=FEW_SAMPLES)
    known = first.example()
    data = RANDOM if known is None and example is None else "the example"
    both = Comparison(first, second, example is None, thorough=False, data=data, by_layer=by_layer)
    feeds: Iterable[Batch]
    if known is not None:
        feeds = [shortened(first, known)]
    elif example is not None:
        calls = example if is_several(example) else [example]
        samples = None if first is both_whole[0] else FEW_SAMPLES
        feeds = [shortened(first, batch) for call in calls for batch in given(first, [call], samples, None)]
    else:
        feeds = random(first, second, 1, None, 0, None)
    report = _compared(both, feeds)[0]
    return dataclasses.replace(report, notes=(*report.notes, *said))


def _compared(both: Comparison, feeds: Iterable[Batch] | None, others: Iterable[Batch] = ()) -> tuple[VerifyReport, Located | None]:
    """All levels in their order, and where the two part. feeds: None for level 1 alone, which runs nothing; others: data of other sizes."""
    if reason := interface_difference(both.reference, both.candidate):
        skipped = "the interfaces differ"
        levels = Levels(Coefficients("skipped", reason=skipped), Function("skipped", reason=skipped), ())
        return VerifyReport(verdict="different", levels=levels, reason=reason), None
    for provider in both.providers:
        for side in (both.reference, both.candidate):
            side.require(provider)
    coefficients, found = _coefficients(both)
    findings = Findings(
        coefficients, found, _same(both, found), Function("skipped", reason="only the coefficients were asked for"), ran=False
    )
    if feeds is not None:
        findings = _run(both, findings, feeds, others)
    decided, reason = verdict(both, findings)
    layer, located = first_difference(both, findings) if decided == "different" else (None, None)
    narrower = () if decided != "equivalent" or found is None or found.narrower in reason else (found.narrower,)
    report = VerifyReport(
        verdict=decided,
        levels=findings.levels,
        outputs=findings.outputs,
        first_difference=layer,
        reason=reason,
        notes=(*findings.notes, *narrower),
        difference=None if located is None else located.difference,
        samples=findings.samples,
        data=both.data if findings.samples else "",
    )
    if both.by_layer and findings.truth is not None and findings.truth.feeds:
        report = _by_layer(both, report, findings, located)
    return report, located


def _by_layer(both: Comparison, report: VerifyReport, findings: Findings, located: Located | None) -> VerifyReport:
    """The report with every layer's errors and both networks side by side, or with why one of these isn't there."""
    both.progress("layers", 0, None)
    sides = sides_of(both.reference, both.candidate) if located is None else located.sides
    if sides is None or findings.truth is None:
        return dataclasses.replace(report, notes=(*report.notes, f"{UNTOLD}: one of the models can't be seen into"))
    level = findings.correspondence
    off = {mismatch.node.name for mismatch in level.mismatches} if level is not None and report.verdict == "different" else set()
    graph = paired_operators(sides, off | {report.first_difference})
    layers: tuple[LayerError, ...] = ()
    notes = report.notes
    if RESCALED in report.levels.coefficients.reason:
        notes += (f"{UNTOLD}: {RESCALED}, so what is between isn't the reference's",)
    else:
        try:
            layers = layer_errors(sides, findings.truth.feeds[0])
        except BnfoldError as error:
            notes += (f"{UNTOLD}: {error}",)
    return dataclasses.replace(report, layers=layers, graph=graph, notes=notes)


def _run(both: Comparison, found: Findings, feeds: Iterable[Batch], others: Iterable[Batch]) -> Findings:
    """Levels 2 and 3, and what they say of level 1."""
    feeds = itertools.islice(feeds, 1 if both.brief and found.certified else None)
    truth, lacking = truth_of(both, feeds, others, quick=found.certified or not both.thorough)
    function, deviations = compare_functions(both, truth, lacking)
    unrounded = both.unrounded() if function.verdict == "equivalent" and not lacking else None
    if unrounded is not None and truth is not None:
        function = compare_unrounded(unrounded, truth.feeds, function)
    elsewhere, notes = compare_elsewhere(both) if both.thorough and function.verdict != "different" else ("", ())
    if elsewhere:
        function = dataclasses.replace(function, verdict="different", error=math.inf, reason=elsewhere)
    deployed = Deployments(both, truth, lacking)
    for provider in both.providers:
        deployed.run(provider)
    coefficients, level = found.coefficients, found.correspondence
    if level is not None and level.another_form and coefficients.verdict == "different" and function.verdict == "equivalent":
        coefficients = dataclasses.replace(coefficients, verdict="skipped", reason=level.another_form)
    return dataclasses.replace(
        found,
        coefficients=coefficients,
        function=function,
        ran=True,
        elsewhere=bool(elsewhere),
        notes=notes,
        truth=truth,
        deviations=deviations,
        rows=tuple(deployed.rows),
        ratios=deployed.ratios,
        unsteady=deployed.unsteady,
    )


def _coefficients(both: Comparison) -> tuple[Coefficients, Correspondence | None]:
    """Level 1: where something has no counterpart, or another one, also as if more had been done than folding."""
    both.progress("weights", 0, 1)
    try:
        found, best = correspond(both.reference.plan(), both.candidate.plan()), PLAIN
        (ours, numbers), (theirs, left) = _weights(both.reference.plan()), _weights(both.candidate.plan())
        doubled, joined, smaller = theirs > ours, theirs < ours, left < numbers
        clipped = clips_by_channel(both.candidate.plan().graph)
        if found.unpaired or (found.mismatches and (doubled or joined or smaller)):
            wrong = None  # the first way that something speaks for: else a mistake is taken for what nobody did
            for how in OTHERWISE:
                other = correspond(both.reference.plan(how), both.candidate.plan(how))
                done = (how.clone and doubled) or (how.drop_dead and smaller) or (how.merge_linear and joined) or (how.clamps and clipped)
                if not other.unpaired and not other.mismatches:
                    found, best = other, how
                    break
                if found.unpaired and not other.unpaired and done and wrong is None:
                    wrong = other, how
            else:
                found, best = wrong or (found, best)
        if found.mismatches:
            moved = dataclasses.replace(best, norm_affine=True)
            again = correspond(both.reference.plan(moved), both.candidate.plan(moved))
            found = found if again.unpaired or again.mismatches else again
    except UnsupportedError as error:
        return Coefficients("skipped", reason=str(error)), None
    return found.report(), found


def _same(both: Comparison, found: Correspondence | None) -> bool:
    """Whether both sides are one and the same model, whatever its names: who compares that has compared nothing."""
    if found is None or not found.unfolded or found.worst != 0:
        return False
    identity = both.reference.identity()
    return identity is not None and identity == both.candidate.identity()
