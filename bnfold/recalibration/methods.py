"""The methods of recalibration: what the network does while it is measured, and what becomes of the measurements.

Two questions tell the methods apart. While a micro-batch b passes, is each BatchNorm normalised with the final statistics (`lockstep`: all
micro-batches wait at a BatchNorm until it is measured), or with the micro-batch's own, as in training? And what statistics are made of the
micro-batches' means mu_b and variances var_b, of m_b elements per channel each?

Variances are biased (M2/m) or unbiased (M2/(m-1)); each method has the convention of its source, and `unbiased` selects the other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from bnfold.algebra.affine import Array
from bnfold.errors import UsageError
from bnfold.text import meant

from .moments import Moments, Samples, pool

TOGETHER = 64  # micro-batches that are pooled at once, if their samples have
ELEMENTS = 1 << 17  # means at the most: 1 MiB
Statistics = tuple[Array, Array]  # mean and variance, float64 [C]


class Accumulator:
    """What has been measured of one layer so far.

    batches: float64 [2, C], sum_b m_b var_b, biased and unbiased, for the method that needs them. running: mean and variance of a moving
    average, which depends on the order. steps: how many micro-batches it has seen.
    """

    def __init__(self, moments: Moments, batches: Array, running: Statistics, steps: int = 0) -> None:
        self._parts: list[Moments | Samples] = [moments]
        self._waiting = 0
        self.batches, self.running, self.steps = batches, running, steps

    @property
    def moments(self) -> Moments:
        """Of all elements."""
        self.together()
        whole = self._parts[0]
        assert isinstance(whole, Moments)
        return whole

    def together(self) -> None:
        """Pool what has been added so far."""
        self._parts, self._waiting = [pool(self._parts)], 0

    def add(self, batch: Moments | Samples) -> None:
        """One more micro-batch; many are pooled at once, which takes a small part of the time."""
        self._parts.append(batch)
        self._waiting += batch.mean.size
        self.steps += 1
        if len(self._parts) > TOGETHER or self._waiting > ELEMENTS:
            self.together()

    def __add__(self, other: Accumulator) -> Accumulator:
        """Both together, but for the moving average, which has no sum."""
        return Accumulator(self.moments + other.moments, self.batches + other.batches, self.running, self.steps + other.steps)


@dataclass(frozen=True)
class Method:
    """unbiased: whether the variance is M2/(n-1) rather than M2/n; None stands for the convention of the method's source.

    lockstep: whether the network normalises with the final statistics while it is measured. additive: whether measurements of parts of
    the data, taken apart from each other, add up to that of the whole.
    """

    unbiased: bool | None = None

    name: ClassVar[str] = ""
    lockstep: ClassVar[bool] = True
    additive: ClassVar[bool] = False
    convention: ClassVar[bool] = False

    @property
    def is_unbiased(self) -> bool:
        return self.convention if self.unbiased is None else self.unbiased

    @property
    def variance(self) -> str:
        return "unbiased" if self.is_unbiased else "biased"

    def start(self, mean: Array, variance: Array) -> Accumulator:
        """Before the first micro-batch. mean, variance: float64 [C], the layer's old statistics."""
        return Accumulator(Moments.empty(mean.size), np.zeros((2, mean.size)), (mean, variance))

    def add(self, tally: Accumulator, batch: Moments | Samples) -> None:
        """One more micro-batch at one call of the layer goes into the tally."""
        tally.add(batch)

    def statistics(self, tally: Accumulator, old: Statistics, samples: int) -> Statistics:
        """The new mean and variance. old: the statistics that came; samples: of the data, as many as there were."""
        return tally.moments.mean, tally.moments.variance(self.is_unbiased)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Exact(Method):
    """Those of all data as one batch, layer by layer: mean = sum x / n, variance = M2 / n.

    The "population" statistics of Ioffe & Szegedy 2015, section 3.1 ("E[x] and Var[x] over the training set"), each layer's taken while the
    layers before it are normalised with their own final ones, as at inference. They don't depend on the size of the micro-batches.
    """

    name: ClassVar[str] = "exact"


@dataclass(frozen=True)
class Precise(Method):
    """PreciseBN: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm" (arXiv:2105.07576), section 3.1.

    mean = E_b[mu_b], variance = E_b[mu_b^2 + var_b] - E_b[mu_b]^2, with the mean over micro-batches weighted by their elements (the paper's
    are all of one size), while each micro-batch is normalised by itself.
    """

    name: ClassVar[str] = "precise"
    lockstep: ClassVar[bool] = False
    additive: ClassVar[bool] = True


