"""Numbers on their way into a model: rounded once, to the type in which they are stored, and of a large model not all held at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bnfold.algebra import rounding
from bnfold.algebra.affine import Array
from bnfold.algebra.blocks import in_order, stored
from bnfold.algebra.graph import Param, Tensor

from .files.load import Stored
from .graph.walk import stored_tensor

HELD = 1 << 26  # bytes of a model's folded weights that are held; more are folded when somebody asks for them


class FoldedWeights:
    """The folded weights of one model."""

    def __init__(self) -> None:
        self._held = 0

    def tensor(self, param: Param, dtype: ir.DataType) -> ir.TensorProtocol:
        """A parameter with its update.

        It is held, unless others take what may be held. Then it is made of the weight in its file, by a map that takes much less memory.
        """
        kind = dtype.numpy()
        if param.tensor is not None and param.update is not None and not param.remade and param.source() is not None:
            size = math.prod(param.tensor.shape) * kind.itemsize
            little = 16 * param.update.scale.size <= size and param.tensor.native is not None
            source = stored_tensor(param.tensor.native) if little else None
            if isinstance(source, Stored) and self._held + size > HELD:
                return Folded(param, source, dtype)
            self._held += size
        return ir.Tensor(stored(param, kind), dtype=dtype)


class Folded(ir.LazyTensor):
    """A weight with its update, which is made anew whenever somebody asks for it."""

    __slots__ = ("_param",)

    def __init__(self, param: Param, source: Stored, dtype: ir.DataType) -> None:
        tensor = param.tensor
        assert tensor is not None
        # which doesn't know the graph
        known = Tensor(tensor.name, partial(_widened, source), tensor.shape, tensor.limit, raw=source.as_stored)
        self._param = replace(param, tensor=known)
        super().__init__(self._made, dtype, ir.Shape(tensor.shape))

    def _made(self) -> ir.TensorProtocol:
        return ir.Tensor(stored(self._param, self.dtype.numpy()), dtype=self.dtype)

    def tofile(self, file: IO[bytes]) -> None:
        """Write its bytes as they come, a block at a time."""
        for part in in_order(self._param, self.dtype.numpy()):
            file.write(part.reshape(-1).view(np.uint8).data)


def _widened(source: ir.TensorProtocol) -> Array:
    return source.numpy().astype(np.float64)


def rounded(array: Array, dtype: ir.DataType | None, *, flush: bool = False) -> npt.NDArray[Any]:
    """The array rounded once, to nearest even, to a stored type (float32 where it isn't known)."""
    return rounding.rounded(array, numpy_type(dtype), flush=flush)


def numpy_type(dtype: ir.DataType | None) -> np.dtype[Any]:
    """A stored type as numpy has it, float32 where it isn't known."""
    return np.dtype((dtype or ir.DataType.FLOAT).numpy())
