"""Two models timed side by side: a ratio from interleaved rounds, which holds when the machine's speed drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .api import AnyModel, Progress, told
from .capture import overhearing
from .data import Chunk, as_batches
from .data.inputs import Inputs
from .data.source import peek
from .errors import DataError, UsageError
from .report import BenchReport

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
    map_inputs: Mapping[str, str] | None = None,
    progress: Progress | bool | None = None,
) -> BenchReport:
    """Time one batch through both models in turn: A B, B A, A B, ...

    batches: the first one is run, of an array all of it; a random one of `batch_size` samples (1) where it is None. optimise: ONNX
    Runtime's own graph optimisations, which fold too; a deployed model has them on. map_inputs: as for `api.verify`. Seconds are
    medians per call; the ratio candidate / reference is the median over the rounds, and its range holds the middle half of them.
    """
    from .backends.open import open_both
    from .verification.comparison import alike

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
    calls = []
    for side in (first, second):
        side.require(provider)
        setting = "on" if optimise and "on" in side.optimisations else "off"
        calls.append(_call(side.session(provider, setting, precision="as deployed"), feeds))
    repeats = [max(1, round(ROUND / max(call(1), 1e-9))) for call in calls]
    times: list[list[float]] = [[], []]
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            times[which].append(calls[which](repeats[which]) / repeats[which])
        if progress is not None:
            progress("time", number + 1, rounds)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return BenchReport(
        provider=provider,
        optimisation="on" if optimise else "off",
        rounds=rounds,
        batch_size=Inputs(first.inputs(), lambda note: None).fitted(Chunk(feeds, None, "the batch"))[1],
        reference=statistics.median(times[0]),
        candidate=statistics.median(times[1]),
        ratio=statistics.median(ratios),
        ratio_low=low,
        ratio_high=high,
    )


def _call(session: Any, feeds: Any) -> Callable[[int], float]:
    """Seconds that a number of calls take; the first two, which allocate, are behind it."""
    for _ in range(2):
        session.run(feeds)

    def seconds(times: int) -> float:
        with overhearing():  # once, so that it isn't part of every call
            start = time.perf_counter()
            for _ in range(times):
                session.run(feeds)
            return time.perf_counter() - start

    return seconds
