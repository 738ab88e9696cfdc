"""What was made apart and is put together: parts of the data, measured by processes that can't talk, and checkpoints of one network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bnfold.api import AnyModel, M, Progress, made, place, recalibrate, told
from bnfold.backends import open as backends
from bnfold.errors import UsageError
from bnfold.model import Model
from bnfold.recalibration.methods import Method
from bnfold.recalibration.methods import method as chosen
from bnfold.report import RecalibrateReport


def measure_part(
    model: AnyModel,
    batches: Iterable[Any],
    part: tuple[int, int],
    path: str | Path,
    *,
    method: str | Method = "precise",
    layers: Sequence[str] = (),
    skip_layers: Sequence[str] = (),
    freeze: bool = False,
    example: Any = None,
    batch_size: int | None = None,
    samples: int | None = None,
    provider: str = "cpu",
    device: str | None = None,
    progress: Progress | bool | None = None,
) -> RecalibrateReport:
    """Measure one of several parts of the data apart from the others, for `merge_parts`: where processes can't talk to each other.

    part: which of how many, from 0 on; each process is given all the data, and measures its own share of the micro-batches. path: the
    .npz file for what was measured. The other arguments are those of `recalibrate`, and the same for all parts. Raises UnsupportedError
    where the parts would not add up to the whole: in lockstep, what stands behind a BatchNorm depends on all data; a moving average on
    their order.
    """
    from bnfold.recalibration import parts as parts_of
    from bnfold.recalibration import recalibrate as calibration

    opened = backends.open_model(model, example)
    target = calibration.Target(layers, skip_layers, freeze, place(opened, provider, device))
    return parts_of.measure_part(
        opened, batches, chosen(method), target, part, Path(path), batch_size=batch_size, samples=samples, progress=told(progress)
    )


def merge_parts(
    model: M,
    paths: Iterable[str | Path],
    *,
    example: Any = None,
    layers: Sequence[str] = (),
    skip_layers: Sequence[str] = (),
    freeze: bool = False,
) -> tuple[M, RecalibrateReport]:
    """The model with the statistics of all parts together (see `measure_part`).

    UsageError unless each part is there once, and measured on this model.
    """
    from bnfold.recalibration import parts as parts_of
    from bnfold.recalibration import recalibrate as calibration

    opened = backends.open_model(model, example)
    fresh, report = parts_of.merge(opened, paths, calibration.Target(layers, skip_layers, freeze))
    return made(opened, fresh), report


def merge_models(
    models: Sequence[M], counts: Sequence[int], *, example: Any = None, layers: Sequence[str] = (), skip_layers: Sequence[str] = ()
) -> tuple[M, RecalibrateReport]:
    """The first model with the statistics of all data together, of which each model has its own part's: clients that measured apart.

    counts: how many samples each was measured on. The variance is that of all data (the law of total variance), not the mean of the
    variances. Raises DataError unless the models are the same but for their statistics.
    """
    from bnfold.recalibration import parts as parts_of
    from bnfold.recalibration import recalibrate as calibration
    from bnfold.verification.verify import verify

    opened = [backends.open_model(model, example) for model in models]
    compared = partial(verify, coefficients_only=True)
    fresh, report = parts_of.merge_models(opened, counts, calibration.Target(layers, skip_layers), compared)
    return made(opened[0], fresh), report


def average(
    models: Sequence[M], batches: Any, *, weights: Sequence[float] | None = None, example: Any = None, **calibration: Any
) -> tuple[M, RecalibrateReport]:
    """The network with the mean of the models' weights, and statistics measured on the data.

    weights: of each model in the mean, by default the same. calibration: further arguments of `api.recalibrate`; with `labelled`, the
    scores before are those with the mean of the models' statistics, and those after with the new ones. Raises ModelError where the models
    are of different networks. After Izmailov et al. 2018 (SWA) and Wortsman et al. 2022 (soups).
    """
    if len(models) < 2 or (weights is not None and (len(weights) != len(models) or sum(weights) == 0)):
        raise UsageError("two models or more are averaged, each with a weight of its own, whose sum isn't zero")
    given = [1.0] * len(models) if weights is None else [float(weight) for weight in weights]
    opened: list[Model] = [backends.open_model(model) for model in models]
    mean = opened[0].averaged(opened[1:], [weight / sum(given) for weight in given])
    return recalibrate(mean, batches, example=example, **calibration)
