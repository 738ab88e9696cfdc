"""Exact statistics in one pass: the data go through the network in step.

All micro-batches advance to a BatchNorm, the moments of its input are pooled, its statistics are final, and only then does anything
behind it run. Every operator runs once per micro-batch, so the work is that of one forward pass; what is held meanwhile is the values
alive at the frontier. The outcome is that of one batch of the whole data set, so it does not depend on the size of the micro-batches
or on their order.

A backend cuts its network into stages (`Plan`); everything else is here. The variance is M2/n, the data set's own, with which one batch
of everything would be normalised; PyTorch's running_var is the estimate M2/(n-1), larger by a factor 1 + 1/(n-1).

All this is about networks that treat their samples one by one. One that mixes them (a mean along the batch axis) is another function at
each size of the micro-batches, and so are its statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .affine import Array
from .errors import DataError, UsageError
from .moments import Moments
from .report import LayerStatistics, RecalibrateReport
from .spill import Frontier

Values = Mapping[str, Any]  # arrays, of numpy or of the framework that computes
Progress = Callable[[str, int, "int | None"], None]


@dataclass(frozen=True, eq=False)
class Layer:
    """A BatchNorm as it came. mean, variance: float64 [channels], the old statistics."""

    name: str
    mean: Array
    variance: Array


@dataclass(frozen=True)
class Reading:
    """The input of one call of a layer. per_activation: each element of a sample is a channel (ONNX's spatial = 0)."""

    value: str
    layer: int  # its place in Plan.layers
    per_activation: bool = False


class Stage(Protocol):
    """A part of the network that ends at the inputs of some BatchNorms.

    readings: what is measured in this stage: values that `run` gives, or that it needs. needs: the values that were left by earlier
    stages, or that are the data's, and are asked for here. keeps: the values that later stages need, of those from before, the data's and
    this stage's own; all others are dropped.
    """

    @property
    def readings(self) -> Sequence[Reading]: ...
    @property
    def needs(self) -> Collection[str]: ...
    @property
    def keeps(self) -> Collection[str]: ...

    def run(self, values: Values) -> Values:
        """One micro-batch: from the values that it needs to those that it computes. Raises DataError where they don't fit the network."""
        ...

    def moments(self, array: Any) -> Moments:
        """Of a value of its own, [samples, channels, ...]: arrays may lie on a device."""
        ...

    def held(self, array: Any, room: int) -> Any:
        """A value of its own as it waits for a later stage: on its device, where that has room for so many bytes, else as numpy's array."""
        ...


class Plan(Protocol):
    """A network, cut into stages."""

    @property
    def layers(self) -> Sequence[Layer]: ...
    @property
    def stage_count(self) -> int: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def device_room(self) -> int:
        """The bytes of a device's own memory in which values may wait; 0 where all computing is done in the host's."""
        ...

    def stages(self) -> Iterator[Stage]:
        """The stages in order; the next is made after the statistics that this one measured were set."""
        ...

    def set(self, layer: int, moments: Moments) -> str | None:
        """Take over the statistics of a layer, which is normalised with them from now on. Returns why not, where they can't be stored."""
        ...


def recalibrate(
    plan: Plan,
    batches: Iterable[Values],
    *,
    method: str = "exact",
    memory_budget: int = 1 << 30,
    progress: Progress | None = None,
) -> RecalibrateReport:
    """Measure the statistics of all layers of a plan and set them.

    batches: micro-batches by input name, read once. memory_budget: bytes of activations to hold in memory; the rest goes to a temporary
    file. Raises DataError for data that hold no batch, that don't fit, or that drive a BatchNorm's input to NaN or infinity.
    """
    if method != "exact":
        raise UsageError(f"no method of recalibration is called {method!r}; there is 'exact'")
    if memory_budget < 0:
        raise UsageError(f"the memory budget is {memory_budget} bytes; it can't be negative")
    layers = plan.layers
    totals = [Moments.empty(layer.mean.size) for layer in layers]
    kept: dict[int, str] = {}
    count: int | None = None  # micro-batches, known after the first stage
    samples = 0
    with Frontier(memory_budget, plan.device_room) as frontier:
        for number, stage in enumerate(plan.stages()):
            source = iter(batches) if number == 0 else None
            index = 0
            while source is not None or index != count:
                data: Values = {}
                if source is not None:
                    found = next(source, None)
                    if found is None:
                        break
                    data = found
                    samples += next((len(array) for array in data.values() if array.ndim), 1)
                given = {name: data[name] if source is not None else frontier.get(index, name) for name in stage.needs}
                made = stage.run(given)
                for reading in stage.readings:
                    array = made[reading.value] if reading.value in made else given[reading.value]
                    totals[reading.layer] += _read(stage, array, reading, layers[reading.layer], index)
                for name in frontier.names(index):
                    if name not in stage.keeps:
                        frontier.drop(index, name)
                for name in stage.keeps:
                    if name in made:
                        frontier.put(index, name, stage.held(made[name], frontier.room))
                    elif name in data:
                        frontier.put(index, name, np.array(data[name]))  # a copy: a loader may use its buffer again
                index += 1
                if progress is not None:
                    progress("recalibrate", number * (count or 0) + index, None if count is None else count * plan.stage_count)
            count = index
            if not count:
                raise DataError("the data hold no batch, so there is nothing to measure: give at least one sample")
            for layer in dict.fromkeys(reading.layer for reading in stage.readings):
                why = _unusable(totals[layer]) or plan.set(layer, totals[layer])
                kept.pop(layer, None)
                if why is not None:
                    kept[layer] = why
    return RecalibrateReport(
        method=method,
        samples=samples,
        layers=tuple(_changes(layer, totals[i], i in kept) for i, layer in enumerate(layers)),
        held_bytes=frontier.peak,
        spilled_bytes=frontier.spilled,
        notes=(*plan.notes, *(f"{layers[i].name} keeps its statistics: {why}" for i, why in sorted(kept.items()))),
    )


def _read(stage: Stage, array: Any, reading: Reading, layer: Layer, batch: int) -> Moments:
    """Moments of one micro-batch at one call of a layer."""
    if array.ndim == 1:
        array = array[:, None]  # samples of one channel
    if reading.per_activation:
        array = array.reshape(len(array), -1)
    if array.shape[1] != layer.mean.size:
        raise DataError(f"micro-batch {batch + 1} brings {array.shape[1]} channels to {layer.name}, which has {layer.mean.size}")
    with np.errstate(invalid="ignore", over="ignore"):
        moments = stage.moments(array)
    if not (np.isfinite(moments.mean).all() and np.isfinite(moments.m2).all()):
        channel = int(np.flatnonzero(~(np.isfinite(moments.mean) & np.isfinite(moments.m2)))[0])
        raise DataError(
            f"micro-batch {batch + 1} brings NaN, infinity or an overflow to channel {channel} of {layer.name}: look at these samples "
            f"and at how they are scaled, or leave them out"
        )
    return moments


def _unusable(moments: Moments) -> str | None:
    if moments.count == 0:
        return "no data reach it"
    if moments.count == 1:
        return "the data bring one value per channel, which has no variance; give more samples"
    return None


def _changes(layer: Layer, new: Moments, kept: bool) -> LayerStatistics:
    """The worst channel's figures. A deviation of 0 makes the first two infinite where there is a change at all."""
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.nan_to_num(new.standard_error() / np.sqrt(new.variance()), nan=0.0, posinf=np.inf)
        stderr = float(error.max(initial=0.0)) if new.count else float("inf")
        if kept:
            return LayerStatistics(layer.name, new.count, 0.0, 1.0, stderr)
        change = np.abs(new.mean - layer.mean)
        shift = np.where(change == 0, 0.0, change / np.sqrt(layer.variance))
        ratio = np.where(new.variance() == layer.variance, 1.0, new.variance() / layer.variance)
        furthest = int(np.argmax(np.nan_to_num(np.abs(np.log(ratio)), nan=np.inf, posinf=np.inf)))
    return LayerStatistics(layer.name, new.count, float(shift.max()), float(ratio[furthest]), stderr)
