"""A coefficient is rounded once, whatever type it ends in."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from bnfold.backends.onnx.folded import rounded


def test_the_halfway_case_that_two_roundings_get_wrong() -> None:
    value = np.array([1 + 2**-8 + 2**-40])
    assert float(value.astype(ml_dtypes.bfloat16)[0]) == 1.0  # what rounding twice gives
    assert float(rounded(value, ir.DataType.BFLOAT16)[0]) == 1.0078125


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE])
def test_random_values_are_within_half_a_unit(dtype: ir.DataType) -> None:
    values = np.random.default_rng(0).normal(size=10_000)
    found = rounded(values, dtype).astype(np.float64)
    bits = ml_dtypes.finfo(dtype.numpy()).nmant
    assert (np.abs(found - values) <= 2.0 ** (np.floor(np.log2(np.abs(values))) - bits - 1)).all()
