"""Statistics that come from elsewhere: of parts of the data, measured apart, and the old ones of before a recalibration."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnfold.errors import DataError, UnsupportedError, UsageError
from bnfold.report import RecalibrateReport

from . import statistics_file as kept_statistics
from .changes import report
from .lockstep import measure, settle
from .methods import Method
from .protocol import Progress
from .recalibrate import Target, called, data_of, fitting

if TYPE_CHECKING:
    from bnfold.model import Model


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
    kept_statistics.write_part(path, plan.layers, measured, method, part, kept_statistics.fingerprint(plan.layers))
    found = report(plan, measured, method, dict.fromkeys(range(len(plan.layers)), "only a part of the data was measured"))
    notes = (f"part {index} of {count}: nothing has changed; bnfold merge-stats puts the parts together", *measured.notes)
    return dataclasses.replace(found, notes=notes, seconds=time.perf_counter() - start)


def merge(model: Model, paths: Iterable[str | Path], target: Target) -> tuple[Model, RecalibrateReport]:
    """A copy of the model with the statistics of all parts together (see `measure_part`)."""
    start = time.perf_counter()
    plan = target.plan(model)
    measured, method = kept_statistics.read_parts([Path(path) for path in paths], plan.layers)
    kept = settle(plan, measured, method)
    found = report(plan, measured, method, kept)
    return model.remade(plan.write()), dataclasses.replace(found, seconds=time.perf_counter() - start)


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
