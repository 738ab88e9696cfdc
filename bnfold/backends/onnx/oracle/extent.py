"""How much an operator will make whose inputs say so by their values, not by their sizes: asked before it takes the memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx

from bnfold.errors import ModelError


def _numbers(value: Any) -> list[float]:
    return [float(n) for n in np.asarray(value).ravel()]


def _expanded(x: Any, shape: Any) -> float:
    """The larger of the two sizes of each axis, counted from the last."""
    own, asked = list(np.shape(x))[::-1], _numbers(shape)[::-1]
    return math.prod(max(*pair) for pair in zip(own + [1] * len(asked), asked + [1] * len(own), strict=True))


def _counted(start: Any, limit: Any, step: Any) -> float:
    (a,), (b,), (by,) = map(_numbers, (start, limit, step))
    return (b - a) / by if by else 0.0


def _padded(x: Any, pads: Any, _value: Any = None, axes: Any = None) -> float:
    added, half = _numbers(pads), len(_numbers(pads)) // 2
    places = range(np.ndim(x)) if axes is None else [int(axis) for axis in _numbers(axes)]
    sizes = list(np.shape(x))
    for axis, before, after in zip(places, added[:half], added[half:], strict=False):
        sizes[axis] += before + after
    return float(math.prod(max(n, 0) for n in sizes))


def _resized(x: Any, _region: Any = None, scales: Any = None, sizes: Any = None) -> float:
    made = math.prod(_numbers(scales if sizes is None else sizes))
    return made * int(np.size(x)) if sizes is None else made


SAID: dict[str, Callable[..., float]] = {
    "ConstantOfShape": lambda shape: math.prod(_numbers(shape)),
    "Expand": _expanded,
    "OneHot": lambda indices, depth, _values: np.size(indices) * _numbers(depth)[0],
    "Pad": _padded,
    "Range": _counted,
    "Resize": _resized,
    "Tile": lambda x, repeats: np.size(x) * math.prod(_numbers(repeats)),
}


def check_said(node: onnx.NodeProto, inputs: Sequence[Any], most: int) -> None:
    """ModelError where the inputs' values ask for more numbers than `most`. Where they make no sense, the operator will tell."""
    say = SAID.get(node.op_type)
    try:
        size = 0.0 if say is None else say(*inputs)
    except (TypeError, ValueError, IndexError, OverflowError):
        return
    if size > most:
        raise ModelError(f"a {node.op_type} (node {named(node)}) would make {size:,.0f} numbers; don't use this file")


def check_made(node: onnx.NodeProto, outputs: Iterable[Any], most: int) -> None:
    """ModelError where an output has more numbers than `most`."""
    size = max((value.size for value in outputs if isinstance(value, np.ndarray)), default=0)
    if size > most:
        raise ModelError(f"a {node.op_type} (node {named(node)}) makes {size:,} numbers; don't use this file")


def named(node: onnx.NodeProto) -> str:
    """What a node is called in an error."""
    return repr(node.name or node.output[0])
