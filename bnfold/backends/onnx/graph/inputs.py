"""What an ONNX model takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from bnfold.data import Batch, InputSpec
from bnfold.errors import UnsupportedError

from .ranges import taken
from .shapes import Shapes
from .walk import axes


def inputs(model: ir.Model, feeds: Batch | None = None) -> list[InputSpec]:
    """What the caller feeds: the graph's inputs without those that an initializer already fills, in their order.

    An input that doesn't state its rank takes that of its data in `feeds`, or else what its operators tell; where they don't, it is refused
    (UnsupportedError).
    """
    from bnfold.data import InputSpec

    specs = []
    for value in model.graph.inputs:
        if value.name is None or value.name in model.graph.initializers:
            continue
        dtype = _numpy_dtype(value)
        given = None if feeds is None else feeds.get(value.name)
        shape = (None,) * given.ndim if value.shape is None and given is not None else _axes(value, model)
        specs.append(InputSpec(value.name, dtype, shape))
    known = taken(model) if any(spec.dtype.kind in "iu" for spec in specs) else {}
    return [replace(spec, takes=known.get(spec.name)) for spec in specs]


def _axes(value: ir.Value, model: ir.Model) -> tuple[int | str | None, ...]:
    if (stated := axes(value)) is not None:
        return stated
    if isinstance(value.type, ir.TensorType) and (probes := Shapes(model).probes(value)) is not None:
        return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*probes, strict=True))
    raise UnsupportedError(f"input {value.name!r} doesn't state its rank; write the model again with a shape for it")


def _numpy_dtype(value: ir.Value) -> np.dtype[Any]:
    if value.dtype is None or not isinstance(value.type, ir.TensorType):
        raise UnsupportedError(f"input {value.name!r} is no tensor ({value.type}); bnfold feeds tensors only")
    if value.dtype == ir.DataType.UNDEFINED:
        raise UnsupportedError(f"input {value.name!r} doesn't state its type; write the model again with one")
    return np.dtype(value.dtype.numpy())
