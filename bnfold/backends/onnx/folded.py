"""Numbers on their way into a model: rounded once, to the type in which they are stored, and of a large model not all held at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bnfold.algebra import rounding
from bnfold.algebra.affine import Array
from bnfold.algebra.graph import Param, Tensor

from .files.load import Stored
from .graph.walk import stored_tensor

HELD = 1 << 26  # bytes of a model's folded weights that are held; more are folded once more whenever somebody asks for them


class FoldedWeights:
    """The folded weights of one model."""

    def __init__(self) -> None:
        self._held = 0

    def tensor(self, array: npt.NDArray[Any], name: str, param: Param | None) -> ir.TensorProtocol:
        """A stored array. param: what it was folded from; None where it was made in another way.

        It is held, unless others take what may be held. Then it is made of the weight in its file, by a map that takes much less memory.
        """
        tensor = ir.Tensor(array, name=name)
        if param is None or param.tensor is None or param.update is None or 16 * param.update.scale.size > array.nbytes:
            return tensor
        stored = stored_tensor(param.tensor.native)
        if not isinstance(stored, Stored):
            return tensor
        if self._held + array.nbytes <= HELD:
            self._held += array.nbytes
            return tensor
        source = Tensor(name, partial(_widened, stored), param.tensor.shape, param.tensor.limit)  # which doesn't know the graph
        return ir.LazyTensor(partial(_refolded, replace(param, tensor=source), tensor.dtype), tensor.dtype, tensor.shape, name=name)


def _widened(stored: ir.TensorProtocol) -> Array:
    return stored.numpy().astype(np.float64)


def _refolded(param: Param, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.Tensor(rounded(param.layout.stored(param.read()), dtype), dtype=dtype)


def rounded(array: Array, dtype: ir.DataType | None) -> npt.NDArray[Any]:
    """The array rounded once, to nearest even, to a stored type (float32 where it isn't known)."""
    return rounding.rounded(array, numpy_type(dtype))


def numpy_type(dtype: ir.DataType | None) -> np.dtype[Any]:
    """A stored type as numpy has it, float32 where it isn't known."""
    return np.dtype((dtype or ir.DataType.FLOAT).numpy())
