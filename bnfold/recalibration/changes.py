"""What a recalibration changed, layer by layer, and what the data's own measurements give away.

That is, that they aren't shuffled, or not scaled as the network is used to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bnfold.algebra.affine import Array
from bnfold.report import LayerStatistics, RecalibrateReport

from .methods import Method, Statistics
from .moments import Moments
from .plan import BatchNorm, Measurement, Plan

DEAD = 1e-12  # of the channels' mean variance: at or below it, a channel says nothing


def report(plan: Plan, measured: Measurement, method: Method, unchanged: Mapping[int, str]) -> RecalibrateReport:
    """What became of each layer. unchanged: those that keep their statistics, and why."""
    layers, tallies = plan.layers, measured.tallies
    statistics = [
        (layer.mean, layer.variance) if i in unchanged else method.statistics(tally, (layer.mean, layer.variance), measured.samples)
        for i, (layer, tally) in enumerate(zip(layers, tallies, strict=True))
    ]
    return RecalibrateReport(
        method=method.name,
        variance=method.variance,
        samples=measured.samples,
        layers=tuple(_changes(layers[i], tally.moments, statistics[i]) for i, tally in enumerate(tallies)),
        held_bytes=measured.peak_bytes,
        spilled_bytes=measured.spilled_bytes,
        notes=(*plan.notes, *(f"{layers[i].name} keeps its statistics: {why}" for i, why in sorted(unchanged.items())), *measured.notes),
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


# --- what the data give away ----------------------------------------------------------------------------------------------------------


BATCHES = 4  # micro-batches from which on their order can be told
SORTED = 3.0  # times the spread of the micro-batches' means that shuffled samples give
SCALED = 5.0  # times, or deviations: a network fed with data of another scale is further off than any change of domain seen


def unshuffled(parts: Sequence[Moments]) -> list[str]:
    """A note where micro-batches differ from each other by more than shuffled samples would.

    parts: what a BatchNorm that stands first saw of each. By the F ratio of the analysis of variance, the spread between the means of the
    micro-batches over that between samples within them, whose expectation is 1; the median over channels.
    """
    ratio = f_ratio(parts)
    if ratio is None or ratio <= SORTED:
        return []
    return [
        f"the data look unshuffled: micro-batches differ from each other {ratio:.1f} times as much as shuffled ones would, and this "
        f"method normalises each by itself: shuffle the data, or take the exact method, which doesn't mind"
    ]


def unscaled(layer: BatchNorm, moments: Moments) -> list[str]:
    """A note where the first BatchNorm sees values of a scale or place far from those that the network was trained on."""
    if moments.count < 2:
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        times = _median(np.sqrt(moments.variance() / layer.variance))
        shift = _median(np.abs(moments.mean - layer.mean) / np.sqrt(layer.variance))
    if times is None or shift is None or (1 / SCALED < times < SCALED and shift < SCALED):
        return []
    return [
        f"the data don't look normalised as this network's were: at {layer.name}, the first BatchNorm, deviations are {times:.3g} "
        f"times the old ones and means {shift:.3g} old deviations away (medians over channels); look at how the data are scaled "
        f"(0 to 255 or 0 to 1, mean and std)"
    ]


def f_ratio(parts: Sequence[Moments]) -> float | None:
    """The median over channels of the F ratio; None where there is too little to tell."""
    samples = sum(part.samples for part in parts)
    if len(parts) < BATCHES or samples - len(parts) < BATCHES:
        return None
    counts = np.array([part.count for part in parts], float)[:, None]
    sizes = np.array([part.samples for part in parts], float)[:, None]
    means = np.stack([part.mean for part in parts])
    off = means - (counts * means).sum(0) / counts.sum()
    between = (sizes * off * off).sum(0) / (len(parts) - 1)
    elements = counts / sizes  # of a sample
    within = (np.stack([part.spread[1] for part in parts]) / elements**2).sum(0) / (samples - len(parts))
    with np.errstate(divide="ignore", invalid="ignore"):
        return _median(between / within)


def _median(values: Array) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None
