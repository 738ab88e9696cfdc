"""Recalibrate, fuse, verify, in this order; the first step that fails ends it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from . import api
from .backends import family
from .certificate import verified
from .errors import DataError, NothingToDoError
from .report import Accuracy, PipelineReport


def pipeline(
    model: Any,
    batches: Any,
    *,
    labelled: Any = None,
    example: Any = None,
    strict: bool = False,
    providers: Iterable[str] = ("cpu",),
    memory_budget: int = 1 << 30,
    progress: api.Progress | None = None,
) -> tuple[Any, PipelineReport]:
    """The recalibrated and folded model; None in its place where the result isn't proven equivalent, or where a BatchNorm stays
    with `strict`, and the last of the report's notes says why.

    labelled: data with labels, to score the model before and after. The statistics are measured on the first of the providers, the
    verdict is for all of them. Raises what the steps raise.
    """
    providers = tuple(providers)
    if not api.inspect(model, example=example).layers:
        raise NothingToDoError(api.ALREADY_FOLDED if family(model) == "onnx" else api.NO_BATCHNORM)
    before = accuracy(model, labelled, example=example, provider=providers[0], progress=progress)
    fresh, recalibrated = api.recalibrate(
        model, batches, example=example, memory_budget=memory_budget, provider=providers[0], progress=progress
    )
    if progress is not None:
        progress("fold and check", 0, None)
    fused, folded = api.fuse(fresh, example=example)
    kept = sum(layer.verdict == "kept" for layer in folded.layers)
    if strict and kept:
        note = f"--strict: {kept} BatchNorm{'s stay' if kept > 1 else ' stays'}"
        return None, PipelineReport(recalibrate=recalibrated, fuse=folded, accuracy_before=before, notes=(note,))
    checking = None if progress is None else lambda stage, done, total: progress(f"verify, {stage}", done, total)
    verdict = api.verify(fresh, fused, batches, example=example, providers=providers, progress=checking)
    proven = verdict.verdict == "equivalent"
    verified(fused, verdict)
    return (fused if proven else None), PipelineReport(
        recalibrate=recalibrated,
        fuse=folded,
        verify=verdict,
        accuracy_before=before,
        accuracy_after=accuracy(fused, labelled, example=example, provider=providers[0], progress=progress) if proven else None,
        notes=() if proven else (f"the verdict is {verdict.verdict}: {verdict.reason}",),
    )


def deployed(model: Any, provider: str, *, example: Any = None, optimise: bool = False) -> Any:
    """The model on an execution provider of ONNX Runtime, or on a device of PyTorch."""
    if family(model) == "torch":
        from .backends.torch.run import Session as TorchSession
        from .backends.torch.trace import trace

        return TorchSession(trace(model, example), device=provider)
    from .backends.onnx.run import Session

    return Session(model, provider=provider, optimise=optimise)


def accuracy(model: Any, data: Any, *, example: Any = None, provider: str = "cpu", progress: api.Progress | None = None) -> Accuracy | None:
    """The share of samples whose largest output is their label; None where there are no labels.

    The first output counts, [samples, classes] or [samples, classes, 1, ...]. The standard error is the binomial's, sqrt(p (1 - p) / n).
    Raises DataError where labels and output don't fit.
    """
    if not getattr(data, "again", False):
        return None
    session, correct, seen = None, 0, 0
    for batch, labels in data.labelled():
        if labels is None:
            return None
        session = session or deployed(model, provider, example=example)
        scores = next(iter(session.run(batch).values()))
        if scores.ndim < 2 or math.prod(scores.shape[2:]) != 1:
            raise DataError(f"accuracy needs an output of shape (samples, classes); the first output has shape {scores.shape}")
        if len(scores) != len(labels):
            raise DataError(f"accuracy needs a label for each sample; a batch has {len(labels)} labels, and the output {len(scores)} rows")
        correct += int((scores.reshape(scores.shape[:2]).argmax(axis=1) == labels).sum())
        seen += len(scores)
        if progress is not None:
            progress("score", seen, data.samples)
    if not seen:  # an empty shard
        return None
    share = correct / seen
    return Accuracy(share, math.sqrt(share * (1 - share) / seen), seen)
