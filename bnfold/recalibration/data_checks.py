"""What the data's own measurements give away: that they aren't shuffled, or not scaled as the network is used to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bnfold.algebra.affine import Array

from .moments import Moments
from .protocol import BatchNorm

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
