"""Batches that are too large for a device's memory: how that is told, and how the work goes on with smaller ones."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from bnfold.errors import BnfoldError, OutOfMemoryError
from bnfold.text import counted, first_line

from .batches import Data

T = TypeVar("T")

# As PyTorch, CUDA's libraries, ONNX Runtime and C++ say it.
OUT_OF_MEMORY = re.compile("llocate memory|out ?of ?memory|bad_alloc|alloc_failed", re.IGNORECASE)
ADVICE = "give a smaller --batch-size or smaller samples, or a device with more memory"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of a runtime, or Python's own, says that there was too little memory."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


@contextmanager
def enough_memory(samples: int) -> Iterator[None]:
    """While so many samples are run: raises OutOfMemoryError for whatever says so."""
    try:
        yield
    except Exception as error:  # runtimes raise classes of their own
        if isinstance(error, BnfoldError) or not out_of_memory(error):
            raise
        short = OutOfMemoryError(f"not enough memory for {counted(samples, 'sample')} at a time ({first_line(error)}): {ADVICE}")
        short.samples = samples
        raise short from None


def repeatable(batches: Any) -> bool:
    """Whether data can be read more than once."""
    return batches.again if isinstance(batches, Data) else not isinstance(batches, Iterator)


def within_memory(
    run: Callable[[int | None], T], size: int | None, agreed: Callable[[int], list[int]] = lambda samples: [samples]
) -> tuple[T, list[str]]:
    """What `run` gives with batches of a size (None: as they come), or of half of it, and so on until there is memory enough; and notes.

    agreed: what all processes that share the work give, by their ranks; all of them are short of memory where one is. Raises the error
    where one sample is too much, and where batches don't become smaller: a model may take one size only.
    """
    notes: list[str] = []
    while True:
        try:
            return run(size), notes
        except OutOfMemoryError as error:
            samples = min(agreed(error.samples))
            if samples < 2 or (size is not None and samples > size):
                raise
            size = samples // 2
        notes = [f"not enough memory for {samples} samples at a time: went on with {size}"]
        gc.collect()  # what failed held its values, in circles
