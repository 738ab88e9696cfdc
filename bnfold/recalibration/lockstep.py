"""Measure the statistics of all BatchNorms of a network, by any method, over any back-end.

In lockstep, the data go through the network in step: all micro-batches advance to a BatchNorm, the moments of its input are pooled, its
statistics are final, and only then does anything behind it run. Every operator runs once per micro-batch, so the work is that of one
forward pass, and of a few cheap operators that run again (see `schedule`); what is held meanwhile is the values alive at the frontier.

Of parts i of the data, with n_i elements per channel, mean_i and M2_i = sum (x - mean_i)^2, are made n = sum n_i,
mean = sum n_i mean_i / n and M2 = sum M2_i + sum n_i (mean_i - mean)^2 (Chan, Golub & LeVeque 1979, equation 2.1; see `moments`). The
exact method's statistics are mean and M2/n (Ioffe & Szegedy 2015, section 3.1), those of one batch of the whole data set: they don't
depend on the size of the micro-batches, on their order, or on how many processes share them.

Where a pointwise convolution makes many channels out of few, the moments behind it follow from the covariance of what it reads. So the
few are measured, and are what waits (see `moments.Pointwise`).

The methods that normalise each micro-batch by itself need no waiting: one micro-batch after the other goes through all stages.

A network is cut into stages by its plan (`plan.StagePlan`); `methods` knows what statistics are made of the measurements.

All this is about networks that treat their samples one by one. One that mixes them (a mean along the batch axis) is another function at
each size of the micro-batches, and so are its statistics. A micro-batch that can't be cut, such as a graph, is one sample: its nodes are
pooled with those of the others as if they all stood in one list, but for standard errors and a prior's weight it counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from bnfold.data.inputs import samples_of
from bnfold.data.memory import enough_memory
from bnfold.errors import BnfoldError, DataError, DeviceError, OutOfMemoryError, UnsupportedError, UsageError
from bnfold.report import RecalibrateReport
from bnfold.text import counted

from .changes import report, unscaled, unshuffled
from .distributed import Processes, together
from .journal import Journal
from .methods import TOGETHER, Method
from .methods import method as chosen
from .moments import Moments, Samples, pool
from .plan import NOTHING, BatchNorm, Measurement, Plan, Progress, Reading, Stage, Values
from .spill import Frontier


def recalibrate(
    plan: Plan,
    batches: Iterable[Values],
    *,
    method: str | Method = "exact",
    memory_budget: int = 1 << 30,
    progress: Progress | None = None,
    group: Processes | None = None,
    journal: Journal | None = None,
) -> RecalibrateReport:
    """Measure the statistics of all layers of a plan and set them.

    batches: micro-batches by input name, read once; where several processes share the work, this one's. memory_budget: bytes of activations
    to hold in memory; the rest goes to a temporary file. journal: where what is measured is kept, to go on from it. Raises DataError for
    data that hold no batch, that don't fit, or that drive a BatchNorm's input to NaN or infinity; UnsupportedError for a moving average
    over several processes, which would depend on their order.
    """
    how, group = chosen(method), group or Processes()
    if memory_budget < 0:
        raise UsageError(f"the memory budget is {memory_budget} bytes; it can't be negative")
    if group.size > 1 and not (how.lockstep or how.additive):
        raise UnsupportedError(f"the method {how} depends on the order of the data, so several processes can't share it; use one")
    if how.lockstep:
        measured, unchanged = _in_lockstep(plan, batches, how, memory_budget, progress, group, journal)
    else:
        measured = measure(plan, batches, how, progress=progress, group=group, journal=journal)
        unchanged = settle(plan, measured, how)
    return report(plan, measured, how, unchanged)


def measure(
    plan: Plan,
    batches: Iterable[Values],
    method: Method,
    *,
    progress: Progress | None = None,
    group: Processes | None = None,
    journal: Journal | None = None,
) -> Measurement:
    """Measure while each micro-batch is normalised by itself; nothing is set. The sum of what parts of the data give is that of all data.

    With a plan of one stage, nothing that is measured stands behind a BatchNorm, so that holds for every method but the moving average.
    """
    layers = plan.layers
    found, failed, skipped = Measurement([method.start(layer.mean, layer.variance) for layer in layers]), None, 0
    first: list[Moments] = []  # what the first layer saw
    done = 0
    try:
        if (resumed := None if journal is None else journal.passed()) is not None:
            done, found, skipped, first = resumed.done, resumed.found, resumed.skipped, list(resumed.first)
        stages = list(plan.stages(own=True))
        watched = {reading.call for reading in stages[0].readings if reading.layer == stages[0].readings[0].layer}
        for index, data in enumerate(batches):
            if index < done:
                continue
            if index % TOGETHER == 0:
                for tally in found.tallies:
                    tally.together()
                if journal is not None:
                    journal.pass_done(index, found, skipped, first)
            with enough_memory(samples_of(data)):
                seen = _through(stages, data, layers, index)
            if seen is None:
                if not found.batches:
                    raise DataError(
                        f"the micro-batches bring one value per channel to a BatchNorm, and the method {method} normalises each by itself: "
                        f"take a larger batch size, or the exact method"
                    )
                skipped += samples_of(data)
                continue
            for reading, moments in seen:
                method.add(found.tallies[reading.layer], moments)
                if reading.call in watched:
                    first.append(moments)
            found.samples += samples_of(data)
            found.batches += 1
            if progress is not None:
                progress("recalibrate", found.batches, None)
    except BnfoldError as error:
        failed = error
    every = together(group or Processes(), found, failed)
    if len(every) > 1:
        found.tallies = [reduce(add, tallies) for tallies in zip(*(part.tallies for part in every), strict=True)]
    found.count(every)
    found.notes = [*unshuffled(first), *unscaled(layers[0], found.tallies[0].moments)]
    if done:
        found.notes.append(f"went on behind {done} micro-batches, which had been measured before")
    if skipped:
        found.notes.append(f"{counted(skipped, 'sample')} left out, in micro-batches too small to be normalised by themselves")
    return found


def _through(stages: Sequence[Stage], data: Values, layers: Sequence[BatchNorm], index: int) -> list[tuple[Reading, Moments]] | None:
    """One micro-batch through all stages, normalised by itself: what each call saw.

    None where a BatchNorm sees one value per channel, which has no variance.
    """
    values = dict(data)
    own: dict[int, Moments] = {}
    seen = []
    for stage in stages:
        values |= _run(stage, values, index, own)
        for reading in stage.readings:
            moments = own[reading.call] = pool([_read(stage, values, reading, layers, index, samples_of(data))])
            if moments.count < 2:
                return None
            seen.append((reading, moments))
        values = {name: values[name] for name in stage.keeps}
    return seen


def _run(stage: Stage, values: Values, index: int, own: Mapping[int, Moments] = NOTHING) -> Values:
    try:
        return stage.run(values, own)
    except OutOfMemoryError:
        raise
    except (DataError, DeviceError) as error:
        raise type(error)(f"micro-batch {index + 1}: {error}") from None


def settle(plan: Plan, measured: Measurement, method: Method, layers: Iterable[int] | None = None) -> dict[int, str]:
    """Set the statistics that the measurements make; the layers that keep theirs, and why. layers: all of them."""
    unchanged = {}
    for index in range(len(plan.layers)) if layers is None else layers:
        layer, tally = plan.layers[index], measured.tallies[index]
        if tally.moments.count == 0:
            why: str | None = "no data reach it"
        elif tally.moments.count == 1:
            why = "the data bring one value per channel, which has no variance; give more samples"
        else:
            mean, variance = method.statistics(tally, (layer.mean, layer.variance), measured.samples)
            why = layer.refusal(variance) or plan.set(index, (mean, variance))
        if why is not None:
            unchanged[index] = why
    return unchanged


def _in_lockstep(
    plan: Plan,
    batches: Iterable[Values],
    method: Method,
    memory_budget: int,
    progress: Progress | None,
    group: Processes,
    journal: Journal | None,
) -> tuple[Measurement, dict[int, str]]:
    layers = plan.layers
    found = Measurement([method.start(layer.mean, layer.variance) for layer in layers])
    unchanged: dict[int, str] = {}
    sizes: list[int] = []  # the samples of this process's micro-batches
    resumed = None if journal is None else journal.stages()
    with Frontier(memory_budget, plan.device_room, journal) as frontier:
        if resumed is not None:
            found, sizes = resumed.found, list(resumed.sizes)
            frontier.found(resumed.values)
            unchanged = settle(plan, found, method, resumed.layers)
        done, known = (0, None) if resumed is None else (resumed.done, resumed.dtypes)
        for number, stage in enumerate(plan.stages(done=done, known=known), done):
            own = {reading.layer: method.start(layers[reading.layer].mean, layers[reading.layer].variance) for reading in stage.readings}
            total = len(sizes) * plan.stage_count if number else None
            failed = None
            try:
                waiting = ({name: frontier.get(i, name) for name in stage.needs} for i in range(len(sizes)))
                for index, values in enumerate(waiting if number else batches):
                    if number == 0:
                        sizes.append(samples_of(values))
                    with enough_memory(sizes[index]):
                        made = _run(stage, values, index)
                        for reading in stage.readings:
                            method.add(own[reading.layer], _read(stage, {**values, **made}, reading, layers, index, sizes[index]))
                    for name in frontier.names(index):
                        if name not in stage.keeps:
                            frontier.drop(index, name)
                    for name in stage.keeps:
                        if name in made:
                            frontier.put(index, name, stage.waiting(made[name], frontier.room))
                        elif number == 0:
                            frontier.put(index, name, np.array(values[name]))  # a copy: a loader may use its buffer again
                    if progress is not None:
                        progress("recalibrate", number * len(sizes) + index + 1, total)
            except BnfoldError as error:
                failed = error
            every = together(group, (own, Measurement([], sum(sizes), len(sizes))), failed)
            if number == 0:
                found.count([part for _, part in every])
            for layer in own:
                found.tallies[layer] = reduce(add, (tallies[layer] for tallies, _ in every), found.tallies[layer])
                unchanged.pop(layer, None)
            unchanged |= settle(plan, found, method, own)
            if number == 0:
                first = next(iter(own))
                found.notes = unscaled(layers[first], found.tallies[first].moments)
            if journal is not None:
                journal.stage_done(found, own, sizes, stage.keeps)
    if done:
        found.notes.append(f"went on behind stage {done} of {plan.stage_count}, up to which all had been measured before")
    found.peak_bytes, found.spilled_bytes = frontier.peak, frontier.spilled
    return found, unchanged


def _read(
    stage: Stage, values: Mapping[str, Any], reading: Reading, layers: Sequence[BatchNorm], batch: int, samples: int
) -> Moments | Samples:
    """One micro-batch at one call of a layer. samples: how many it holds; each may have several rows here (words, nodes, windows)."""
    array, layer = values[reading.value], layers[reading.layer]
    if array.ndim == 1:
        array = array[:, None]  # samples of one channel
    elif reading.axis != 1:
        array = array.swapaxes(1, reading.axis)
    if reading.per_activation:
        array = array.reshape(len(array), -1)
    elif len(array) > samples and len(array) % samples == 0:
        array = array.reshape(samples, len(array) // samples, *array.shape[1:]).swapaxes(1, 2)
    brought = array.shape[1]
    if reading.through is not None:
        out, into = reading.through.weight.shape
        if brought != into:
            raise DataError(f"micro-batch {batch + 1} brings {brought} channels to the convolution before {layer.name}, which takes {into}")
        brought = out
    if brought != layer.mean.size:
        raise DataError(f"micro-batch {batch + 1} brings {brought} channels to {layer.name}, which has {layer.mean.size}")
    with np.errstate(invalid="ignore", over="ignore"):
        seen = stage.measure(array, reading.through)
    if not (np.isfinite(seen.mean).all() and np.isfinite(seen.m2).all()):
        wrong = ~(np.isfinite(seen.mean) & np.isfinite(seen.m2)).reshape(-1, layer.mean.size).all(0)
        channel = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"micro-batch {batch + 1} brings NaN, infinity or an overflow to channel {channel} of {layer.name}: look at these samples "
            f"and at how they are scaled, or leave them out"
        )
    return seen
