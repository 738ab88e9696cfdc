"""What a recalibration changed: the statistics, layer by layer, and the scores of labelled samples; and what the data give away.

That is, that they aren't shuffled, or not scaled as the network is used to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfold.algebra.affine import Array
from bnfold.data import Data, as_batches
from bnfold.data.samples import Run
from bnfold.errors import DataError
from bnfold.model import Model
from bnfold.report import Accuracy, Effect, LayerStatistics, RecalibrateReport, Word
from bnfold.text import counted

from .methods import Method, Statistics
from .moments import Moments
from .plan import BatchNorm, Measurement, Plan, Progress

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


# --- accuracy and loss on labelled data, and whether a change improved them -----------------------------------------------------------


SURE = 2.0  # standard errors from which on a difference counts
SUM = 1e-3  # how far probabilities in half precision miss a sum of 1


class NoRowsError(DataError):
    """An output that isn't one row of classes for each sample."""


@dataclass(frozen=True, eq=False)
class Scores:
    """How each sample fared, in the data's order. right: bool [samples]; loss: float64 [samples], cross-entropy of its label in nats."""

    right: npt.NDArray[np.bool_]
    loss: Array

    def summary(self) -> Accuracy:
        """With the standard errors sqrt(p (1 - p) / n) of the accuracy, and deviation / sqrt(n) of the mean loss."""
        n, share = len(self.right), float(self.right.mean())
        return Accuracy(share, math.sqrt(share * (1 - share) / n), n, *_mean(self.loss))


def score(model: Model, data: Any, *, provider: str = "cpu", progress: Progress | None = None) -> Scores | None:
    """Score every labelled sample; None where there are no labels, or where the data can be read only once.

    The first output counts, [samples, classes] or [samples, classes, 1, ...]; where each row holds probabilities (none below 0, their sum
    1) the loss is -log of the label's, else the output is taken for logits. Raises DataError where labels and output don't fit.
    """
    from bnfold.data.memory import within_memory

    if data is None:
        return None
    session = cache(lambda: model.session(provider))
    if not isinstance(data, Data):
        data = as_batches(data, model.specs, run=lambda batch: session().run(batch), flat=model.flat)
    else:
        data = data.asking(lambda batch: session().run(batch))
    if not data.again:
        return None
    feeds, specs = data, model.specs

    def scored(size: int | None) -> Scores | None:
        return _scored(feeds if size is None else feeds.fed(specs, batch_size=size), lambda batch: session().run(batch), progress)

    return within_memory(scored, None)[0]


def _scored(data: Data, run: Run, progress: Progress | None) -> Scores | None:
    found: list[tuple[Array, Array]] = []
    seen = 0
    for batch, labels in data.labelled():
        if labels is None:
            return None
        scores = next(iter(run(batch).values()))
        if scores.ndim < 2 or math.prod(scores.shape[2:]) != 1:
            raise NoRowsError(f"accuracy needs an output of shape (samples, classes); the first output has shape {scores.shape}")
        if len(scores) != len(labels):
            raise NoRowsError(
                f"accuracy needs a label for each sample; a batch has {len(labels)} labels, and the output {len(scores)} rows"
            )
        _check_labels(labels, scores.shape[1], data)
        found.append((scores.reshape(scores.shape[:2]).astype(np.float64), labels))
        seen += len(scores)
        if progress is not None:
            progress("score", seen, data.samples)
    if not seen:  # an empty shard
        return None
    outputs, wanted = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Scores(outputs.argmax(axis=1) == wanted, cross_entropy(outputs, wanted))


def score_if_fits(model: Model, labelled: Any, batches: Any, **options: Any) -> tuple[Scores | None, tuple[str, ...]]:
    """The scores, and notes.

    Labels that only happened to come with the data needn't be there, nor a network that classifies: that is said, and no error. Labels of
    other classes than the network's are a DataError, as are data that were given to be scored and can't be.
    """
    try:
        found = score(model, labelled, **options)
        if found is None and labelled is not None and labelled is not batches:
            raise DataError("the data to score on have no labels, or can be read only once: give integers, one for each sample")
        return found, ()
    except NoRowsError as error:
        if labelled is not batches:
            raise
        return None, (f"the labels aren't used: {error}",)


def _check_labels(labels: Array, classes: int, data: Data) -> None:
    """DataError where some are no classes of the network's, or are places among another number of classes."""
    outside, wrong = labels[(labels < 0) | (labels >= classes)], ""
    if outside.size:
        wrong = f"there is a label {outside[0]}, and the network's classes are 0 to {classes - 1:,}"
    elif data.classes not in (None, classes):
        wrong = f"its {counted(data.classes or 0, 'sub-folder', ',')} can't be the network's {classes:,} classes, in sorted order"
    if wrong:
        raise DataError(f"{data.description.partition(': ')[0]}: {wrong}; give labels that are, or leave the scores out (--eval none)")


def cross_entropy(outputs: Array, labels: Array) -> Array:
    """-log of each label's probability, [samples], in nats.

    outputs: float64 [samples, classes], probabilities or logits.
    """
    own = outputs[np.arange(len(labels)), labels]
    with np.errstate(divide="ignore", invalid="ignore"):
        if outputs.min(initial=0.0) >= 0 and np.abs(outputs.sum(1) - 1).max(initial=0.0) <= SUM:
            return np.asarray(-np.log(own))
        top = outputs.max(axis=1)
        return np.asarray(np.log(np.exp(outputs - top[:, None]).sum(1)) + top - own)


def effect(before: Scores, after: Scores) -> Effect:
    """What changed, from the same samples: their differences' means, with the standard errors of those means.

    Paired samples tell smaller changes than two independent scores would: what a sample's difficulty adds to both falls out.
    """
    if len(before.right) != len(after.right):
        raise DataError(
            f"the data gave {len(before.right)} labelled samples before and {len(after.right)} after; they must be the same ones"
        )
    right = after.right.astype(np.float64) - before.right
    with np.errstate(invalid="ignore"):
        loss = after.loss - before.loss
    loss = np.where(np.isfinite(loss), loss, 0.0)
    accuracy, accuracy_error = _mean(right)
    moved, loss_error = _mean(loss)
    verdict: Word
    if abs(accuracy) > SURE * accuracy_error:
        verdict = "improved" if accuracy > 0 else "harmed"
    elif abs(moved) > SURE * loss_error:
        verdict = "improved" if moved < 0 else "harmed"
    else:
        verdict = "no effect"
    return Effect(verdict, accuracy, accuracy_error, moved, loss_error)


def _mean(values: Array) -> tuple[float, float]:
    """The mean, and its standard error; of one sample nothing is known."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf
