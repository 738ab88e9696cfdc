"""Numbers on their way into a model: rounded once, to the type in which they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bnfold.algebra import rounding
from bnfold.algebra.affine import Array


def rounded(array: Array, dtype: ir.DataType | None) -> npt.NDArray[Any]:
    """The array rounded once, to nearest even, to a stored type (float32 where it isn't known)."""
    return rounding.rounded(array, numpy_type(dtype))


def numpy_type(dtype: ir.DataType | None) -> np.dtype[Any]:
    """A stored type as numpy has it, float32 where it isn't known."""
    return np.dtype((dtype or ir.DataType.FLOAT).numpy())
