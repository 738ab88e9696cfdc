"""Samples as arrays, the inputs that they are for, and what comes of them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from bnfold.data import InputSpec
from bnfold.errors import DataError
from bnfold.recalibration.moments import Moments, measure_samples, pool

F32 = np.dtype(np.float32)
X = [InputSpec("x", F32, ("batch", 3))]
X4 = [InputSpec("x", F32, (4, 3))]
TWO = [InputSpec("ids", np.dtype(np.int64), ("n", None)), InputSpec("mask", np.dtype(bool), ("n", None))]
A = np.arange(60, dtype=np.float32).reshape(20, 3)
LABELS = np.arange(20)


def fed(data) -> np.ndarray:
    return np.concatenate([batch["x"] for batch in data])


def sizes(data) -> list[int]:
    return [len(batch["x"]) for batch in data]


def refused(text, call):
    with pytest.raises(DataError, match=re.escape(text)):
        for _ in call():
            pass


def measure(x: np.ndarray, axis: int = 1) -> Moments:
    """The moments of each index along an axis, over all others; samples lie along axis 0."""
    return pool([measure_samples(np.moveaxis(x, axis, 1))])
