"""Arithmetic of the float64 oracle: the broadcasting of opset 6, Gemm and Mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .registry import Array, Function, operator, place


def _quotient(a: Array, b: Array) -> Array:
    """Integers are cut towards zero, as in C."""
    return np.asarray(a / b if a.dtype.kind == "f" else np.trunc(a / b))


_COMPARISONS: tuple[Any, ...] = (np.equal, np.less, np.greater, np.logical_and, np.logical_or, np.logical_xor)
_ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": _quotient,
    "Pow": np.power,
    "Equal": np.equal,
    "Less": np.less,
    "Greater": np.greater,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Xor": np.logical_xor,
}


def _legacy(compute: Callable[[Array, Array], Array]) -> Function:
    """`b` lies along consecutive axes of `a`, from `axis` on, or at its end (docs/Changelog.md, Add-6)."""

    def run(a: Array, b: Array, *, axis: int | None = None, broadcast: int = 0, consumed_inputs: Any = None) -> tuple[Array, ...]:
        if broadcast and axis is not None and b.ndim and b.size > 1:
            b = b.reshape(b.shape + (1,) * (a.ndim - axis % a.ndim - b.ndim))
        return (np.asarray(compute(a, b)).astype(a.dtype if compute not in _COMPARISONS else bool),)

    return run


for _name, _compute in _ARITHMETIC.items():
    operator(_name, until=6)(_legacy(_compute))


def _elementwise(compute: np.ufunc) -> Function:
    def run(a: Array, b: Array, *, out: Array | None = None) -> tuple[Array, ...]:
        return (np.asarray(compute(a, b, out=place(out, a, b))),)

    return run


for _name, _ufunc in {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}.items():
    operator(_name, since=7, own=True)(_elementwise(_ufunc))


@operator("Gemm")
def gemm(
    a: Array,
    b: Array,
    c: Array | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    broadcast: int = 1,
) -> tuple[Array, ...]:
    """All opsets: `broadcast` of opset 6 only forbids what later ones allow. C isn't read where beta is 0, as in BLAS."""
    y = (a.T if transA else a) @ (b.T if transB else b) * alpha
    return ((y if c is None or beta == 0 else y + beta * c).astype(a.dtype),)


@operator("Mean")
def mean(*inputs: Array) -> tuple[Array, ...]:
    """The evaluator adds up in place, which can't broadcast the first input."""
    total = inputs[0]
    for x in inputs[1:]:
        total = total + x
    return (np.asarray(total / len(inputs)),)
