"""Two models timed side by side: a ratio from interleaved rounds, which holds when the machine's speed drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bnfold.api import AnyModel, Progress, told
from bnfold.backends.open import open_both
from bnfold.capture import overhearing
from bnfold.data import Chunk, as_batches
from bnfold.data.inputs import Inputs
from bnfold.data.source import peek
from bnfold.errors import DataError, UsageError
from bnfold.report import BenchReport, Latency, Timing
from bnfold.text import counted

if TYPE_CHECKING:
    from bnfold.data import Batch
    from bnfold.model import Model

DRAWS = 1000  # of the bootstrap
ROUND = 0.02  # seconds: in a round a model runs at least so long, so that the clock's grain doesn't show


def bench(
    reference: AnyModel,
    candidate: AnyModel,
    batches: Iterable[Any] | None = None,
    *,
    provider: str = "cpu",
    rounds: int = 21,
    batch_size: int | Sequence[int] | None = None,
    seed: int = 0,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    example: Any = None,
    optimise: bool = True,
    threads: int | None = None,
    map_inputs: Mapping[str, str] | None = None,
    progress: Progress | bool | None = None,
) -> BenchReport:
    """Time one batch through both models in turn: A B, B A, A B, ... `rounds` of them. Times are in seconds, of a whole batch.

    batches: the first one is run, of an array all of it; a random one of `batch_size` samples (1) where it is None. batch_size: of several,
    each is timed in rounds of its own. optimise: ONNX Runtime's own graph optimisations, which fold too; a deployed model has them on.
    map_inputs: as for `api.verify`. threads: that one operator may use. See `BenchReport` for what is found. UsageError where
    there is no batch of a size that is asked for.
    """
    from bnfold.verification.comparison import alike

    progress = told(progress)
    if rounds < 2:
        raise UsageError(f"{rounds} rounds give no range; at least 2 are needed")
    first, second, batches = open_both(reference, candidate, batches, input_shapes, example)
    first, second = alike(first, second, map_inputs)
    sessions = []
    for side in (first, second):
        side.require(provider)
        setting = "on" if optimise and "on" in side.optimisations else "off"
        sessions.append(side.session(provider, setting, precision="as deployed", threads=threads or 0))
    sizes = [batch_size] if batch_size is None or isinstance(batch_size, int) else list(dict.fromkeys(batch_size))
    timings = []
    for feeds, size in list(_feeds(first, batches, sizes, seed, input_shapes)):
        stage = "time" if len(sizes) == 1 else f"time batch {size:,}"
        timings.append(_timing([*map(_call, sessions, (feeds, feeds), ("reference", "candidate"))], rounds, size, seed, stage, progress))
    return BenchReport(
        **vars(timings[0]),
        provider=provider,
        optimisation="on" if optimise else "off",
        rounds=rounds,
        threads=threads,
        timings=tuple(timings),
    )


def _feeds(
    model: Model, batches: Iterable[Any] | None, sizes: Sequence[int | None], seed: int, input_shapes: Mapping[str, tuple[int, ...]] | None
) -> Iterator[tuple[Batch, int]]:
    """What is run for each size, None being that of the data, and how many samples it is."""
    inputs = model.inputs()
    if batches is not None:
        asked = [size for size in sizes if size is not None]
        found = peek(batches)[0] if not asked else next(iter(as_batches(batches, inputs, batch_size=max(asked), flat=model.flat)), None)
        if found is None:
            raise DataError("the data hold no batch, so there is nothing to time: give at least one sample")
        batches = [found]
    for size in sizes:
        if batches is None:
            feeds = model.random(batch=size or 1, seed=seed, input_shapes=input_shapes)
        else:
            feeds = next(iter(as_batches(batches, inputs, batch_size=size, flat=model.flat)))
        samples = Inputs(inputs, lambda note: None).fitted(Chunk(feeds, None, "the batch"))[1]
        if size not in (None, samples):
            whose = "the data or the model's inputs" if batches is not None else "the model's inputs"
            raise UsageError(f"--batch-size {size}: {whose} give {counted(samples, 'sample')} at once; leave that size out")
        yield feeds, samples


def _timing(
    calls: Sequence[Callable[[int], list[float]]], rounds: int, size: int, seed: int, stage: str, progress: Progress | None
) -> Timing:
    repeats = [max(1, round(ROUND / max(*call(1), 1e-9))) for call in calls]
    times: list[list[float]] = [[], []]
    single: list[list[float]] = [[], []]
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            found = calls[which](repeats[which])
            single[which] += found
            times[which].append(statistics.median(found))
        if progress is not None:
            progress(stage, number + 1, rounds)
    ratio, low, high = _ratio(np.array(times), seed)
    return Timing(
        batch_size=size,
        reference=statistics.median(times[0]),
        candidate=statistics.median(times[1]),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        latencies=tuple(_latency(each, size) for each in single),
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


def _call(session: Any, feeds: Any, which: str) -> Callable[[int], list[float]]:
    """Seconds that each of a number of calls takes; the first two, which allocate, are behind it."""
    try:
        for _ in range(2):
            session.run(feeds)
    except DataError as error:
        raise DataError(f"the {which} can't run on what is timed: {error}") from None

    def seconds(times: int) -> list[float]:
        marks = [0.0] * (times + 1)
        with overhearing():  # once, so that it isn't part of every call
            marks[0] = time.perf_counter()
            for number in range(times):
                session.run(feeds)
                marks[number + 1] = time.perf_counter()
        return [b - a for a, b in pairwise(marks)]

    return seconds
