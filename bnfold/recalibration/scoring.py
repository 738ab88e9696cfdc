"""Accuracy and loss on labelled data, and whether a change improved them."""

from __future__ import annotations

import math
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
from bnfold.report import Accuracy, Effect, Word
from bnfold.text import counted

from .plan import Progress

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
            what = labelled.description.partition(": ")[0] if isinstance(labelled, Data) else "the data to score on"
            raise DataError(f"{what}: no labels, or data that can be read only once: give integers, one for each sample")
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
