"""Recalibrate, fuse, verify, in this order; the first step that fails ends it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from . import api
from .errors import DataError
from .report import Accuracy, PipelineReport


def pipeline(
    model: Any,
    batches: Any,
    *,
    labelled: Any = None,
    strict: bool = False,
    providers: Iterable[str] = ("cpu",),
    memory_budget: int = 1 << 30,
    progress: api.Progress | None = None,
) -> tuple[Any, PipelineReport]:
    """The recalibrated and folded model, or None where it failed its verification (or a BatchNorm stayed, with `strict`).

    labelled: data with labels, to score the model before and after. Raises what the steps raise.
    """
    before = accuracy(model, labelled, progress)
    fresh, recalibrated = api.recalibrate(model, batches, memory_budget=memory_budget, progress=progress)
    if progress is not None:
        progress("fold and check", 0, None)
    fused, folded = api.fuse(fresh)
    kept = sum(layer.verdict == "kept" for layer in folded.layers)
    if strict and kept:
        note = f"--strict: {kept} BatchNorm{'s' * (kept != 1)} stayed"
        return None, PipelineReport(recalibrate=recalibrated, fuse=folded, accuracy_before=before, notes=(note,))
    verdict = api.verify(fresh, fused, batches, providers=providers, progress=progress)
    after = accuracy(fused, labelled, progress) if verdict.verdict == "equivalent" else None
    report = PipelineReport(recalibrate=recalibrated, fuse=folded, verify=verdict, accuracy_before=before, accuracy_after=after)
    return (fused if verdict.verdict == "equivalent" else None), report


def accuracy(model: Any, data: Any, progress: api.Progress | None = None) -> Accuracy | None:
    """The share of samples whose largest output is their label; None where there are no labels.

    The first output counts, its largest element along axis 1. The standard error is the binomial's, sqrt(p (1 - p) / n).
    """
    labels = getattr(data, "labels", None)
    if labels is None:
        return None
    from .backends.onnx.run import Session

    session = Session(model)
    correct = seen = 0
    for batch in data:
        scores = next(iter(session.run(batch).values()))
        if scores.ndim < 2 or scores.shape[0] + seen > len(labels):
            raise DataError(f"the labels don't fit: the first output has shape {scores.shape}, and there are {len(labels)} labels")
        wanted = np.asarray(labels[seen : seen + scores.shape[0]])
        correct += int((scores.reshape(scores.shape[0], scores.shape[1], -1)[:, :, 0].argmax(axis=1) == wanted).sum())
        seen += scores.shape[0]
        if progress is not None:
            progress("score", seen, len(labels))
    share = correct / seen
    return Accuracy(share, math.sqrt(share * (1 - share) / seen), seen)
