"""Two models timed side by side: a ratio from interleaved rounds, which holds when the machine's speed drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfold.api import AnyModel, Progress, told
from bnfold.capture import overhearing
from bnfold.data import Chunk, as_batches
from bnfold.data.inputs import Inputs
from bnfold.data.source import peek
from bnfold.errors import DataError, UsageError
from bnfold.report import BenchReport, Latency

DRAWS = 1000  # of the bootstrap
ROUND = 0.02  # seconds: in a round a model runs at least so long, so that the clock's grain doesn't show


def bench(
    reference: AnyModel,
    candidate: AnyModel,
    batches: Iterable[Any] | None = None,
    *,
    provider: str = "cpu",
    rounds: int = 21,
    batch_size: int | None = None,
    seed: int = 0,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    example: Any = None,
    optimise: bool = True,
    threads: int | None = None,
    map_inputs: Mapping[str, str] | None = None,
    progress: Progress | bool | None = None,
) -> BenchReport:
    """Time one batch through both models in turn: A B, B A, A B, ...

    batches: the first one is run, of an array all of it; a random one of `batch_size` samples (1) where it is None. optimise: ONNX
    Runtime's own graph optimisations, which fold too; a deployed model has them on. map_inputs: as for `api.verify`. threads: that one
    operator may use. See `BenchReport` for what is found.
    """
    from bnfold.backends.open import open_both
    from bnfold.verification.comparison import alike

    progress = told(progress)
    if rounds < 2:
        raise UsageError(f"{rounds} rounds give no range; at least 2 are needed")
    first, second, batches = open_both(reference, candidate, batches, input_shapes, example)
    first, second = alike(first, second, map_inputs)
    if batches is None:
        feeds = first.random(batch=batch_size or 1, seed=seed, input_shapes=input_shapes)
    else:
        item = peek(batches)[0]
        if item is None:
            raise DataError("the data hold no batch, so there is nothing to time: give at least one sample")
        feeds = next(iter(as_batches([item], first.inputs(), batch_size=batch_size, flat=first.flat)))
    calls: list[Callable[[int], list[float]]] = []
    for side in (first, second):
        side.require(provider)
        setting = "on" if optimise and "on" in side.optimisations else "off"
        calls.append(_call(side.session(provider, setting, precision="as deployed", threads=threads or 0), feeds))
    repeats = [max(1, round(ROUND / max(*call(1), 1e-9))) for call in calls]
    times: list[list[float]] = [[], []]
    single: list[list[float]] = [[], []]
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            found = calls[which](repeats[which])
            single[which] += found
            times[which].append(sum(found) / len(found))
        if progress is not None:
            progress("time", number + 1, rounds)
    ratio, low, high = _ratio(np.array(times), seed)
    size = Inputs(first.inputs(), lambda note: None).fitted(Chunk(feeds, None, "the batch"))[1]
    return BenchReport(
        provider=provider,
        optimisation="on" if optimise else "off",
        rounds=rounds,
        batch_size=size,
        reference=statistics.median(times[0]),
        candidate=statistics.median(times[1]),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        latencies=tuple(_latency(each, size) for each in single),
        threads=threads,
    )


def _ratio(times: npt.NDArray[np.float64], seed: int) -> tuple[float, float, float]:
    """The ratio of the medians, and its 95 % interval by a bootstrap over rounds. times: [2, rounds]."""
    ratio = float(np.divide(*np.median(times, axis=1)[::-1]))
    rounds = times.shape[1]
    drawn = times[:, np.random.default_rng(seed).integers(0, rounds, (DRAWS, rounds))]
    reference, candidate = np.median(drawn, axis=2)
    low, high = np.quantile(candidate / reference, (0.025, 0.975))
    return ratio, min(float(low), ratio), max(float(high), ratio)


def _latency(seconds: list[float], samples: int) -> Latency:
    p50, p95, p99 = map(float, np.quantile(seconds, (0.5, 0.95, 0.99)))
    return Latency(p50, p95, p99, samples / p50)


def _call(session: Any, feeds: Any) -> Callable[[int], list[float]]:
    """Seconds that each of a number of calls takes; the first two, which allocate, are behind it."""
    for _ in range(2):
        session.run(feeds)

    def seconds(times: int) -> list[float]:
        marks = [0.0] * (times + 1)
        with overhearing():  # once, so that it isn't part of every call
            marks[0] = time.perf_counter()
            for number in range(times):
                session.run(feeds)
                marks[number + 1] = time.perf_counter()
        return [b - a for a, b in pairwise(marks)]

    return seconds