@dataclass(frozen=True)
class IoffeSzegedy(Method):
    """Ioffe & Szegedy 2015, "Batch Normalization" (arXiv:1502.03167), Algorithm 2, line 10.

    mean = E_b[mu_b], variance = m/(m-1) E_b[var_b], weighted by elements where micro-batches differ in size, while each is normalised by
    itself. The spread of the micro-batches' means is left out, which is small for large and shuffled ones.
    """

    name: ClassVar[str] = "ioffe-szegedy"
    lockstep: ClassVar[bool] = False
    additive: ClassVar[bool] = True
    convention: ClassVar[bool] = True

    def add(self, tally: Accumulator, batch: Moments | Samples) -> None:
        moments = pool([batch])
        super().add(tally, moments)
        tally.batches[0] += moments.m2
        tally.batches[1] += moments.m2 * (moments.count / max(moments.count - 1, 1))

    def statistics(self, tally: Accumulator, old: Statistics, samples: int) -> Statistics:
        return tally.moments.mean, tally.batches[int(self.is_unbiased)] / max(tally.moments.count, 1)


@dataclass(frozen=True)
class MovingAverage(Method):
    """What training keeps, from the old statistics on: running = (1 - momentum) running + momentum mu_b, and so with the unbiased var_b.

    torch.nn.BatchNorm2d's semantics (https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html): the momentum is the weight
    of the newest micro-batch, and None stands for the plain mean over the micro-batches, 1/k for the k-th, as momentum=None there. Depends
    on the order of the data. ONNX states 1 - momentum under the same name.
    """

    momentum: float | None = 0.1

    name: ClassVar[str] = "moving-average"
    lockstep: ClassVar[bool] = False
    convention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.momentum is not None and not 0 < self.momentum <= 1:
            raise UsageError(f"the momentum is {self.momentum}; it must be above 0 and at most 1")

    def add(self, tally: Accumulator, batch: Moments | Samples) -> None:
        moments = pool([batch])
        super().add(tally, moments)
        weight = 1 / tally.steps if self.momentum is None else self.momentum
        mean, variance = tally.running
        tally.running = (mean + weight * (moments.mean - mean), variance + weight * (moments.variance(self.is_unbiased) - variance))

    def statistics(self, tally: Accumulator, old: Statistics, samples: int) -> Statistics:
        return tally.running


@dataclass(frozen=True)
class Prior(Method):
    """Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift adaptation" (arXiv:2006.16971), eq. 2.

    With the old statistics s, those of the n samples t, and the weight of `strength` = N samples for the old ones:
    mean = N/(N+n) mean_s + n/(N+n) mean_t, variance = N/(N+n) var_s + n/(N+n) var_t; with `mean_shift` the variance of that mixture, which
    has N n/(N+n)^2 (mean_s - mean_t)^2 more. Layer by layer, each normalised with its blended statistics as at inference. N = 0 is AdaBN
    (Li et al. 2016, "Revisiting batch normalization for practical domain adaptation", arXiv:1603.04779), and the same as the exact method.
    """

    strength: float = 16.0
    mean_shift: bool = False

    name: ClassVar[str] = "prior"

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise UsageError(f"the old statistics count as {self.strength} samples; give 0 or more")

    def statistics(self, tally: Accumulator, old: Statistics, samples: int) -> Statistics:
        share = self.strength / (self.strength + samples) if samples else 1.0
        mean, variance = tally.moments.mean, tally.moments.variance(self.is_unbiased)
        mixed = share * old[1] + (1 - share) * variance
        if self.mean_shift:
            mixed = mixed + share * (1 - share) * np.square(old[0] - mean)
        return share * old[0] + (1 - share) * mean, mixed


METHODS: dict[str, type[Method]] = {each.name: each for each in (Exact, Precise, IoffeSzegedy, MovingAverage, Prior)}


def method(choice: str | Method, **settings: Any) -> Method:
    """A method by its name, with settings of its own; None leaves one as it is. UsageError for a name or a setting that there isn't."""
    if isinstance(choice, Method):
        return choice
    if choice not in METHODS:
        raise UsageError(f"no method of recalibration is called {choice!r}; there are {', '.join(METHODS)}{meant(choice, METHODS)}")
    given = {name: value for name, value in settings.items() if value is not None}
    known = [setting.name for setting in fields(METHODS[choice])]
    if wrong := [name for name in given if name not in known]:
        raise UsageError(f"the method {choice} has no {wrong[0]}; it has {', '.join(known)}")
    return METHODS[choice](**given)
