"""Checkpoints of one network averaged: their weights, and BatchNorms measured afresh, since statistics don't average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bnfold import api
from bnfold.backends.open import open_model
from bnfold.errors import UsageError
from bnfold.model import Model
from bnfold.report import RecalibrateReport


def average(
    models: Sequence[api.M], batches: Any, *, weights: Sequence[float] | None = None, example: Any = None, **calibration: Any
) -> tuple[api.M, RecalibrateReport]:
    """The network with the mean of the models' weights, and statistics measured on the data.

    weights: of each model in the mean, by default the same. calibration: further arguments of `api.recalibrate`; with `labelled`, the
    scores before are those with the mean of the models' statistics, and those after with the new ones. Raises ModelError where the models
    are of different networks. After Izmailov et al. 2018 (SWA) and Wortsman et al. 2022 (soups).
    """
    if len(models) < 2 or (weights is not None and (len(weights) != len(models) or sum(weights) == 0)):
        raise UsageError("two models or more are averaged, each with a weight of its own, whose sum isn't zero")
    given = [1.0] * len(models) if weights is None else [float(weight) for weight in weights]
    opened: list[Model] = [open_model(model) for model in models]
    mean = opened[0].averaged(opened[1:], [weight / sum(given) for weight in given])
    return api.recalibrate(mean, batches, example=example, **calibration)
