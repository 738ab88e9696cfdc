"""Statistics that come from elsewhere: of parts of the data, measured apart, and the old ones of before a recalibration."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnfold.errors import DataError, UnsupportedError, UsageError
from bnfold.model import Model
from bnfold.report import RecalibrateReport, VerifyReport

from . import statistics_file
from .changes import report
from .lockstep import measure, settle
from .methods import Accumulator, Exact, Method
from .moments import Moments, pool
from .plan import BatchNorm, Measurement, Plan, Progress
from .recalibrate import Target, called, data_of, fitting


def measure_part(
    model: Model,
    batches: Any,
    method: Method,
    target: Target,
    part: tuple[int, int],
    path: Path,
    *,
    batch_size: int | None = None,
    samples: int | None = None,
    progress: Progress | None = None,
) -> RecalibrateReport:
    """Measure one of several parts of the data, and write what was found to a file; `merge` puts the parts together.

    part: which of how many, from 0 on; every process is given the same data, and measures its own micro-batches. The report says nothing of
    changes. Raises UnsupportedError where the parts would not add up to the whole.
    """
    start = time.perf_counter()
    index, count = part
    if not 0 <= index < count:
        raise UsageError(f"there is no part {index} of {count}; the parts are 0 to {count - 1}")
    model, batches = called(model, batches, batch_size)
    plan = target.plan(model)
    if not method.additive and (plan.stage_count > 1 or method.name == "moving-average"):
        raise UnsupportedError(
            f"parts of the data that are measured apart don't add up with the method {method}: "
            + (
                "a moving average depends on the order"
                if method.name == "moving-average"
                else "what a BatchNorm sees depends on the statistics of those before it, which need all data"
            )
            + "; share the work with torchrun, or take the method precise or ioffe-szegedy"
        )
    data = data_of(batches, plan, False, batch_size, samples).sharded(index, count)
    with model.computing():
        measured = measure(plan, fitting(data, plan.specs), method, progress=progress)
    statistics_file.write_part(path, plan.layers, measured, method, part, statistics_file.fingerprint(plan.layers))
    found = report(plan, measured, method, dict.fromkeys(range(len(plan.layers)), "only a part of the data was measured"))
    notes = (f"part {index} of {count}: nothing has changed; bnfold merge-stats puts the parts together", *measured.notes)
    return dataclasses.replace(found, notes=notes, seconds=time.perf_counter() - start)


def merge(model: Model, paths: Iterable[str | Path], target: Target) -> tuple[Model, RecalibrateReport]:
    """A copy of the model with the statistics of all parts together (see `measure_part`)."""
    start = time.perf_counter()
    plan = target.plan(model)
    measured, method = statistics_file.read_parts([Path(path) for path in paths], plan.layers)
    unchanged = settle(plan, measured, method)
    found = report(plan, measured, method, unchanged)
    return model.remade(plan.write()), dataclasses.replace(found, seconds=time.perf_counter() - start)


def merge_models(
    models: Sequence[Model], counts: Sequence[int], target: Target, compared: Callable[[Model, Model], VerifyReport]
) -> tuple[Model, RecalibrateReport]:
    """A copy of the first model with the statistics of all data together, on which the models' own were measured apart.

    counts: how many samples each was measured on, n_k. With N = sum n_k, mean = sum n_k mean_k / N and variance =
    sum n_k (variance_k + (mean_k - mean)^2) / N, the law of total variance: the mean of the variances alone leaves out how far apart the
    models' data are. compared: holds the coefficients of two models against each other. Raises DataError unless the models are the same
    but for their statistics.
    """
    start = time.perf_counter()
    if len(models) != len(counts) or min(counts) < 1:
        text = ", ".join(map(str, counts))
        raise UsageError(f"there are {len(models)} models and the counts {text}: give each model's number of samples, 1 or more")
    plans = [target.plan(model) for model in models]
    plan, method = plans[0], Exact()
    notes = [f"the statistics of {len(models)} models together; all else is the first model's"]
    if plan.stage_count > 1:
        notes.append("behind a BatchNorm, each model saw its data as its own statistics had normalised them")
    for number, (model, other) in enumerate(zip(models[1:], plans[1:], strict=True), 2):
        _take_over(plan, other, f"model {number}")
        found = compared(models[0], model.remade(other.write()))
        if found.verdict == "different":
            raise DataError(
                f"model {number} differs from the first not in statistics alone: {found.reason}; statistics go together only where all "
                f"else is the same"
            )
        if found.levels.coefficients.verdict != "equivalent":
            notes.append(f"whether model {number} is the first but for its statistics can't be told: {found.reason}")
    tallies = []
    for layer, *others in zip(*(each.layers for each in plans), strict=True):
        seen = [_stated(each, count) for each, count in zip((layer, *others), counts, strict=True)]
        tallies.append(Accumulator(pool(seen), np.zeros((2, layer.mean.size)), (layer.mean, layer.variance)))
    measured = Measurement(tallies, sum(counts), len(counts))
    unchanged = settle(plan, measured, method)
    made = report(plan, measured, method, unchanged)
    return models[0].remade(plan.write()), dataclasses.replace(made, notes=(*made.notes, *notes), seconds=time.perf_counter() - start)


def _stated(layer: BatchNorm, count: int) -> Moments:
    """The moments of so many elements that a layer's statistics are those of. How its samples differ among themselves isn't known."""
    return Moments(count, layer.mean, layer.variance * count, 0, 0.0, np.zeros((5, layer.mean.size)))


def _take_over(plan: Plan, other: Plan, what: str) -> None:
    """Give a model the old statistics of another. DataError where they don't fit."""
    for mine, its in itertools.zip_longest(plan.layers, other.layers):
        if mine is None or its is None or (mine.name, mine.mean.size) != (its.name, its.mean.size):
            one, two = ("no more BatchNorms" if each is None else f"{each.name} of {each.mean.size} channels" for each in (mine, its))
            raise DataError(f"{what} has {two}, and the first has {one}: they are different networks")
    for index, layer in enumerate(plan.layers):
        if why := other.set(index, (layer.mean, layer.variance)):
            raise DataError(f"{what}: {layer.name} can't have the first model's statistics: {why}")


def restore(model: Model, before: Mapping[str, Any]) -> tuple[Model, list[str]]:
    """A copy of the model with old statistics put back, and the layers that they were put back into.

    before: float64 means and variances by layer, as `statistics_file.read` gives them. Raises DataError where they are another model's.
    """
    plan = Target().plan(model)
    done = []
    for index, layer in enumerate(plan.layers):
        if layer.name not in before:
            continue
        mean, variance = before[layer.name]
        if mean.size != layer.mean.size:
            raise DataError(
                f"{layer.name} has {layer.mean.size} channels, and the statistics kept for it {mean.size}: they are another model's"
            )
        why = plan.set(index, (mean, variance))
        if why is not None:
            raise DataError(f"{layer.name}: {why}")
        done.append(layer.name)
    if missing := [name for name in before if name not in done]:
        raise DataError(f"the model has no BatchNorm {missing[0]!r}, whose statistics were kept: they are another model's")
    return model.remade(plan.write()), done
