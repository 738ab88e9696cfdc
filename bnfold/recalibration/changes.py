"""What a recalibration changed, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bnfold.report import LayerStatistics, RecalibrateReport

from .methods import Method, Statistics
from .moments import Moments
from .plan import Plan
from .protocol import BatchNorm, Measurement

DEAD = 1e-12  # of the channels' mean variance: at or below it, a channel says nothing


def report(plan: Plan, measured: Measurement, method: Method, kept: Mapping[int, str]) -> RecalibrateReport:
    """What became of each layer. kept: those that keep their statistics, and why."""
    layers, tallies = plan.layers, measured.tallies
    statistics = [
        (layer.mean, layer.variance) if i in kept else method.statistics(tally, (layer.mean, layer.variance), measured.samples)
        for i, (layer, tally) in enumerate(zip(layers, tallies, strict=True))
    ]
    return RecalibrateReport(
        method=method.name,
        variance=method.variance,
        samples=measured.samples,
        layers=tuple(_changes(layers[i], tally.moments, statistics[i]) for i, tally in enumerate(tallies)),
        held_bytes=measured.held,
        spilled_bytes=measured.spilled,
        notes=(*plan.notes, *(f"{layers[i].name} keeps its statistics: {why}" for i, why in sorted(kept.items())), *measured.notes),
        before={layer.name: (layer.mean, layer.variance) for layer in layers},
        after={layer.name: each for layer, each in zip(layers, statistics, strict=True)},
    )


def _changes(layer: BatchNorm, seen: Moments, new: Statistics) -> LayerStatistics:
    """The worst channel's figures. A deviation of 0 makes the first two infinite where there is a change at all."""
    mean, variance = new
    with np.errstate(divide="ignore", invalid="ignore"):
        own = seen.variance()
        of_mean = np.nan_to_num(seen.standard_error() / np.sqrt(own), nan=0.0, posinf=np.inf)
        of_variance = np.nan_to_num(seen.variance_error() / own, nan=0.0, posinf=np.inf)
        change = np.abs(mean - layer.mean)
        shift = np.where(change == 0, 0.0, change / np.sqrt(layer.variance))
        ratio = np.where(variance == layer.variance, 1.0, variance / layer.variance)
        distance = np.nan_to_num(np.abs(np.log(ratio)), nan=np.inf, posinf=np.inf)
    nothing = not seen.count
    return LayerStatistics(
        name=layer.name,
        count=seen.count,
        mean_shift=float(shift.max(initial=0.0)),
        var_ratio=float(ratio[np.argmax(distance)]) if ratio.size else 1.0,
        stderr=float("inf") if nothing else float(of_mean.max(initial=0.0)),
        var_stderr=float("inf") if nothing else float(of_variance.max(initial=0.0)),
        channels=layer.mean.size,
        worst_channel=int(np.argmax(np.maximum(np.nan_to_num(shift, nan=np.inf), distance))) if shift.size else 0,
        dead=0 if nothing else int((own <= DEAD * np.maximum(own.mean(), np.finfo(float).tiny)).sum()),
    )
