"""Recalibrate, fuse, verify, in this order; the first step that fails ends it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bnfold import api
from bnfold.backends.open import open_model
from bnfold.certificates import nothing_to_fold, verified
from bnfold.data.source import peek
from bnfold.errors import NothingToDoError
from bnfold.folding.options import FoldOptions
from bnfold.recalibration.recalibrate import called
from bnfold.recalibration.scoring import effect, score, score_if_fits
from bnfold.report import PipelineReport


def pipeline(
    model: api.M,
    batches: Any,
    *,
    labelled: Any = None,
    example: Any = None,
    strict: bool = False,
    accept_harm: bool = False,
    providers: Iterable[str] = ("cpu",),
    progress: api.Progress | bool | None = None,
    by_layer: bool = False,
    keep: Callable[[Any], object] | None = None,
    **calibration: Any,
) -> tuple[api.M | None, PipelineReport]:
    """The recalibrated and folded model; None in its place where the result isn't proven equivalent, where the new statistics harm it
    (unless with `accept_harm`), or where a BatchNorm stays with `strict`, and the last of the report's notes says why.

    labelled: data with labels, to score the model before and after. by_layer: see `api.verify`. The statistics are measured on the first
    of the providers, the verdict is for all of them. keep: given the recalibrated model, which the folded one is equivalent to.
    calibration: further arguments of `api.recalibrate`, and the options of `api.fuse`. Raises what the steps raise.
    """
    providers, progress = tuple(providers), api.told(progress)
    options = FoldOptions(**{f.name: calibration.pop(f.name) for f in dataclasses.fields(FoldOptions) if f.name in calibration})
    opened = open_model(model, example)
    if not opened.states_inputs:
        opened, batches = called(opened, batches, calibration.get("batch_size"))
        opened.inputs()  # it is read once, now, and called so in all further steps
        example = opened
    if not opened.holds_batchnorm and not api.inspect(model, example=example).layers:
        raise NothingToDoError(nothing_to_fold(opened))
    first, batches = peek(batches) if isinstance(batches, Iterator) else (None, batches)
    seen = batches if first is None else [first]  # what gives its batches once is gone when it was measured on
    before, notes = score_if_fits(opened, labelled, batches, provider=providers[0], progress=progress)
    scored = None if before is None else before.summary()
    fresh, recalibrated = api.recalibrate(model, batches, example=example, provider=providers[0], progress=progress, **calibration)
    if keep is not None:
        keep(fresh)
    if progress is not None:
        progress("fold and check", 0, None)
    reference = open_model(fresh, example)
    candidate, folded = api.fold(reference, options, example=example)
    if strict and folded.failure:
        return None, PipelineReport(recalibrate=recalibrated, fuse=folded, accuracy_before=scored, notes=(*notes, folded.failure))
    checking = None if progress is None else lambda stage, done, total: progress(f"verify, {stage}", done, total)
    verdict = api.verify(reference, candidate, seen, providers=providers, progress=checking, by_layer=by_layer)
    unfolded = not folded.changes
    proven = verdict.verdict == "equivalent" or (unfolded and verdict.verdict == "inconclusive")
    if unfolded and proven:
        notes += ("no BatchNorm folds, so there is no fold for the verdict to judge: the recalibrated model is given out",)
    fused = reference.in_source_form(candidate.source, changed=folded.changes)
    verified(fused, verdict)
    after = None
    if proven and before is not None:
        after = score(candidate, labelled, provider=providers[0], progress=progress)
    report = PipelineReport(
        recalibrate=recalibrated,
        fuse=folded,
        verify=verdict,
        accuracy_before=scored,
        accuracy_after=None if after is None else after.summary(),
        effect=None if before is None or after is None else effect(before, after),
        notes=notes if proven else (*notes, f"the verdict is {verdict.verdict}: {verdict.reason}"),
    )
    if report.harm and not accept_harm:
        return None, dataclasses.replace(report, notes=(*notes, report.harm))
    return (fused if proven else None), report
