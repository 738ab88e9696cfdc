"""Two models timed side by side: a ratio from interleaved rounds, which holds when the machine's speed drifts."""

from __future__ import annotations

import statistics
import time
from typing import Any

from .api import Progress
from .report import BenchReport

ROUND = 0.05  # seconds: a round repeats a call at least this long, so that the clock's grain doesn't show


def bench(
    reference: Any,
    candidate: Any,
    batches: Any = None,
    *,
    provider: str = "cpu",
    rounds: int = 20,
    batch_size: int = 1,
    seed: int = 0,
    input_shapes: dict[str, tuple[int, ...]] | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Time one batch through both models, as deployed (ONNX Runtime's optimisations on), in turn: A B, B A, A B, ...

    Seconds are medians per call; the ratio is the median over the rounds, with the range that half of them lie in.
    """
    from .backends.onnx.run import Session, inputs, random_feeds

    specs = inputs(reference)
    feeds = random_feeds(specs, batch=batch_size, seed=seed, input_shapes=input_shapes) if batches is None else next(iter(batches))
    sessions = [Session(model, provider=provider, optimise=True) for model in (reference, candidate)]
    for session in sessions:
        session.run(feeds)
    start = time.perf_counter()
    sessions[0].run(feeds)
    calls = max(1, round(ROUND / max(time.perf_counter() - start, 1e-6)))
    times: list[list[float]] = [[], []]
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            start = time.perf_counter()
            for _ in range(calls):
                sessions[which].run(feeds)
            times[which].append((time.perf_counter() - start) / calls)
        if progress is not None:
            progress("time", number + 1, rounds)
    ratios = sorted(b / a for a, b in zip(*times, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    size = next((len(array) for array in feeds.values() if array.ndim), 1)
    return BenchReport(
        provider=provider,
        rounds=rounds,
        batch_size=size,
        reference=statistics.median(times[0]),
        candidate=statistics.median(times[1]),
        ratio=statistics.median(ratios),
        ratio_low=low,
        ratio_high=high,
    )
